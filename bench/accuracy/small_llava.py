"""A stock LLaVA-1.5 with 2 million parameters and 24 x 24 patches, and its processor."""

from __future__ import annotations

import json
import math
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from .questions import BOS, EOS, IMAGE, PAD, VOCABULARY
from .scenes import GRID, PATCH

HIDDEN = 128
MEAN, STD = 0.5, 0.25  # for every channel


def build(seed: int) -> LlavaForConditionalGeneration:
    """The untrained model; patch and position embeddings are preset to shorten training."""
    torch.manual_seed(seed)
    vision = CLIPVisionConfig(
        hidden_size=HIDDEN, intermediate_size=3 * HIDDEN, num_hidden_layers=6,
        num_attention_heads=4, image_size=GRID * PATCH, patch_size=PATCH, hidden_act="gelu",
        attn_implementation="sdpa",
    )  # fmt: skip
    text = LlamaConfig(
        vocab_size=64, hidden_size=HIDDEN, intermediate_size=3 * HIDDEN, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=2048,
        pad_token_id=PAD, bos_token_id=BOS, eos_token_id=EOS, tie_word_embeddings=False,
    )  # fmt: skip
    assert len(VOCABULARY) <= text.vocab_size
    config = LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=IMAGE,
        vision_feature_layer=-1, vision_feature_select_strategy="default",
    )  # fmt: skip
    model = LlavaForConditionalGeneration(config)
    embeddings = tower(model).embeddings
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, torch.nn.Linear):
                module.weight.normal_(0, module.in_features**-0.5 * 0.7)
                if module.bias is not None:
                    module.bias.zero_()
        model.get_input_embeddings().weight.normal_(0, 0.5)
        embeddings.patch_embedding.weight.copy_(_cosines(HIDDEN))
        embeddings.position_embedding.weight.copy_(_positions(HIDDEN))
        embeddings.class_embedding.normal_(0, 0.1)
    return model


def tower(model: LlavaForConditionalGeneration) -> torch.nn.Module:
    """The module with the vision layers."""
    return getattr(model.model.vision_tower, "vision_model", model.model.vision_tower)


def _cosines(channels: int) -> Tensor:
    """Patch filters: low-frequency cosines of brightness and two colour contrasts, whitened."""
    n = PATCH
    k = torch.arange(n)[:, None]
    basis = torch.cos(math.pi / n * (torch.arange(n) + 0.5) * k) * math.sqrt(2 / n)
    basis[0] /= math.sqrt(2)
    mixes = torch.tensor([[1.0, 1.0, 1.0], [1.0, -1.0, 0.0], [0.5, 0.5, -1.0]])
    mixes = mixes / mixes.norm(dim=1, keepdim=True)
    cost = [1.0, 1.6, 1.6]  # colours need less detail
    filters = sorted(
        (cost[c] * (1 + u * u + v * v), c, u, v)
        for c in range(3) for u in range(n) for v in range(n)
    )[:channels]  # fmt: skip
    weight = torch.empty(channels, 3, n, n)
    for i, (_, c, u, v) in enumerate(filters):
        # In photos, amplitude falls with frequency.
        gain = 0.07 * math.sqrt(1 + u * u + v * v)
        weight[i] = gain * mixes[c][:, None, None] * torch.outer(basis[u], basis[v])
    return weight


def _positions(channels: int) -> Tensor:
    """Sinusoids of row and column, after zeros for the class token."""
    quarter = channels // 4
    frequency = 1.0 / 40 ** (torch.arange(quarter) / quarter)
    angle = torch.arange(GRID)[:, None] * frequency
    axis = torch.cat([angle.sin(), angle.cos()], dim=1)
    rows = axis[:, None].expand(GRID, GRID, -1)
    columns = axis[None].expand(GRID, GRID, -1)
    grid = torch.cat([rows, columns], dim=2).reshape(GRID * GRID, channels)
    return torch.cat([torch.zeros(1, channels), grid * 0.3])


def save(model: LlavaForConditionalGeneration, folder: Path) -> None:
    """Write an fp16 checkpoint that `from_pretrained` and `pipeline` can load."""
    words = {word: number for number, word in enumerate(VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", BOS)]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>",
        unk_token="<unk>", extra_special_tokens={"image_token": "<image>"}, padding_side="left",
        model_input_names=["input_ids", "attention_mask"],
    )  # fmt: skip
    side = GRID * PATCH
    images = CLIPImageProcessor(
        size={"shortest_edge": side}, crop_size={"height": side, "width": side},
        image_mean=[MEAN] * 3, image_std=[STD] * 3,
    )  # fmt: skip
    template = (
        "{% for message in messages %}{% for part in message['content'] %}"
        "{% if part['type'] == 'image' %}<image> {% else %}{{ part['text'] }}{% endif %}"
        "{% endfor %}{% endfor %}"
    )
    processor = LlavaProcessor(
        images, fast, patch_size=PATCH, vision_feature_select_strategy="default",
        chat_template=template, image_token="<image>", num_additional_image_tokens=1,
    )  # fmt: skip
    model.half().save_pretrained(folder)
    model.float()
    # The weight names of checkpoints on the Hub, which every transformers and vLLM can load.
    weights, old = load_file(folder / "model.safetensors"), "vision_tower.vision_model."
    renamed = {
        name if old in name else name.replace("vision_tower.", old): weight
        for name, weight in weights.items()
    }
    save_file(renamed, folder / "model.safetensors", metadata={"format": "pt"})
    processor.save_pretrained(folder)
    # For transformers 4: a separate file for the image processor, the name of a tokenizer class
    # that it has, and special tokens by name.
    images.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    written = json.loads(path.read_text()) | {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "extra_special_tokens": {"image_token": "<image>"},
    }
    path.write_text(json.dumps(written, indent=2) + "\n")
