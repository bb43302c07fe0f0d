"""What to keep: the configuration of HIVTP (arXiv 2509.23663), resolved to integers once."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from .types import MAX_PATCHES, SelectParams

DEFAULT_RATIO = 0.25
DEFAULT_WINDOW = (2, 2)


@dataclass(frozen=True)
class PruneConfig:
    """Which patches of a grid to keep (HIVTP, arXiv 2509.23663, global and local stage).

    Parameters
    ----------
    grid : (int, int)
        Rows and columns of patches, `(H, W)`; at most `hivtp_kernels.types.MAX_PATCHES` in all.
    regions : (int, int)
        The global stage divides the grid into `(Ry, Rx)` regions; patch `(y, x)` is in region
        `(y * Ry // H, x * Rx // W)`. `1 <= Ry <= H`, `1 <= Rx <= W`.
    ratio : float, optional
        Ratio mode, as in the paper: each region keeps `floor(ratio * area)` patches. In `[0, 1]`;
        0.25 if neither `ratio` nor `budget` is given. The number of kept patches then depends on
        the scores; it is at most `capacity`.
    window : (int, int), optional
        The local stage keeps the best remaining patch of each `(wy, wx)` window, tiled from the
        top-left; windows at the right and bottom edge may be partial. The default is `(2, 2)` in
        ratio mode, and in budget mode the smallest square with `2 * windows <= budget`.
    budget : int or float, optional
        Budget mode: exactly this many patches of every image, at least the number of windows and
        at most `H * W`. A float `0 < f < 1` means `floor(f * H * W)`, except that a product
        within 1e-9 of an integer is that integer.

    Attributes
    ----------
    quotas : tuple of int
        Patches that the global stage keeps per region, in raster order of the regions.
    capacity : int
        The most patches that one image can keep: the width of `Selection.indices`. In budget mode
        the exact number.
    params : SelectParams
        All of this as the integers that the backends take.

    Raises
    ------
    TypeError
        If an argument has the wrong type; the message names it, its value and the accepted values.
    ValueError
        If an argument is out of range, likewise, or both `ratio` and `budget` are given.

    Notes
    -----
    After construction `ratio`, `window` and `budget` hold the resolved values. To change the budget
    with `dataclasses.replace`, pass `window=None` as well to get the default window again.
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
            quotas = apportion(capacity - _window_count(grid, window), areas)
            self._resolve(budget=capacity)
        self._resolve(grid=grid, regions=regions, window=window, quotas=quotas, capacity=capacity)

    def _resolve(self, **values: object) -> None:
        for name, value in values.items():
            object.__setattr__(self, name, value)

    @property
    def params(self) -> SelectParams:
        """The integers that `torch.ops.hivtp` and the backends take."""
        assert self.window is not None
        fill = self.budget is not None
        return SelectParams(self.grid, self.regions, self.window, self.quotas, self.capacity, fill)


def apportion(total: int, areas: Sequence[int]) -> tuple[int, ...]:
    """Share `total` in proportion to `areas`: largest remainder, ties to the lower index."""
    whole = sum(areas)
    shares = [total * area // whole for area in areas]
    by_remainder = sorted(range(len(areas)), key=lambda i: -(total * areas[i] % whole))
    for i in by_remainder[: total - sum(shares)]:
        shares[i] += 1
    return tuple(shares)


def resolve_budget(budget: int | float, total: int, name: str = "budget") -> int:
    """Resolve a budget, a count or a share of `total`, to a count.

    A share `f` is `floor(f * total)`, except that a product within 1e-9 of an integer is that
    integer: `0.29 * 100` is 29. A small share may give 0, and a count may exceed `total`; callers
    decide what that means.

    Raises
    ------
    TypeError, ValueError
        If `budget` is not an integer of at least 1 or a float strictly between 0 and 1.
    """
    legal = "a positive integer, or a float strictly between 0 and 1"
    if isinstance(budget, bool) or not isinstance(budget, int | float):
        raise TypeError(f"{name} must be {legal}, got {budget!r}")
    if isinstance(budget, int) and budget >= 1:
        return budget
    if isinstance(budget, int) or not 0 < budget < 1:
        raise ValueError(f"{name} must be {legal}, got {budget!r}")
    count = budget * total
    nearest = round(count)
    return nearest if abs(count - nearest) <= 1e-9 else math.floor(count)


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


def _budget(
    budget: int | float, grid: tuple[int, int], window: tuple[int, int] | None
) -> tuple[int, tuple[int, int]]:
    patches = grid[0] * grid[1]
    count = resolve_budget(budget, patches)
    if count > patches:
        raise ValueError(f"budget must be at most the {patches} patches of the grid, got {count}")
    if window is None:
        squares = ((side, side) for side in range(1, max(grid) + 1))
        window = next((w for w in squares if 2 * _window_count(grid, w) <= count), None)
        if window is None:
            raise ValueError(
                f"budget must be at least 2 if no window is given, or 1 with window={grid}, "
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
