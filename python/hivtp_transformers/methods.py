"""Which patches to keep: HIVTP's rule, and three to compare it with."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from hivtp_kernels import PruneConfig

SEED = 2509


def uniform(pixel_values: Tensor, config: PruneConfig) -> Tensor:
    """Ones on a lattice of `config.capacity` patches that is spread evenly over the grid.

    About square cells: `rows` of the grid at even distances, and in each of them its share of the
    patches at even distances.
    """
    (height, width), budget = config.grid, config.capacity
    rows = max(-(-budget // width), round(math.sqrt(budget * height / width)))
    scores = torch.zeros(height, width)
    for row in range(rows):
        count = (row + 1) * budget // rows - row * budget // rows
        columns = [(2 * i + 1) * width // (2 * count) for i in range(count)]
        scores[(2 * row + 1) * height // (2 * rows), columns] = 1
    return scores.view(1, -1).to(pixel_values.device).expand(len(pixel_values), -1).contiguous()


def random(pixel_values: Tensor, config: PruneConfig) -> Tensor:
    """Random numbers that follow from `SEED` and the pixels of the image alone.

    So an image gets the same ones in every run, on every device, whatever else is in its batch, and
    another image gets others.
    """
    # Sums of integers do not depend on the order. All of this wraps around, as a hash may.
    image = pixel_values.float().flatten(1).view(torch.int32).sum(1, dtype=torch.int64)
    patch = torch.arange(math.prod(config.grid), device=image.device)
    keys = _mix(_mix(image + SEED)[:, None] + patch)
    return (keys & 0xFFFFFF).float()  # as many bits as fp32 holds exactly


def _mix(keys: Tensor) -> Tensor:
    """The finaliser of MurmurHash3, on int64: every bit of a key changes half of the result's."""
    for factor in (0xFF51AFD7ED558CCD, 0xC4CEB9FE1A85EC53):
        keys = (keys ^ _shift(keys)) * (factor - 2**64)
    return keys ^ _shift(keys)


def _shift(keys: Tensor) -> Tensor:
    return (keys >> 33) & 0x7FFFFFFF


# What ranks the patches, from the pixels and the rule; None: the tower's attention.
METHODS: dict[str, Callable[[Tensor, PruneConfig], Tensor] | None] = {
    "hivtp": None,
    "topk": None,
    "uniform": uniform,
    "random": random,
}


def best_of_all(grid: tuple[int, int], budget: int | float) -> PruneConfig:
    """The rule that keeps the `budget` best patches of the whole grid: one region, one window.

    The region keeps all but one, the window the last; ties go to the lower index as everywhere.
    """
    return PruneConfig(grid=grid, regions=(1, 1), window=grid, budget=budget)
