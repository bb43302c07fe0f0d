"""Tiny LLaVA models with seeded weights whose answers depend on the image, and inputs for them."""

import inspect
import itertools

import pytest
import torch
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    SiglipVisionConfig,
)

IMAGE_TOKEN, PAD_TOKEN, VOCABULARY = 500, 0, 512
PATCH, PATCHES = 14, 576
LAYERS = (2, 3)  # the default of a tower of ten layers

# Whether the models of this transformers take images that are encoded already.
TAKES_FEATURES = (
    "mm_encoder_outputs" in inspect.signature(LlavaForConditionalGeneration.forward).parameters
)


needs_features = pytest.mark.skipif(
    not TAKES_FEATURES, reason="forward takes no mm_encoder_outputs before transformers 5.18"
)
needs_embeddings = pytest.mark.skipif(
    TAKES_FEATURES, reason="forward takes mm_encoder_outputs from transformers 5.18 on"
)


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


def clip(grid=24, layers=10):
    """A tower of `grid` x `grid` patches and a class token."""
    return CLIPVisionConfig(**tower_settings(layers, PATCH * grid))


def siglip(grid=9, layers=10):
    """A tower without a class token, and as in the real one some pixels are left over."""
    return SiglipVisionConfig(**tower_settings(layers, PATCH * grid + 6), vision_use_head=False)


def tower_settings(layers, side):
    return {
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "image_size": side,
        "patch_size": PATCH,
    }


def configure(config_class, vision=None, **changes):
    """A config of any LLaVA in miniature."""
    vision = vision or clip()
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
        # Norms stay as they are; all else grows until a patch can change an answer. Otherwise the
        # global generator would draw what else has one dimension: the class embedding, the newline
        # and SigLIP's biases.
        if weight.dim() > 1 or "class_embedding" in name or "newline" in name:
            gain = 3.0 if "q_proj" in name or "k_proj" in name else 1.3
            spread = (
                1.0 if "embed" in name or "newline" in name else gain * weight[0].numel() ** -0.5
            )
            weight.copy_(torch.randn(weight.shape, generator=generator) * spread)
        elif name.endswith("bias"):
            weight.zero_()
    return model


def tower(model):
    """The module with the vision layers, which older transformers wrap."""
    return getattr(model.model.vision_tower, "vision_model", model.model.vision_tower)


def prompt(images=1, before=5, after=8, seed=0, patches=PATCHES):
    """Ids of one row: text, then each image's placeholders with text behind them."""
    return text_around([patches] * images, before, after, seed)


def text_around(counts, before=5, after=8, seed=0):
    """Ids of one row: text, then so many placeholders for each image with text behind them."""
    generator = torch.Generator().manual_seed(seed)

    def text(length):
        return torch.randint(2, IMAGE_TOKEN, (length,), generator=generator)

    parts = [text(before)]
    for count in counts:
        parts += [torch.full((count,), IMAGE_TOKEN), text(after)]
    return torch.cat(parts)


def texts_around(rows, seed=0):
    """The same for each of several rows, whose texts differ."""
    return [text_around(row, 3 + 4 * i, seed=seed + i) for i, row in enumerate(rows)]


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


def rows_of(inputs, patches=PATCHES):
    """Ids of each row without padding, and the images of each row."""
    return rows_with(inputs, inputs.get("pixel_values", ()), itertools.repeat(patches))


def rows_with(inputs, images, counts):
    """Ids of each row without padding, and its images, which take so many placeholders."""
    left = zip(images, counts, strict=False)
    for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True):
        ids = ids[mask.bool()]
        room, own = int((ids == IMAGE_TOKEN).sum()), []
        while room:
            image, count = next(left)
            own.append(image)
            room -= count
        yield ids, own


def answer(model, inputs, tokens=6, **settings):
    """Greedy continuation: new ids only, exactly as a user cuts them off."""
    out = model.generate(**inputs, max_new_tokens=tokens, do_sample=False, **settings)
    return out[:, inputs["input_ids"].shape[1] :]
