"""What to keep: the pruning rule of HIVTP (arXiv 2509.23663) as integers, computed once."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from itertools import pairwise
from typing import NamedTuple

MAX_PATCHES = 4096
DEFAULT_RATIO = 0.25
DEFAULT_WINDOW = (2, 2)


class Rule(NamedTuple):
    """The integers that every backend's selection takes; `PruneConfig.rule` makes them."""

    grid: tuple[int, int]
    regions: tuple[int, int]
    window: tuple[int, int]
    quotas: tuple[int, ...]
    capacity: int
    fill: bool


@dataclass(frozen=True)
class PruneConfig:
    """Which patches of a grid to keep (HIVTP, arXiv 2509.23663, global and local stage).

    Parameters
    ----------
    grid : (int, int)
        Rows and columns of patches, `(H, W)`; `H * W <= 4096`.
    regions : (int, int)
        The global stage divides the grid into `(Ry, Rx)` regions; patch `(y, x)` lies in region
        `(y * Ry // H, x * Rx // W)`. `1 <= Ry <= H`, `1 <= Rx <= W`.
    ratio : float, optional
        Ratio mode, the paper's: each region keeps `floor(ratio * area)` patches. In `[0, 1]`;
        0.25 where neither `ratio` nor `budget` is given. How many patches are kept then depends
        on the scores, `capacity` at most.
    window : (int, int), optional
        The local stage keeps the best remaining patch of each `(wy, wx)` window, tiled from the
        top-left; windows at the right and bottom edge may be partial. `(2, 2)` in ratio mode, in
        budget mode the smallest square with `2 * windows <= budget`.
    budget : int or float, optional
        Budget mode: exactly this many patches of every image. A float `0 < f < 1` means
        `floor(f * H * W)`. At least the number of windows, at most `H * W`.

    Attributes
    ----------
    quotas : tuple of int
        Patches that the global stage keeps of each region, in raster order of the regions.
    capacity : int
        The most patches that one image can keep: the width of `Selection.indices`. In budget mode
        the exact number.
    rule : Rule
        All of it as integers, as the backends take it.

    Raises
    ------
    TypeError, ValueError
        Naming the argument, what came and what is legal.

    Notes
    -----
    After construction `ratio`, `window` and `budget` hold the resolved values. To change the budget
    with `dataclasses.replace`, pass `window=None` as well if it is to be chosen anew.
    """

    grid: tuple[int, int] = (24, 24)
    regions: tuple[int, int] = (2, 2)
    ratio: float | None = None
    window: tuple[int, int] | None = None
    budget: int | float | None = None
    quotas: tuple[int, ...] = field(init=False, repr=False, compare=False)
    capacity: int = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        grid = _pair("grid", self.grid)
        height, width = grid
        if height * width > MAX_PATCHES:
            raise ValueError(f"grid must hold at most {MAX_PATCHES} patches, got {grid}")
        regions = _pair("regions", self.regions)
        if regions[0] > height or regions[1] > width:
            raise ValueError(f"regions must be between (1, 1) and the grid {grid}, got {regions}")
        if self.ratio is not None and self.budget is not None:
            raise ValueError(
                f"ratio and budget exclude each other, got ratio={self.ratio!r} and "
                f"budget={self.budget!r}"
            )
        window = None if self.window is None else _pair("window", self.window)
        if window is not None and max(window) > max(grid):
            raise ValueError(f"window must be between (1, 1) and {(max(grid),) * 2}, got {window}")
        areas = _region_areas(grid, regions)
        if self.budget is None:
            ratio = DEFAULT_RATIO if self.ratio is None else _ratio(self.ratio)
            window = window or (min(DEFAULT_WINDOW[0], height), min(DEFAULT_WINDOW[1], width))
            quotas = tuple(math.floor(ratio * area) for area in areas)
            capacity = min(height * width, sum(quotas) + _window_count(grid, window))
            self._resolve(ratio=ratio)
        else:
            capacity, window = _budget(self.budget, grid, window)
            quotas = _share(capacity - _window_count(grid, window), areas)
            self._resolve(budget=capacity)
        self._resolve(grid=grid, regions=regions, window=window, quotas=quotas, capacity=capacity)

    def _resolve(self, **values: object) -> None:
        for name, value in values.items():
            object.__setattr__(self, name, value)

    @property
    def rule(self) -> Rule:
        """The rule as the integers that `torch.ops.hivtp` takes."""
        assert self.window is not None
        fill = self.budget is not None
        return Rule(self.grid, self.regions, self.window, self.quotas, self.capacity, fill)


def region_bounds(extent: int, regions: int) -> list[tuple[int, int]]:
    """Half-open ranges of the coordinates `y` with `y * regions // extent == r`, for each `r`."""
    starts = [-(-r * extent // regions) for r in range(regions + 1)]
    return list(pairwise(starts))


def _region_areas(grid: tuple[int, int], regions: tuple[int, int]) -> list[int]:
    rows, columns = (
        [stop - start for start, stop in region_bounds(extent, count)]
        for extent, count in zip(grid, regions, strict=True)
    )
    return [height * width for height in rows for width in columns]


def _window_count(grid: tuple[int, int], window: tuple[int, int]) -> int:
    return math.ceil(grid[0] / window[0]) * math.ceil(grid[1] / window[1])


def _share(total: int, areas: list[int]) -> tuple[int, ...]:
    """Share `total` in proportion to `areas`: largest remainder, ties to the lower region."""
    patches = sum(areas)
    quotas = [total * area // patches for area in areas]
    by_remainder = sorted(range(len(areas)), key=lambda r: -(total * areas[r] % patches))
    for region in by_remainder[: total - sum(quotas)]:
        quotas[region] += 1
    return tuple(quotas)


def _budget(
    budget: int | float, grid: tuple[int, int], window: tuple[int, int] | None
) -> tuple[int, tuple[int, int]]:
    patches = grid[0] * grid[1]
    legal = f"an integer from 1 to {patches}, or a float strictly between 0 and 1"
    if isinstance(budget, bool) or not isinstance(budget, int | float):
        raise TypeError(f"budget must be {legal}, got {budget!r}")
    if isinstance(budget, float):
        if not 0 < budget < 1:
            raise ValueError(f"budget must be {legal}, got {budget!r}")
        count = math.floor(budget * patches)
    else:
        count = budget
    if count > patches:
        raise ValueError(f"budget must be at most the {patches} patches of the grid, got {count}")
    if window is None:
        squares = ((side, side) for side in range(1, max(grid) + 1))
        window = next((w for w in squares if 2 * _window_count(grid, w) <= count), None)
        if window is None:
            raise ValueError(
                f"budget must be at least 2 where no window is given, or 1 with window={grid}, "
                f"got {budget!r}"
            )
    windows = _window_count(grid, window)
    if count < windows:
        raise ValueError(
            f"budget must be at least {windows}, one patch for each {window[0]} x {window[1]} "
            f"window of the {grid[0]} x {grid[1]} grid, got {budget!r}"
        )
    return count, window


def _ratio(ratio: float) -> float:
    if isinstance(ratio, bool) or not isinstance(ratio, int | float):
        raise TypeError(f"ratio must be a number in [0, 1], got {ratio!r}")
    if not 0 <= ratio <= 1:
        raise ValueError(f"ratio must be in [0, 1], got {ratio!r}")
    return float(ratio)


def _pair(name: str, value: tuple[int, int]) -> tuple[int, int]:
    legal = f"{name} must be two positive integers (rows, columns), got {value!r}"
    if not isinstance(value, tuple | list) or len(value) != 2:
        raise TypeError(legal)
    if any(isinstance(v, bool) or not isinstance(v, int) for v in value):
        raise TypeError(legal)
    if min(value) < 1:
        raise ValueError(legal)
    return value[0], value[1]
