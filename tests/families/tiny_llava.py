"""Tiny LLaVA models with seeded weights whose answers depend on the image, and inputs for them."""

import inspect

import torch
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

IMAGE_TOKEN, PAD_TOKEN, VOCABULARY = 500, 0, 512
PATCHES = 576

# Whether the models of this transformers take images that are encoded already.
TAKES_FEATURES = (
    "mm_encoder_outputs" in inspect.signature(LlavaForConditionalGeneration.forward).parameters
)


def where(condition):
    """Define a test for some versions of transformers only, so that nothing is skipped."""
    return (lambda test: test) if condition else (lambda test: None)


def handed_over(short):
    """The features of the one image in what `compact` returns."""
    if TAKES_FEATURES:
        (features,) = short["mm_encoder_outputs"]["image"].pooler_output
        return features
    return short["inputs_embeds"][short["input_ids"] == IMAGE_TOKEN]


def build(vision=None, seed=0, **changes):
    """A LLaVA-1.5 in miniature, with its 24 x 24 grid."""
    config = configure(LlavaConfig, vision, **changes)
    return seed_weights(LlavaForConditionalGeneration(config).eval(), seed)


def configure(config_class, vision=None, **changes):
    """A config of any LLaVA in miniature."""
    vision = vision or CLIPVisionConfig(
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=10,
        num_attention_heads=4,
        image_size=336,
        patch_size=14,
    )
    text = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        pad_token_id=PAD_TOKEN,
        eos_token_id=None,
        bos_token_id=1,
    )
    return config_class(
        vision_config=vision, text_config=text, image_token_index=IMAGE_TOKEN, **changes
    )


def seed_weights(model, seed=0):
    """Weights that do not depend on the global generator."""
    generator = torch.Generator().manual_seed(seed)
    for name, weight in model.state_dict().items():
        # Norms stay as they are; all else grows until a patch can change an answer. The class
        # embedding and the newline, one-dimensional too, are drawn from the global generator
        # otherwise.
        if weight.dim() > 1 or "class_embedding" in name or "newline" in name:
            gain = 3.0 if "q_proj" in name or "k_proj" in name else 1.3
            spread = (
                1.0 if "embed" in name or "newline" in name else gain * weight[0].numel() ** -0.5
            )
            weight.copy_(torch.randn(weight.shape, generator=generator) * spread)
    return model


def tower(model):
    """The module with the vision layers, which older transformers wrap."""
    return getattr(model.model.vision_tower, "vision_model", model.model.vision_tower)


def prompt(images=1, before=5, after=8, seed=0, patches=PATCHES):
    """Ids of one row: text, then each image's placeholders with text behind them."""
    generator = torch.Generator().manual_seed(seed)

    def text(length):
        return torch.randint(2, IMAGE_TOKEN, (length,), generator=generator)

    parts = [text(before)]
    for _ in range(images):
        parts += [torch.full((patches,), IMAGE_TOKEN), text(after)]
    return torch.cat(parts)


def batch(rows, side="left"):
    """Pad rows of ids to `input_ids` and `attention_mask`."""
    length = max(map(len, rows))
    ids = torch.full((len(rows), length), PAD_TOKEN)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        where = slice(length - len(row), None) if side == "left" else slice(len(row))
        ids[i, where], mask[i, where] = row, 1
    return {"input_ids": ids, "attention_mask": mask}


def photos(count, seed=0, size=336):
    """Smooth random images: neighbouring patches score alike, so that kept counts differ."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(count, 3, 8, 8, generator=generator)
    return torch.nn.functional.interpolate(coarse, size=(size, size), mode="bicubic")


def one():
    """One prompt of one image."""
    return {**batch([prompt()]), "pixel_values": photos(1)}


def three(side="left"):
    """Three padded prompts of 1, 2 and 1 images."""
    rows = [prompt(1, seed=1), prompt(2, before=3, seed=2), prompt(1, before=20, after=2, seed=3)]
    return {**batch(rows, side), "pixel_values": photos(4, seed=1)}


def rows_of(inputs):
    """Ids of each row without padding, and the images of each row."""
    images = iter(inputs["pixel_values"])
    for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True):
        ids = ids[mask.bool()]
        count = int((ids == IMAGE_TOKEN).sum()) // PATCHES
        yield ids, [next(images) for _ in range(count)]


def answer(model, inputs, tokens=6, **settings):
    """Greedy continuation: new ids only, exactly as a user cuts them off."""
    out = model.generate(**inputs, max_new_tokens=tokens, do_sample=False, **settings)
    return out[:, inputs["input_ids"].shape[1] :]
