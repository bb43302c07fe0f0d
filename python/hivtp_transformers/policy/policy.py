"""One policy for all families: how many units of each grid stay, and which."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hivtp_kernels import PruneConfig, Selection, select_tokens
from hivtp_kernels.config import apportion, resolve_budget
from hivtp_kernels.types import GLOBAL, MAX_PATCHES

from ..layout import Image, first_units
from .methods import METHODS, Evidence, Method, best


class Share(NamedTuple):
    """What is kept of one grid: the best of `units`, or what `config` keeps of them.

    Attributes
    ----------
    units : Tensor
        int64 `[H, W]` on the CPU.
    kept : int
        How many of the units that have a position stay; in ratio mode an upper bound.
    config : PruneConfig or None
        Regions and windows. None: a ranking, or all of them.
    """

    units: Tensor
    kept: int
    config: PruneConfig | None


class _Contest(NamedTuple):
    """Units of one image among which `kept` are chosen.

    `units` are numbered within the image, `competing`, those with a position, within the call.
    """

    image: int
    shape: tuple[int, int]
    kept: int
    units: Tensor
    competing: Tensor
    ranked: bool = True


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
        family: Any,
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
        if method not in METHODS:
            raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
        if config is not None and budget is not None:
            raise ValueError(
                f"config and budget exclude each other, got config={config!r} and budget={budget!r}"
            )
        self.method: Method = METHODS[method]
        if budget is None and self.method.config((1, 1), 1) is None:
            raise ValueError(f"budget must be given with method={method!r}, which keeps exactly it")
        if budget is None:
            config = _check_config(config, family)
        else:
            resolve_budget(budget, 1)
        self.family = family
        self.config = config
        self.budget = config.budget if config is not None else budget
        self.keeps_newlines = newline == "keep"

    @property
    def exact(self) -> bool:
        """Whether `count` is the number, known beforehand, and not an upper bound."""
        return self.budget is not None

    @property
    def keeps_all(self) -> bool:
        """Whether no unit of any image is dropped."""
        if self.config is not None and self.config.budget is None:
            height, width = self.config.grid
            return sum(self.config.quotas) == height * width
        if not self.family.one_grid or not isinstance(self.budget, int):
            return False
        return self.budget >= len(self.family.image().positions)

    def count(self, image: Image) -> int:
        """How many positions of an image stay, newlines included where they do.

        Exact with a budget, otherwise an upper bound. Raises a ValueError if the budget is a number
        below the smallest that the image can have.
        """
        newlines = image.newlines if self.keeps_newlines else 0
        if self.exact:
            return self._units_of_budget(image) + newlines
        return sum(share.kept for share in self.shares(image)) + newlines

    def least(self, image: Image) -> int:
        """The smallest legal budget of an image: its newlines where they stay, and a unit per grid.

        A method that ranks the whole image needs one unit alone.
        """
        newlines = image.newlines if self.keeps_newlines else 0
        return newlines + (len(image.grids) if self.method.scope == "grid" else 1)

    def shares(self, image: Image) -> list[Share]:
        """What is kept of each grid of an image."""
        if not self.exact:
            return [
                self._share_by_ratio(image, part)
                for grid in self.family.ratio_grids(image)
                for part in _parts(grid)
            ]
        count = self._units_of_budget(image)
        if self.config is not None:
            (grid,) = image.grids
            hidden = grid.numel() - int(image.shown(grid).sum())
            return [Share(grid, count, dataclasses.replace(self.config, budget=count + hidden))]
        if self.method.scope == "image":
            units = torch.cat([grid[image.shown(grid)] for grid in image.grids])
            return [Share(units[None], count, None)]
        shares = []
        counts = _at_least_one(count, [int(image.shown(grid).sum()) for grid in image.grids])
        for grid, of_grid in zip(image.grids, counts, strict=True):
            parts = _parts(grid)
            areas = [int(image.shown(part).sum()) for part in parts]
            for part, area, n in zip(parts, areas, apportion(of_grid, areas), strict=True):
                hidden = part.numel() - area
                shape = (part.shape[0], part.shape[1])
                config = self.method.config(shape, n + hidden) if 0 < n < area else None
                shares.append(Share(part, n, config))
        return shares

    def plan(self, images: Sequence[Image], device: torch.device) -> Plan:
        """Everything that is known before the encoder runs. Raises a ValueError as `count` does."""
        return Plan(self, images, device)

    def _units_of_budget(self, image: Image) -> int:
        newlines = image.newlines if self.keeps_newlines else 0
        units = int((image.positions >= 0).sum())
        positions, least = units + newlines, self.least(image)
        assert self.budget is not None
        count = resolve_budget(self.budget, positions)
        if isinstance(self.budget, float):
            count = max(count, least)
        elif count < min(least, positions):
            shapes = " and ".join(f"{grid.shape[0]} x {grid.shape[1]}" for grid in image.grids)
            raise ValueError(
                f"budget must be at least {least} for an image of {positions} visual positions "
                f"({shapes} units, {newlines} newlines), got {self.budget!r}"
            )
        return min(count, positions) - newlines

    def _share_by_ratio(self, image: Image, grid: Tensor) -> Share:
        assert self.config is not None
        config = _on_grid(self.config, (grid.shape[0], grid.shape[1]))
        return Share(grid, min(config.capacity, int(image.shown(grid).sum())), config)


class Plan:
    """What is known of a call before the encoder runs, and then which units stay.

    Attributes
    ----------
    total : int
        Units of all images.
    units : list of int or None
        How many units of each image stay; None if only the scores decide.
    single_config : PruneConfig or None
        The config by which all units are pruned, if they are one grid after another; None if not.
    """

    def __init__(self, policy: Policy, images: Sequence[Image], device: torch.device) -> None:
        shares = [policy.shares(image) for image in images]
        counts = [sum(s.kept for s in of_image) for of_image in shares]
        self.units = counts if policy.exact else None
        self._device = device
        self._images = images
        self.total = sum(image.units for image in images)
        self._method = policy.method
        whole, hidden = [], []
        batches: dict[PruneConfig, list[Tensor]] = {}
        self._contests: list[_Contest] = []
        for index, (first, of_image) in enumerate(zip(first_units(images), shares, strict=True)):
            for units, count, config in of_image:
                shown = images[index].shown(units)
                if policy.exact and count == int(shown.sum()):
                    whole.append(units[shown] + first)
                    continue
                if config is not None:
                    batches.setdefault(config, []).append(units.flatten() + first)
                    if policy.exact:
                        hidden.append(units[~shown] + first)
                if config is None or self.own_scores:
                    shape = (units.shape[0], units.shape[1])
                    competing = (units[shown] + first).to(device)
                    contest = _Contest(index, shape, count, units.flatten().to(device), competing)
                    self._contests.append(contest._replace(ranked=config is None))
        # Handed over before the encoder runs: a copy from the host waits for the device.
        self._whole = torch.cat(whole).to(device) if whole else None
        self._hidden = torch.cat(hidden).to(device) if hidden else None
        stacked = {config: torch.stack(units) for config, units in batches.items()}
        self._batches = {config: units.to(device) for config, units in stacked.items()}
        self.single_config = None
        hides = self._hidden is not None and len(self._hidden)
        if len(stacked) == 1 and not (whole or self._contests or hides):
            ((config, units),) = stacked.items()
            if torch.equal(units.flatten(), torch.arange(self.total)):
                self.single_config = config

    @property
    def needs_encoder(self) -> bool:
        """Whether scores come from what the encoder computes."""
        return bool({"attention", "features"} & self._method.needs)

    @property
    def own_scores(self) -> bool:
        """Whether the method makes its scores itself, and they are not the attention as it is."""
        return type(self._method).scores is not Method.scores

    def select(self, sources: Sources, backend: str) -> Tensor:
        """The stage of each unit, int8 `[all units]`, as in `Selection.stage`; 0 is dropped."""
        stage = torch.zeros(self.total, dtype=torch.int8, device=self._device)
        if self._whole is not None:
            stage.index_fill_(0, self._whole, GLOBAL)
        if not self._batches and not self._contests:
            return stage
        scores = self.scores(sources)
        for contest in self._contests:
            if contest.ranked:
                chosen = best(scores[contest.competing], contest.kept)
                stage.index_fill_(0, contest.competing[chosen], GLOBAL)
        if self._hidden is not None:
            # Units without a position: always selected, so that the count of others is exact.
            scores = scores.index_fill(0, self._hidden, torch.inf)
        for config, units in self._batches.items():
            selection = select_tokens(scores[units], config, backend=backend)
            stage.scatter_(0, units.flatten(), by_unit(selection).flatten())
        return stage

    def scores(self, sources: Sources) -> Tensor:
        """The score of each unit, fp32 `[all units]`; 0 where the method gives none."""
        if not self.own_scores:
            return sources.attention()
        first, needs = first_units(self._images), self._method.needs
        attention = sources.attention() if "attention" in needs else None
        features = sources.features() if "features" in needs else None
        tiles = [image.tiles for image in self._images]
        pixels = sources.pixels().split(tiles) if "pixels" in needs else None
        scores = torch.zeros(self.total, device=self._device)
        for image, shape, count, units, *_ in self._contests:
            at = units + first[image]
            evidence = Evidence(
                shape,
                count,
                units,
                None if attention is None else attention[at],
                None if pixels is None else pixels[image],
                None if features is None else features[at],
            )
            scores.index_copy_(0, at, self._method.scores(evidence))
        return scores


def by_unit(selection: Selection) -> Tensor:
    """The stage of each unit of each grid, int8 `[B, H * W]`."""
    units = selection.grid[0] * selection.grid[1]
    # Padding lands in a column after the last unit, which is cut off.
    column = torch.where(selection.indices < 0, units, selection.indices).long()
    stage = selection.stage.new_zeros(len(column), units + 1)
    return stage.scatter_(1, column, selection.stage)[:, :units]


def _check_config(config: PruneConfig | None, family: Any) -> PruneConfig:
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


def _at_least_one(count: int, areas: list[int]) -> list[int]:
    """Share `count` in proportion to `areas`, one at the least for each."""
    shares = list(apportion(count, areas))
    for empty in [i for i, share in enumerate(shares) if share == 0]:
        shares[shares.index(max(shares))] -= 1
        shares[empty] = 1
    return shares


def _parts(grid: Tensor) -> list[Tensor]:
    """A grid of more units than a selection takes, halved along its longer side until none is."""
    if grid.numel() <= MAX_PATCHES:
        return [grid]
    longer = 0 if grid.shape[0] >= grid.shape[1] else 1
    return [part for half in grid.tensor_split(2, dim=longer) for part in _parts(half)]


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
