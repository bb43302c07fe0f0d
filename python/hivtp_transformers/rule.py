"""Which patches of an image stay: those of every tile by itself, or of a budget for all of it."""

from __future__ import annotations

import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from hivtp_kernels import (
    PruneConfig,
    Selection,
    attention_scores,
    score_and_select,
    select_tokens,
)
from hivtp_kernels.config import MAX_PATCHES
from hivtp_kernels.types import GLOBAL

from .families import Family, Images
from .methods import METHODS, best_of_all, random, uniform
from .towers import Encoded


class Kept(NamedTuple):
    """What a rule keeps.

    Attributes
    ----------
    stage : Tensor
        int8 `[T, N]`: the stage that kept each patch of each tile, as in `Selection.stage`; 0 for
        those that were dropped. Where images are resized, `[S]`: of each number in `packed`.
    selection : Selection or None
        The same as indices, where every tile was pruned by itself.
    """

    stage: Tensor
    selection: Selection | None


# From what the tower made of all tiles, and them, with the keywords of scoring, to what is kept.
Select = Callable[..., Kept]


class Rule(Protocol):
    """How an image is pruned. `packed` is an image as `Family.pack` gives it."""

    exact: bool  # whether `most` is the number
    keeps_all: bool  # whether it drops no patch of any image

    def most(self, packed: Tensor) -> int:
        """The most patches of an image that can reach the language model."""

    def own_scores(self, tiles: Tensor) -> Tensor | None:
        """Scores `[T, N]` that do not come from the tower's attention, or None."""

    def plan(self, images: Images, device: torch.device) -> Select:
        """All that is known before the tower runs; raises a ValueError for what cannot be."""

    def select(self, scores: Tensor, packed: Sequence[Tensor], backend: str) -> Tensor:
        """The stage of each patch, int8 `[T, N]`, from scores `[T, N]` alone."""


def make_rule(
    family: Family,
    config: PruneConfig | None,
    budget: int | float | None,
    newline: str,
    method: str = "hivtp",
) -> Rule:
    """The rule that the arguments of `apply` ask for, or an error that says what is legal."""
    if newline not in ("keep", "drop"):
        raise ValueError(f"newline must be 'keep' or 'drop', got {newline!r}")
    if newline != "keep" and not family.newlines:
        raise ValueError(
            f"newline must be 'keep' for {family.config.model_type}, which has no newlines, "
            f"got {newline!r}"
        )
    if config is not None and budget is not None:
        raise ValueError(
            f"config and budget exclude each other, got config={config!r} and budget={budget!r}"
        )
    patches = math.prod(family.grid)
    if config is None:
        if budget is not None and family.newlines:
            return ByBudget(family, budget, newline == "keep", method)
        if isinstance(budget, int) and not isinstance(budget, bool):
            budget = min(budget, patches)
        if method == "hivtp" or budget is None:
            config = PruneConfig(grid=family.grid, budget=budget)
        else:
            config = best_of_all(family.grid, budget)
    if not isinstance(config, PruneConfig):
        raise TypeError(f"config must be a hivtp_kernels.PruneConfig, got {type(config).__name__}")
    if config.grid != family.grid:
        raise ValueError(
            f"config must have the vision tower's grid {family.grid}, got {config.grid}"
        )
    if config.budget is not None and (family.newlines or family.by_grid):
        raise ValueError(
            f"config must be in ratio mode for {family.config.model_type}, whose budget is shared "
            f"by all tiles of an image, got {config!r}: pass apply(..., budget={config.budget})"
        )
    if family.by_grid:
        return ByRatio(family, config)
    return ByTile(family, config, method)


def attention_of(family: Family, encoded: Encoded, **scoring: Any) -> Tensor:
    """Scores `[T, N]` from the tower's attention."""
    return family.merge_scores(attention_scores(encoded.q, encoded.k, **scoring))


class ByTile:
    """Every tile by itself, by one `PruneConfig`: the paper's way."""

    def __init__(self, family: Family, config: PruneConfig, method: str = "hivtp") -> None:
        self.family = family
        self.config = config
        self.method = method
        self.exact = config.budget is not None
        patches = math.prod(config.grid)
        self.keeps_all = sum(config.quotas) == patches or config.budget == patches

    def most(self, packed: Tensor) -> int:
        """The capacity of each tile, or what its padding leaves of it."""
        shown = packed[packed >= 0] // math.prod(self.config.grid)
        return int(shown.bincount().clamp(max=self.config.capacity).sum())

    def plan(self, images: Images, device: torch.device) -> Select:
        """Nothing depends on the images."""
        return self._select

    def own_scores(self, tiles: Tensor) -> Tensor | None:
        """Those of a method that does without attention."""
        method = METHODS[self.method]
        return None if method is None else method(tiles, self.config)

    def _select(self, encoded: Encoded, tiles: Tensor, **scoring: Any) -> Kept:
        scores = self.own_scores(tiles.to(encoded.hidden.device))
        if scores is None and self.family.merge > 1:
            scores = attention_of(self.family, encoded, **scoring)
        if scores is None:
            selection = score_and_select(encoded.q, encoded.k, self.config, **scoring)
        else:
            selection = select_tokens(scores, self.config, backend=scoring["backend"])
        if self.method != "hivtp":
            # Its regions and windows are a means here, and no stages of the method.
            selection = selection._replace(stage=selection.stage.clamp(max=GLOBAL))
        return Kept(_by_patch(selection), selection)

    def select(self, scores: Tensor, packed: Sequence[Tensor], backend: str) -> Tensor:
        """One selection for all tiles."""
        return _by_patch(select_tokens(scores, self.config, backend=backend))


class ByGrid(ABC):
    """Each grid of an image by itself, stitched and resized as the language model gets it.

    A grid of more patches than the kernels take is cut into halves along its longer side until none
    is; these are grids like others.
    """

    exact: bool
    keeps_all = False

    def __init__(self, family: Family) -> None:
        self.family = family

    @abstractmethod
    def configs(self, packed: Tensor) -> list[tuple[Tensor, PruneConfig | None]]:
        """The grids of an image with the rule for each, None where it is kept whole."""

    def most(self, packed: Tensor) -> int:
        """The sum over the grids."""
        return sum(
            grid.numel() if config is None else config.capacity
            for grid, config in self.configs(packed)
        )

    def plan(self, images: Images, device: torch.device) -> Select:
        """Grids of one shape with one share form a batch."""
        batches = self._batches(images.packed, device)
        return partial(self._score_and_select, batches, images.resample)

    def select(self, scores: Tensor, packed: Sequence[Tensor], backend: str) -> Tensor:
        """One selection for each batch."""
        return self._select_batches(self._batches(packed, scores.device), scores, backend)

    def own_scores(self, tiles: Tensor) -> Tensor | None:
        """None: the tower's attention decides."""
        return None

    def grids(self, packed: Tensor) -> list[Tensor]:
        """The grids of an image, none too large."""
        return [part for grid in self.family.grids(packed) for part in _parts(grid)]

    def _batches(
        self, packed: Sequence[Tensor], device: torch.device
    ) -> dict[PruneConfig | None, Tensor]:
        batches: dict[PruneConfig | None, list[Tensor]] = {}
        for image in packed:
            for grid, config in self.configs(image):
                batches.setdefault(config, []).append(grid.flatten())
        # Handed over before the tower runs: a copy from the host waits for the device.
        return {
            config: (torch.cat(grids) if config is None else torch.stack(grids)).to(device)
            for config, grids in batches.items()
        }

    def _score_and_select(
        self,
        batches: dict[PruneConfig | None, Tensor],
        resample: Callable[[Tensor], Tensor] | None,
        encoded: Encoded,
        tiles: Tensor,
        **scoring: Any,
    ) -> Kept:
        scores = self.own_scores(tiles.to(encoded.hidden.device))
        if scores is None:
            scores = attention_of(self.family, encoded, **scoring)
        if resample is not None:
            scores = resample(scores[..., None]).squeeze(1)
        return Kept(self._select_batches(batches, scores, scoring["backend"]), None)

    def _select_batches(
        self, batches: dict[PruneConfig | None, Tensor], scores: Tensor, backend: str
    ) -> Tensor:
        stage = torch.zeros(scores.shape, dtype=torch.int8, device=scores.device)
        for config, patches in batches.items():
            if config is None:
                stage.view(-1).index_fill_(0, patches, GLOBAL)
                continue
            of_batch = self._of_batch(scores, patches, config)
            selection = select_tokens(of_batch, config, backend=backend)
            stage.view(-1).scatter_(0, patches.flatten(), _by_patch(selection).flatten())
        return stage

    def _of_batch(self, scores: Tensor, patches: Tensor, config: PruneConfig) -> Tensor:
        """Scores of a batch of grids, whose patches are `[B, n]`."""
        return scores.view(-1)[patches]


class ByRatio(ByGrid):
    """A share of every grid, by the ratio, regions and windows of one `PruneConfig`."""

    exact = False

    def __init__(self, family: Family, config: PruneConfig) -> None:
        super().__init__(family)
        self.config = config
        self.keeps_all = sum(config.quotas) == math.prod(config.grid)

    def configs(self, packed: Tensor) -> list[tuple[Tensor, PruneConfig | None]]:
        """A rule for each shape."""
        return [(grid, self._config(*grid.shape)) for grid in self.grids(packed)]

    def _config(self, height: int, width: int) -> PruneConfig:
        assert self.config.window is not None  # but in budget mode, which `make_rule` refuses
        (ry, rx), (wy, wx) = self.config.regions, self.config.window
        return PruneConfig(
            grid=(height, width),
            regions=(min(ry, height), min(rx, width)),
            window=(min(wy, height), min(wx, width)),
            ratio=self.config.ratio,
        )


class ByBudget(ByGrid):
    """An exact number of visual positions an image, shared by its grids in proportion to area."""

    exact = True

    def __init__(
        self, family: Family, budget: int | float, keeps_newlines: bool, method: str = "hivtp"
    ) -> None:
        super().__init__(family)
        self.method = method
        legal = "budget must be a positive integer, or a float strictly between 0 and 1"
        if isinstance(budget, bool) or not isinstance(budget, int | float):
            raise TypeError(f"{legal}, got {budget!r}")
        if not (budget >= 1 if isinstance(budget, int) else 0 < budget < 1):
            raise ValueError(f"{legal}, got {budget!r}")
        self.budget = budget
        self.keeps_newlines = keeps_newlines

    def configs(self, packed: Tensor) -> list[tuple[Tensor, PruneConfig | None]]:
        """A budget for each grid, which add up to what the newlines leave of the image's."""
        grids = self.grids(packed)
        shares = self._shares(packed, grids)
        if self.method in ("topk", "random"):  # one ranking for the whole image
            grids, shares = [packed[packed >= 0][None]], [sum(shares)]
        rule = _config if self.method == "hivtp" else _best_config
        return [(grid, rule(grid, share)) for grid, share in zip(grids, shares, strict=True)]

    def own_scores(self, tiles: Tensor) -> Tensor | None:
        """Random numbers; or nothing yet, for a lattice is one of the stitched grid."""
        if self.method == "random":
            return random(tiles, PruneConfig(grid=self.family.grid))
        if self.method == "uniform":
            return torch.zeros(len(tiles), math.prod(self.family.grid), device=tiles.device)
        return None

    def _of_batch(self, scores: Tensor, patches: Tensor, config: PruneConfig) -> Tensor:
        """The scores; or a lattice of each grid."""
        if self.method == "uniform":
            return uniform(patches, config)
        return super()._of_batch(scores, patches, config)

    def _select_batches(
        self, batches: dict[PruneConfig | None, Tensor], scores: Tensor, backend: str
    ) -> Tensor:
        stage = super()._select_batches(batches, scores, backend)
        # Regions and windows of other methods are a means, and no stages of this one.
        return stage if self.method == "hivtp" else stage.clamp_(max=GLOBAL)

    def _shares(self, packed: Tensor, grids: list[Tensor]) -> list[int]:
        """How many patches each grid of an image keeps."""
        sizes = [grid.numel() for grid in grids]
        newlines = len(packed) - sum(sizes) if self.keeps_newlines else 0
        positions = sum(sizes) + newlines
        count = self.budget
        if isinstance(count, float):
            count = math.floor(count * positions)
        if count >= positions:
            return sizes
        if not _legal(count - newlines, sizes):
            shapes = " and ".join(f"{len(grid)} x {grid.shape[1]}" for grid in grids)
            smallest = next(n for n in itertools.count(1) if _legal(n, sizes)) + newlines
            raise ValueError(
                f"budget must be at least {smallest} for an image of {positions} visual positions "
                f"({shapes} patches, {newlines} newlines), got {self.budget!r}"
                + (f", which is {count}" if isinstance(self.budget, float) else "")
            )
        return _share(count - newlines, sizes)


def kept_positions(stage: Tensor, packed: Tensor, keeps_newlines: bool, count: int) -> Tensor:
    """Which of the positions in `packed` stay, int64 `[count]`, ascending.

    That their number is known saves the synchronisation of `nonzero`.
    """
    kept = stage.flatten()[packed.clamp(min=0)] > 0
    kept = torch.where(packed < 0, keeps_newlines, kept)
    return (~kept).byte().argsort(stable=True)[:count]


def _by_patch(selection: Selection) -> Tensor:
    """The stage of each patch of each tile, int8 `[T, N]`."""
    patches = math.prod(selection.grid)
    # Padding lands in a column behind the last patch, which is cut off.
    column = torch.where(selection.indices < 0, patches, selection.indices).long()
    stage = selection.stage.new_zeros(len(column), patches + 1)
    return stage.scatter_(1, column, selection.stage)[:, :patches]


def _parts(grid: Tensor) -> list[Tensor]:
    if grid.numel() <= MAX_PATCHES:
        return [grid]
    longer = 0 if grid.shape[0] >= grid.shape[1] else 1
    return [part for half in grid.tensor_split(2, dim=longer) for part in _parts(half)]


def _share(count: int, sizes: list[int]) -> list[int]:
    """Share `count` patches by size: the first grid's share is rounded half up.

    The others share the rest, where it does not go evenly by the largest remainder.
    """
    first = (2 * count * sizes[0] + sum(sizes)) // (2 * sum(sizes))
    others, rest = sizes[1:], count - first
    if not others:
        return [first]
    shares = [rest * size // sum(others) for size in others]
    by_remainder = sorted(range(len(others)), key=lambda i: -(rest * others[i] % sum(others)))
    for i in by_remainder[: rest - sum(shares)]:
        shares[i] += 1
    return [first, *shares]


def _legal(count: int, sizes: list[int]) -> bool:
    """Whether each grid gets a patch for the whole grid as a window and one besides, or all."""
    return all(n >= min(2, size) for n, size in zip(_share(count, sizes), sizes, strict=True))


def _config(grid: Tensor, share: int) -> PruneConfig | None:
    """The rule for one grid, None where it is kept whole."""
    if share == grid.numel():
        return None
    height, width = grid.shape
    # A grid of one row has no two regions above each other.
    return PruneConfig(grid=(height, width), regions=(min(2, height), min(2, width)), budget=share)


def _best_config(grid: Tensor, share: int) -> PruneConfig | None:
    """The rule that keeps the best of a grid, None where it is kept whole."""
    if share == grid.numel():
        return None
    height, width = grid.shape
    return best_of_all((height, width), share)
