"""One policy for all families: how many units of each grid stay, and which."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from hivtp_kernels import PruneConfig, Selection, select_tokens
from hivtp_kernels.config import apportion, resolve_budget
from hivtp_kernels.types import GLOBAL, MAX_PATCHES

from ..layout import Image, first_units
from .methods import METHODS, Evidence, Method, best

if TYPE_CHECKING:
    from ..families import Family


class Share(NamedTuple):
    """What is kept of one grid: the best of `units`, or what `config` keeps of them.

    Attributes
    ----------
    units : Tensor
        int64 `[H, W]` on the CPU.
    shown : Tensor
        bool `[H, W]` on the CPU: which of them have a position.
    kept : int
        How many of these stay; in ratio mode an upper bound.
    config : PruneConfig or None
        Regions and windows. None: a ranking, or all of them.
    """

    units: Tensor
    shown: Tensor
    kept: int
    config: PruneConfig | None


class Sources(NamedTuple):
    """Where a plan gets what its method needs, as functions that run only if asked.

    Attributes
    ----------
    attention : callable
        Returns fp32 `[all units]`.
    pixels : callable
        Returns the encoder's input, image after image.
    features : callable
        Returns `[all units, C]`.
    """

    attention: Callable[[], Tensor]
    pixels: Callable[[], Tensor]
    features: Callable[[], Tensor]


class Policy:
    """How the images of a model are pruned: by ratio, or to a budget.

    Parameters
    ----------
    family : Family
        Whose images they are.
    config : PruneConfig, optional
        Ratio mode; or a budget with regions and windows, for families of one grid per image.
    budget : int or float, optional
        Positions of each image to keep, newlines included where they stay, or a share of them.
    newline : {"keep", "drop"}
        Whether learned newlines stay.
    method : str
        A name in `METHODS`.

    Raises
    ------
    TypeError, ValueError
        If an argument is not legal for the family; the message names it.
    """

    def __init__(
        self,
        family: Family,
        config: PruneConfig | None = None,
        budget: int | float | None = None,
        newline: str = "keep",
        method: str = "hivtp",
    ) -> None:
        if newline not in ("keep", "drop"):
            raise ValueError(f"newline must be 'keep' or 'drop', got {newline!r}")
        if newline == "drop" and not family.has_newlines:
            raise ValueError(
                f"newline must be 'keep' for {family.config.model_type}, which has no newlines, "
                f"got {newline!r}"
            )
        if not isinstance(method, str) or method not in METHODS:
            raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
        if config is not None and budget is not None:
            raise ValueError(
                f"config and budget exclude each other, got config={config!r} and budget={budget!r}"
            )
        self.method: Method = METHODS[method]
        if budget is not None:
            resolve_budget(budget, 1)
        elif self.method.has_ratio_mode:
            config = _check_config(config, family)
        elif config is not None:
            raise ValueError(
                f"config must be None with method={method!r}, which has no regions and windows, "
                f"got {config!r}: pass budget="
            )
        else:
            raise ValueError(f"budget must be given with method={method!r}, which keeps exactly it")
        self.family = family
        self.config = config
        self.budget = config.budget if config is not None else budget
        self.keeps_newlines = newline == "keep"
        self._known: dict[int, tuple[Image, list[Share]]] = {}

    @property
    def exact(self) -> bool:
        """Whether `count` is the number, known beforehand, and not an upper bound."""
        return self.budget is not None

    @property
    def keeps_all(self) -> bool:
        """Whether no position of any image is dropped."""
        if self.config is not None and self.config.budget is None:
            height, width = self.config.grid
            return self.keeps_newlines and sum(self.config.quotas) == height * width
        return self.family.one_grid and self.unpruned(self.family.image())

    def unpruned(self, image: Image) -> bool:
        """Whether the budget is a number of all positions or more, so that an image stays whole."""
        return isinstance(self.budget, int) and self.budget >= len(image.positions)

    def keeps_newlines_of(self, image: Image) -> bool:
        """Whether the newlines of an image stay."""
        return self.keeps_newlines or self.unpruned(image)

    def count(self, image: Image, name: str = "an image") -> int:
        """How many positions of an image stay, newlines included where they do.

        Exact with a budget, otherwise an upper bound. Raises a ValueError if the budget is a number
        below the smallest that the image can have; the message calls the image by `name`.
        """
        newlines = image.newlines if self.keeps_newlines_of(image) else 0
        return sum(share.kept for share in self.shares(image, name)) + newlines

    def least(self, image: Image) -> int:
        """The smallest legal budget of an image: its newlines where they stay, and a unit per grid.

        A method that ranks the whole image needs only one unit.
        """
        newlines = image.newlines if self.keeps_newlines else 0
        return newlines + (len(image.grids) if self.method.scope == "grid" else 1)

    def shares(self, image: Image, name: str = "an image") -> list[Share]:
        """What is kept of each grid of an image."""
        if not self.exact:
            grids = self.family.ratio_grids(image)
            return [_by_ratio(image, part, self.config) for grid in grids for part in _parts(grid)]
        units = self._units_of_budget(image, name)
        if self.config is not None:
            (grid,) = image.grids
            shown = image.shown(grid)
            unshown = grid.numel() - int(shown.sum())
            return [Share(grid, shown, units, _with_budget(self.config, units + unshown))]
        if self.method.scope == "image":
            competing = torch.cat([grid[image.shown(grid)] for grid in image.grids])[None]
            return [Share(competing, torch.ones_like(competing, dtype=torch.bool), units, None)]
        return self._shares_of_grids(image, units)

    def plan(self, images: Sequence[Image]) -> Plan:
        """Return what is known before the encoder runs. Raises a ValueError as `count` does."""
        shares = [self._known_shares(image, f"image {n}") for n, image in enumerate(images)]
        return Plan(self.method, images, shares, self.exact)

    def _known_shares(self, image: Image, name: str) -> list[Share]:
        # Images that are alike are one object, in this call and the next.
        known = self._known.get(id(image))
        if known is None or known[0] is not image:  # as after a deep copy
            if len(self._known) >= 256:
                self._known.clear()
            known = self._known[id(image)] = image, self.shares(image, name)
        return known[1]

    def _shares_of_grids(self, image: Image, units: int) -> list[Share]:
        shown = [image.shown(grid) for grid in image.grids]
        counts = _at_least_one_each(units, [int(mask.sum()) for mask in shown])
        shares = []
        for grid, count in zip(image.grids, counts, strict=True):
            parts = [(part, image.shown(part)) for part in _parts(grid)]
            areas = [int(mask.sum()) for _, mask in parts]
            for (part, mask), area, kept in zip(parts, areas, apportion(count, areas), strict=True):
                shape = (part.shape[0], part.shape[1])
                prunes = 0 < kept < area
                unshown = part.numel() - area
                config = self.method.config(shape, kept + unshown) if prunes else None
                shares.append(Share(part, mask, kept, config))
        return shares

    def _units_of_budget(self, image: Image, name: str) -> int:
        newlines = image.newlines if self.keeps_newlines else 0
        units = len(image.positions) - image.newlines
        positions, least = units + newlines, self.least(image)
        assert self.budget is not None
        count = resolve_budget(self.budget, positions)
        if isinstance(self.budget, float):
            count = max(count, least)
        elif count < min(least, positions):
            shapes = Counter(f"{grid.shape[0]} x {grid.shape[1]}" for grid in image.grids)
            grids = " and ".join(f"{n} grids of {s}" if n > 1 else s for s, n in shapes.items())
            raise ValueError(
                f"budget must be at least {least} for {name}, which has {positions} visual "
                f"positions ({grids} units, {newlines} newlines), got {self.budget!r}"
            )
        return min(count, positions) - newlines


class Plan:
    """What is known of a call before the encoder runs, and then which units stay.

    Call `prepare` before the encoder runs, and `select` or `scores` after it.

    Attributes
    ----------
    units : list of int or None
        How many units of each image stay; None if only the scores decide.
    single_config : PruneConfig or None
        The config by which all units are pruned, if they are one grid after another; None if not.
    """

    def __init__(
        self, method: Method, images: Sequence[Image], shares: list[list[Share]], exact: bool
    ) -> None:
        self._total = sum(image.units for image in images)
        self.units = [sum(share.kept for share in own) for own in shares] if exact else None
        self._method = method
        self._images = images
        self._contests: list[_Contest] = []
        whole, unshown = [], []
        batches: dict[PruneConfig, list[Tensor]] = {}
        for index, (first, own) in enumerate(zip(first_units(images), shares, strict=True)):
            for units, shown, kept, config in own:
                competing = units[shown] + first
                if exact and kept == len(competing):
                    whole.append(competing)
                    continue
                if config is not None:
                    batches.setdefault(config, []).append(units.flatten() + first)
                    if exact and len(competing) < units.numel():
                        unshown.append(units[~shown] + first)
                if config is None or method.own_scores:
                    shape = (units.shape[0], units.shape[1])
                    ranked = config is None
                    contest = _Contest(index, shape, kept, units.flatten(), competing, ranked)
                    self._contests.append(contest)
        self._whole = torch.cat(whole) if whole else None
        self._unshown = torch.cat(unshown) if unshown else None
        self._batches = {config: torch.stack(units) for config, units in batches.items()}
        self._scores: Tensor | None = None
        self.single_config = self._find_single_config()

    def prepare(self, device: torch.device) -> Plan:
        """Move to the device that encodes: after the encoder, a copy from the host waits for it.

        Scores that come from nothing the encoder makes are computed here.
        """
        self._whole = None if self._whole is None else self._whole.to(device)
        self._unshown = None if self._unshown is None else self._unshown.to(device)
        self._batches = {config: units.to(device) for config, units in self._batches.items()}
        self._contests = [
            own._replace(units=own.units.to(device), competing=own.competing.to(device))
            for own in self._contests
        ]
        self._stage = torch.zeros(self._total, dtype=torch.int8, device=device)
        if not self._method.needs:
            self._scores = self._own_scores(None)
        return self

    def select(self, sources: Sources, backend: str) -> Tensor:
        """Return the stage of each unit, int8 `[all units]`, as `Selection.stage`; 0 is dropped.

        Units without a position may be of any stage.
        """
        stage = self._stage
        if self._whole is not None:
            stage = stage.index_fill(0, self._whole, GLOBAL)
        if not self._batches and not self._contests:
            return stage
        scores = self.scores(sources)
        for contest in self._contests:
            if contest.ranked:
                chosen = best(scores[contest.competing], contest.kept)
                stage = stage.index_fill(0, contest.competing[chosen], GLOBAL)
        if self._unshown is not None:
            # Always selected, so that the count of the others is exact.
            scores = scores.index_fill(0, self._unshown, torch.inf)
        for config, units in self._batches.items():
            selection = select_tokens(scores[units], config, backend=backend)
            stage = stage.scatter(0, units.flatten(), by_unit(selection).flatten())
        return stage

    def scores(self, sources: Sources) -> Tensor:
        """Return the score of each unit, fp32 `[all units]`; 0 where the method gives none."""
        if not self._method.own_scores:
            return sources.attention()
        return self._own_scores(sources) if self._scores is None else self._scores

    def _own_scores(self, sources: Sources | None) -> Tensor:
        needs, first = self._method.needs, first_units(self._images)
        attention = sources.attention() if sources and "attention" in needs else None
        features = sources.features() if sources and "features" in needs else None
        tiles = [image.tiles for image in self._images]
        pixels = sources.pixels().split(tiles) if sources and "pixels" in needs else None
        scores = torch.zeros(self._total, device=self._stage.device)
        for image, shape, kept, units, *_ in self._contests:
            at = units + first[image]
            evidence = Evidence(
                shape,
                kept,
                units,
                None if attention is None else attention[at],
                None if pixels is None else pixels[image],
                None if features is None else features[at],
            )
            scores.index_copy_(0, at, self._method.scores(evidence))
        return scores

    def _find_single_config(self) -> PruneConfig | None:
        if self._whole is not None or self._unshown is not None or self._contests:
            return None
        if len(self._batches) != 1:
            return None
        ((config, units),) = self._batches.items()
        in_order = torch.arange(self._total)
        return config if torch.equal(units.flatten(), in_order) else None


class _Contest(NamedTuple):
    """Units of one image among which `kept` are chosen.

    `units` are numbered within the image, `competing`, those with a position, within the call.
    """

    image: int
    shape: tuple[int, int]
    kept: int
    units: Tensor
    competing: Tensor
    ranked: bool


def by_unit(selection: Selection) -> Tensor:
    """The stage of each unit of each grid, int8 `[B, H * W]`."""
    units = selection.grid[0] * selection.grid[1]
    # Padding lands in a column after the last unit, which is cut off.
    column = torch.where(selection.indices < 0, units, selection.indices).long()
    stage = selection.stage.new_zeros(len(column), units + 1)
    return stage.scatter_(1, column, selection.stage)[:, :units]


def _check_config(config: PruneConfig | None, family: Family) -> PruneConfig:
    if config is None:
        return PruneConfig(grid=family.grid)
    if not isinstance(config, PruneConfig):
        raise TypeError(f"config must be a hivtp_kernels.PruneConfig, got {type(config).__name__}")
    if config.grid != family.grid:
        raise ValueError(f"config must have the grid of a tile {family.grid}, got {config.grid}")
    if config.budget is not None and not family.one_grid:
        raise ValueError(
            f"config must be in ratio mode for {family.config.model_type}, whose budget is shared "
            f"by all grids of an image, got {config!r}: pass apply(..., budget={config.budget})"
        )
    return config


def _by_ratio(image: Image, grid: Tensor, config: PruneConfig | None) -> Share:
    assert config is not None
    on_grid, shown = _on_grid(config, (grid.shape[0], grid.shape[1])), image.shown(grid)
    return Share(grid, shown, min(on_grid.capacity, int(shown.sum())), on_grid)


def _at_least_one_each(count: int, areas: list[int]) -> list[int]:
    """Share `count` in proportion to `areas`; what has none takes from the largest share."""
    shares = list(apportion(count, areas))
    for empty in [i for i, share in enumerate(shares) if share == 0]:
        shares[shares.index(max(shares))] -= 1
        shares[empty] = 1
    return shares


def _parts(grid: Tensor) -> list[Tensor]:
    """Halve a grid of more units than a selection takes along its longer side, until none is."""
    if grid.numel() <= MAX_PATCHES:
        return [grid]
    longer = 0 if grid.shape[0] >= grid.shape[1] else 1
    return [part for half in grid.tensor_split(2, dim=longer) for part in _parts(half)]


@lru_cache(maxsize=1024)
def _with_budget(config: PruneConfig, budget: int) -> PruneConfig:
    return dataclasses.replace(config, budget=budget)


@lru_cache(maxsize=1024)
def _on_grid(config: PruneConfig, shape: tuple[int, int]) -> PruneConfig:
    """The ratio, regions and windows of `config` on a grid of another shape."""
    if shape == config.grid:
        return config
    assert config.window is not None
    return PruneConfig(
        grid=shape,
        regions=(min(config.regions[0], shape[0]), min(config.regions[1], shape[1])),
        window=(min(config.window[0], shape[0]), min(config.window[1], shape[1])),
        ratio=config.ratio,
    )
