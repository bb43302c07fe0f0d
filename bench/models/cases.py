"""The cases of `bench.models.ttft`: models with seeded weights, their prompts, the contestants."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
)

from .vision_tower import CLIP_L

IMAGE, PAD = 32000, 0  # token ids
BEFORE, AFTER = 35, 29  # tokens of text before and after the image
TILES = 5  # of an image of LLaVA-NeXT here: the whole image, and 2 x 2 parts of it
UNPRUNED, PUBLISHED = "unpruned, SDPA", "published"
# Attention of the unpruned models. The published procedure needs eager attention in the tower.
EAGER_TOWER = {"vision_config": "eager", "text_config": "sdpa"}
ATTENTION: dict[str, Any] = {
    UNPRUNED: "sdpa",
    "unpruned, eager": "eager",
    "unpruned, eager tower": EAGER_TOWER,
}
OURS: dict[str, dict[str, Any]] = {
    "ours": {},
    **{f"ours {budget}": {"budget": budget} for budget in (288, 192, 128, 64)},
    **{
        f"{method} 192": {"method": method, "budget": 192}
        for method in ("topk", "uniform", "random")
    },
}
METHODS = (UNPRUNED, "unpruned, eager", PUBLISHED, *OURS)
GPU_METHODS = (
    *ATTENTION,
    PUBLISHED,
    *(name for name, options in OURS.items() if "method" not in options),
)
LLAVA = LlavaConfig, LlavaForConditionalGeneration
NEXT = LlavaNextConfig, LlavaNextForConditionalGeneration


class Case(NamedTuple):
    """A model, a batch size and the number of rounds.

    Attributes
    ----------
    name : str
        Name of the model.
    model : tuple of type
        Classes of the config and the model.
    text : dict
        Config of the language model that is built.
    batch : int
        Number of prompts, with one image each.
    rounds : int
        Counted rounds of whole answers; 0 to measure nothing.
    layers : int, optional
        Depth of the language model to compute times for, from the shallower one that is built.
    why_not : str
        The note to print if nothing is measured.
    vision : dict
        Config of the vision tower.
    methods : tuple of str
        The contestants.
    decoded : int
        Tokens of an answer after the first.
    ttft_rounds : int
        Counted rounds of one-token answers, not divided into stages, which then give the time to
        first token. With 0, whole answers give it.
    """

    name: str
    model: tuple[type, type]
    text: dict[str, int]
    batch: int
    rounds: int
    layers: int | None = None
    why_not: str = ""
    vision: dict[str, int] = CLIP_L
    methods: tuple[str, ...] = METHODS
    decoded: int = 8
    ttft_rounds: int = 0


def llama(width: int, ff: int, layers: int, heads: int) -> dict[str, int]:
    """Config of a Llama with LLaVA's vocabulary."""
    return {
        "vocab_size": 32064, "hidden_size": width, "intermediate_size": ff,
        "num_hidden_layers": layers, "num_attention_heads": heads, "max_position_embeddings": 4096,
    }  # fmt: skip


CPU_QUICK = [Case("LLaVA-1.5 0.2B", LLAVA, llama(1024, 2816, 12, 16), batch=1, rounds=3)]
WHOLE, WIDE = llama(2048, 5504, 16, 16), llama(4096, 11008, 2, 32)
TOO_LONG = "not measured: a round takes over a quarter of an hour on two cores"
CPU = [
    Case("LLaVA-1.5 0.9B", LLAVA, WHOLE, batch=1, rounds=5),
    Case("LLaVA-1.5 0.9B", LLAVA, WHOLE, batch=8, rounds=1),
    Case("LLaVA-NeXT 0.9B", NEXT, WHOLE, batch=1, rounds=1),
    Case("LLaVA-NeXT 0.9B", NEXT, WHOLE, batch=8, rounds=0, why_not=TOO_LONG),
    Case("LLaVA-1.5 7B", LLAVA, WIDE, batch=1, rounds=5, layers=32),
    Case("LLaVA-1.5 7B", LLAVA, WIDE, batch=8, rounds=1, layers=32),
    Case("LLaVA-NeXT 7B", NEXT, WIDE, batch=1, rounds=1, layers=32),
    Case("LLaVA-NeXT 7B", NEXT, WIDE, batch=8, rounds=0, layers=32, why_not=TOO_LONG),
]

GPU = [
    Case(
        f"{name} 7B", model, llama(4096, 11008, 32, 32), batch, rounds=3,
        methods=GPU_METHODS, decoded=32, ttft_rounds=15 if batch == 1 else 5,
    )
    for name, model, batches in (("LLaVA-1.5", LLAVA, (1, 8)), ("LLaVA-NeXT", NEXT, (1, 4)))
    for batch in batches
]  # fmt: skip
GPU_QUICK = [GPU[0]._replace(ttft_rounds=3)]
TINY = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 10, "num_attention_heads": 2,
    "image_size": 336, "patch_size": 14,
}  # fmt: skip


def build(case: Case, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Any:
    """Build the model on its device with seeded weights. It never ends an answer early."""
    torch.manual_seed(0)
    config_class, model_class = case.model
    text = LlamaConfig(**case.text, pad_token_id=PAD, eos_token_id=None)
    vision = CLIPVisionConfig(**case.vision)
    config = config_class(vision_config=vision, text_config=text, image_token_index=IMAGE)
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            return model_class(config).eval()
    finally:
        torch.set_default_dtype(default)


def ask(case: Case) -> dict[str, Tensor]:
    """Prompts with one smooth random image each; for LLaVA-NeXT it has 2 x 2 tiles."""
    generator = torch.Generator().manual_seed(0)
    side, grid = case.vision["image_size"], grid_side(case.vision)
    tiles = (TILES,) if case.model == NEXT else ()
    coarse = torch.randn(case.batch * sum(tiles or (1,)), 3, 8, 8, generator=generator)
    pixels = torch.nn.functional.interpolate(coarse, size=(side, side), mode="bicubic")
    ids = torch.randint(3, IMAGE, (case.batch, BEFORE + AFTER), generator=generator)
    # LLaVA-NeXT adds the stitched grid, with a newline at the end of each of its rows.
    stitched = 2 * grid * (2 * grid + 1) if tiles else 0
    image = torch.full((case.batch, grid**2 + stitched), IMAGE)
    inputs = {
        "input_ids": torch.cat([ids[:, :BEFORE], image, ids[:, BEFORE:]], dim=1),
        "pixel_values": pixels.view(case.batch, *tiles, *pixels.shape[1:]),
    }
    return inputs | ({"image_sizes": torch.full((case.batch, 2), 2 * side)} if tiles else {})


def grid_side(vision: dict[str, int]) -> int:
    """Patches per side of a tile."""
    return vision["image_size"] // vision["patch_size"]


def depth_used(config: Any) -> int:
    """Number of vision layers up to the one whose output the language model gets."""
    return range(config.vision_config.num_hidden_layers + 1)[config.vision_feature_layer]


def rehearsal(case: Case) -> Case:
    """The case with a tiny model and the least number of rounds."""
    tiny = {"text": llama(32, 48, 2, 2), "vision": TINY}
    return case._replace(rounds=1, ttft_rounds=min(case.ttft_rounds, 1), **tiny)
