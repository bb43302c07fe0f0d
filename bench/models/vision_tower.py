"""The vision tower with scoring and selection, compared with the unpruned tower.

`python -m bench.models.vision_tower` uses CLIP-L/336 with seeded weights and, like LLaVA-1.5, the
features of layer -2. The unpruned tower runs as in `get_image_features`: SDPA, all 24 layers. The
pruned one runs what `hivtp_transformers` does up to the kept features: 23 layers, scores from three
of them, selection and gather.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from hivtp_transformers.towers import Clip, default_layers
from transformers import CLIPVisionConfig, CLIPVisionModel

from hivtp_kernels import PruneConfig, gather_tokens, score_and_select

from ..ops import timing

CLIP_L = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
}


def contestants(
    vision: dict[str, int], batch: int, budget: int | None, rows: str, dtype: torch.dtype
) -> dict[str, Callable[[], object]]:
    """Both towers, to run on the same pixels."""
    torch.manual_seed(0)
    config = CLIPVisionConfig(**vision, attn_implementation="sdpa")
    module = CLIPVisionModel(config).eval().to(dtype)
    pixels = torch.randn(batch, 3, config.image_size, config.image_size, dtype=dtype)
    depth, side = config.num_hidden_layers - 1, config.image_size // config.patch_size
    tower = Clip(module, [depth], default_layers(config.num_hidden_layers), rows)
    tower.install()
    prune = PruneConfig(grid=(side, side), budget=budget)

    @torch.no_grad()
    def unpruned() -> torch.Tensor:
        hidden = module(pixels, output_hidden_states=True).hidden_states[-2]
        return hidden[:, 1:]

    @torch.no_grad()
    def pruned() -> torch.Tensor:
        encoded = tower.encode(pixels)
        selection = score_and_select(encoded.q, encoded.k, prune, rows=rows, scale=encoded.scale)
        return gather_tokens(encoded.hidden, selection)

    return {"unpruned, SDPA": unpruned, "pruned": pruned}


def main(arguments: list[str] | None = None, vision: dict[str, int] = CLIP_L) -> float:
    """Parse the command line and run; returns the ratio."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--budget", type=int, help="patches to keep; default: the paper's ratios")
    parser.add_argument("--rows", choices=("cls", "all"), default="cls")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    print(f"{timing.machine()}, {options.threads} threads, batch {options.batch}, {options.dtype}")
    if (busy := timing.load()) is not None:
        print(busy)
    dtype = getattr(torch, options.dtype)
    towers = contestants(vision, options.batch, options.budget, options.rows, dtype)
    seconds = timing.rounds(list(towers.values()), options.rounds)
    for name, own in zip(towers, seconds, strict=True):
        print(f"{name:15} {timing.spread(own)}")
    ratio = timing.paired_ratio(seconds[1], seconds[0])
    print(f"pruned / unpruned, median of {options.rounds} paired rounds: {ratio:.3f}")
    return ratio


if __name__ == "__main__":
    main()
