"""Tiny LLaVA checkpoints with processors, whose answers depend on the image; seeded weights."""

import json
import sys
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    CLIPImageProcessor,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextImageProcessor,
    LlavaNextProcessor,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "families"))
from tiny_llava import IMAGE_TOKEN, VOCABULARY, configure, photos, seed_weights

KINDS = {
    "llava": (
        LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor, CLIPImageProcessor,
    ),
    "llava_next": (
        LlavaNextConfig, LlavaNextForConditionalGeneration, LlavaNextProcessor,
        LlavaNextImageProcessor,
    ),
}  # fmt: skip
# vLLM's attention on a CPU takes heads of 32 channels or more.
TEXT = {"hidden_size": 256, "head_dim": 64, "max_position_embeddings": 8192, "eos_token_id": 2}
TEMPLATE = (
    "{% for m in messages %}{% if m['content'] is string %}{{ m['content'] }}{% else %}"
    "{% for p in m['content'] %}{% if p['type'] == 'image' %}<image>{% else %} {{ p['text'] }}"
    "{% endif %}{% endfor %}{% endif %}{% endfor %}"
)


def build(kind: str, folder: Path, vision=None, text=None) -> None:
    """Write a checkpoint of `kind`; pass configs of the tower and the text model for a larger one.

    Token n is the word `wn`, except for the five special tokens.
    """
    config_class, model_class, processor_class, image_class = KINDS[kind]
    config = configure(config_class, vision)
    if text is None:
        config.text_config.update(TEXT)
    else:
        config.text_config = text
    with torch.no_grad():
        model = seed_weights(model_class(config).eval())
    model.save_pretrained(folder)
    # The weight names of checkpoints on the Hub, which vLLM 0.32 needs.
    path = folder / "model.safetensors"
    weights = load_file(path)
    old = "vision_tower.vision_model."
    renamed = {
        name if old in name else name.replace("vision_tower.", old): weight
        for name, weight in weights.items()
    }
    save_file(renamed, path, metadata={"format": "pt"})

    names = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3, "<image>": IMAGE_TOKEN}
    words = {f"w{n}": n for n in range(VOCABULARY) if n not in names.values()} | names
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>",
        unk_token="<unk>", extra_special_tokens={"image_token": "<image>"}, padding_side="left",
        model_input_names=["input_ids", "attention_mask"],
    )  # fmt: skip
    side = config.vision_config.image_size
    options = {"size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side}}
    if kind == "llava_next":
        options |= {"image_grid_pinpoints": config.image_grid_pinpoints}
    processor = processor_class(
        image_class(**options), fast, patch_size=14,
        vision_feature_select_strategy="default", image_token="<image>",
        num_additional_image_tokens=1, chat_template=TEMPLATE,
    )  # fmt: skip
    processor.save_pretrained(folder)
    generation = folder / "generation_config.json"
    generation.write_text(json.dumps({"eos_token_id": 2, "pad_token_id": 0, "bos_token_id": 1}))


def picture(seed: int, height: int = 336, width: int = 336) -> Image.Image:
    """A smooth random image."""
    (pixels,) = torch.nn.functional.interpolate(photos(1, seed), size=(height, width))
    return Image.fromarray((pixels * 60 + 128).clamp(0, 255).byte().permute(1, 2, 0).numpy())
