"""Ways to choose units: HIVTP, and others to compare it with. Each is a class in one registry."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from hivtp_kernels import PruneConfig

SEED = 2509


class Evidence(NamedTuple):
    """What a method sees of a grid (scope "grid") or of a whole image (scope "image").

    Attributes
    ----------
    shape : (int, int)
        Rows and columns of the grid; `(1, units)` for a whole image.
    kept : int
        How many units stay.
    units : Tensor
        int64 `[n]`: the units that compete, numbered within their image.
    attention : Tensor or None
        fp32 `[n]`: the attention that each unit receives. None unless the method needs it.
    pixels : Tensor or None
        The image as the encoder takes it, `[tiles, channels, height, width]`. None unless the
        method needs it.
    features : Tensor or None
        `[n, C]`: the encoder's output for each unit, before the projector. None unless the method
        needs it.
    """

    shape: tuple[int, int]
    kept: int
    units: Tensor
    attention: Tensor | None
    pixels: Tensor | None
    features: Tensor | None


class Method:
    """A way to choose which units stay. A subclass sets the facts and overrides what differs.

    Attributes
    ----------
    needs : frozenset of str
        What `scores` looks at: any of "attention", "pixels" and "features".
    scope : {"grid", "image"}
        What competes: the units of each grid, among which a budget is shared in proportion to area,
        or all units of an image in one ranking.
    has_ratio_mode : bool
        Whether units may be kept by the ratio, regions and windows of a `PruneConfig`. Needs the
        scope "grid".
    """

    needs: ClassVar[frozenset[str]] = frozenset({"attention"})
    scope: ClassVar[str] = "image"
    has_ratio_mode: ClassVar[bool] = False

    @property
    def own_scores(self) -> bool:
        """Whether the method computes scores of its own."""
        return type(self).scores is not Method.scores

    def scores(self, evidence: Evidence) -> Tensor:
        """Return a score per unit, fp32 `[n]`, of which the highest stay.

        The attention that each unit receives, by default.
        """
        assert evidence.attention is not None
        return evidence.attention

    def config(self, shape: tuple[int, int], count: int) -> PruneConfig | None:
        """Return the regions and windows by which a grid keeps `count` units.

        None, the default, keeps the highest scores: score descending, then unit ascending, NaN as
        -inf. Only asked if the scope is "grid".
        """
        return None


class Hivtp(Method):
    """The paper's: the best of each region, then the best of each window among the rest."""

    scope = "grid"
    has_ratio_mode = True

    def config(self, shape: tuple[int, int], count: int) -> PruneConfig:
        """Return up to 2 x 2 regions, and the smallest square windows that half the count fills."""
        return _regions_and_windows(shape, count)


class TopK(Method):
    """The highest attention of the whole image."""


class Uniform(Method):
    """An even lattice on each grid."""

    needs = frozenset()
    scope = "grid"

    def scores(self, evidence: Evidence) -> Tensor:
        """Return ones on the lattice and zeros elsewhere."""
        return lattice(evidence.shape, evidence.kept).flatten().to(evidence.units.device)


class Random(Method):
    """Units drawn by `SEED` and the image's own pixels, whatever else is in the batch."""

    needs = frozenset({"pixels"})

    def scores(self, evidence: Evidence) -> Tensor:
        """Return random numbers, the same for equal pixels on every device."""
        assert evidence.pixels is not None
        # Sums of integers do not depend on the order. All of this wraps around, as a hash may.
        image = evidence.pixels.float().flatten().view(torch.int32).sum(dtype=torch.int64)
        keys = _mix(_mix(image + SEED) + evidence.units)
        return (keys & 0xFFFFFF).float()  # as many bits as fp32 holds exactly


METHODS: dict[str, Method] = {
    "hivtp": Hivtp(),
    "topk": TopK(),
    "uniform": Uniform(),
    "random": Random(),
}


def lattice(shape: tuple[int, int], count: int) -> Tensor:
    """Ones at `count` units that are spread evenly over a grid, fp32 `[H, W]`, zeros elsewhere.

    Cells are about square: some rows of the grid at even distances, and in each of them its share
    of the units at even distances.
    """
    height, width = shape
    rows = max(-(-count // width), round(math.sqrt(count * height / width)))
    ones = torch.zeros(height, width)
    for row in range(rows):
        in_row = (row + 1) * count // rows - row * count // rows
        columns = [(2 * i + 1) * width // (2 * in_row) for i in range(in_row)]
        ones[(2 * row + 1) * height // (2 * rows), columns] = 1
    return ones


def best(scores: Tensor, count: int) -> Tensor:
    """The indices of the `count` highest scores: descending, then index ascending, NaN as -inf."""
    # Adding zero makes one number of -0.0 and 0.0.
    scores = scores.masked_fill(scores.isnan(), -torch.inf) + 0.0
    return scores.argsort(descending=True, stable=True)[:count]


@lru_cache(maxsize=1024)
def _regions_and_windows(shape: tuple[int, int], count: int) -> PruneConfig:
    if count == 1:
        return PruneConfig(grid=shape, regions=(1, 1), window=shape, budget=1)
    # A one-row grid has only one row of regions.
    return PruneConfig(grid=shape, regions=(min(2, shape[0]), min(2, shape[1])), budget=count)


def _mix(keys: Tensor) -> Tensor:
    """The finaliser of MurmurHash3, on int64: an input bit flips about half of the output bits."""
    for factor in (0xFF51AFD7ED558CCD, 0xC4CEB9FE1A85EC53):
        keys = (keys ^ _shift(keys)) * (factor - 2**64)
    return keys ^ _shift(keys)


def _shift(keys: Tensor) -> Tensor:
    return (keys >> 33) & 0x7FFFFFFF
