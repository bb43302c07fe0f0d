from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest

from hivtp_kernels import PruneConfig
from hivtp_kernels.backends._quotas import quota_classes
from hivtp_kernels.config import apportion, resolve_budget
from hivtp_kernels.types import MAX_PATCHES


def region_of(config):
    """Region number of every patch, from the definition."""
    (height, width), (rows, columns) = config.grid, config.regions
    y, x = np.divmod(np.arange(height * width), width)
    return y * rows // height * columns + x * columns // width


def test_the_papers_setting_on_24x24():
    config = PruneConfig()
    assert config.ratio is None or config.ratio == 0.25
    assert config.window == (2, 2)
    assert config.quotas == (36, 36, 36, 36)
    assert config.capacity == 288


@pytest.mark.parametrize(
    ("budget", "window"), [(288, (2, 2)), (192, (3, 3)), (128, (3, 3)), (64, (5, 5))]
)
def test_default_window_of_a_budget(budget, window):
    config = PruneConfig(budget=budget)
    assert config.window == window
    assert config.capacity == budget
    windows = (-(-24 // window[0])) ** 2
    assert sum(config.quotas) == budget - windows


@pytest.mark.parametrize("ratio", [0, 0.1, 0.25, 1 / 3, 0.29, 1])
@pytest.mark.parametrize(
    ("grid", "regions"), [((24, 24), (2, 2)), ((27, 27), (3, 2)), ((5, 9), (5, 9))]
)
def test_ratio_quotas_are_floors_of_each_area(grid, regions, ratio):
    config = PruneConfig(grid=grid, regions=regions, ratio=ratio)
    areas = np.bincount(region_of(config), minlength=regions[0] * regions[1])
    assert config.quotas == tuple(int(np.floor(np.float64(ratio) * a)) for a in areas)


@pytest.mark.parametrize("budget", [130, 147, 200, 365, 729])
@pytest.mark.parametrize("regions", [(1, 1), (2, 2), (3, 2), (4, 5), (27, 27)])
def test_budget_quotas_are_shared_by_largest_remainder(regions, budget):
    config = PruneConfig(grid=(27, 27), regions=regions, budget=budget, window=(3, 3))
    areas = np.bincount(region_of(config))
    fair = [Fraction(budget - 81) * int(area) / 729 for area in areas]
    floors = [int(f) for f in fair]
    extra = sorted(range(len(fair)), key=lambda r: (floors[r] - fair[r], r))
    for region in extra[: budget - 81 - sum(floors)]:
        floors[region] += 1
    assert config.quotas == tuple(floors)


def test_every_config_packs_into_eight_integers():
    rng = np.random.default_rng(0)
    for _ in range(300):
        grid = tuple(int(n) for n in rng.integers(1, 65, 2))
        regions = tuple(int(rng.integers(1, n + 1)) for n in grid)
        patches = grid[0] * grid[1]
        if rng.random() < 0.5 or patches < 2:
            config = PruneConfig(grid=grid, regions=regions, ratio=float(rng.random()))
        else:
            config = PruneConfig(
                grid=grid, regions=regions, budget=int(rng.integers(2, patches + 1))
            )
        base, cut = quota_classes(config.params)
        rows, columns = regions
        for region, quota in enumerate(config.quotas):
            row, column = divmod(region, columns)
            height = sum(y * rows // grid[0] == row for y in range(grid[0]))
            width = sum(x * columns // grid[1] == column for x in range(grid[1]))
            tall, wide = height > grid[0] // rows, width > grid[1] // columns
            assert base[2 * tall + wide] + (region < cut[2 * tall + wide]) == quota


def test_a_fractional_budget_counts_the_whole_grid():
    assert PruneConfig(budget=0.33).budget == 190
    assert PruneConfig(budget=0.33) == PruneConfig(budget=190)
    # 0.29 * 100 is 28.999999999999996 in binary64.
    assert PruneConfig(grid=(10, 10), budget=0.29).budget == 29


@pytest.mark.parametrize(
    ("share", "total", "expected"),
    [
        (0.29, 100, 29),
        (0.57, 100, 57),
        (0.33, 576, 190),
        (1 / 3, 576, 192),
        (0.5, 7, 3),
        ((576 - 1e-10) / 576, 576, 576),
        ((576 - 1e-8) / 576, 576, 575),
        ((3 + 1e-10) / 576, 576, 3),
        (1e-6, 576, 0),
    ],
)
def test_a_share_of_almost_an_integer_is_that_integer(share, total, expected):
    assert resolve_budget(share, total) == expected


def test_a_count_stays_as_it_is():
    assert resolve_budget(1, 576) == 1
    assert resolve_budget(600, 576) == 600


@pytest.mark.parametrize("wrong", [True, "64", None, 0, -5, 0.0, 1.0, 64.0, float("nan"), -0.5])
def test_a_budget_that_is_neither_a_count_nor_a_share(wrong):
    error = ValueError if type(wrong) in (int, float) else TypeError
    message = "tokens must be a positive integer, or a float strictly between 0 and 1, got "
    with pytest.raises(error, match=message + repr(wrong)):
        resolve_budget(wrong, 576, "tokens")


@pytest.mark.parametrize(
    ("total", "areas", "expected"),
    [
        (10, [1, 1, 1], (4, 3, 3)),
        (11, [1, 1, 1], (4, 4, 3)),
        (5, [2, 3, 5], (1, 2, 2)),
        (0, [4, 4], (0, 0)),
        (7, (576, 1), (7, 0)),
        (9, [3], (9,)),
    ],
)
def test_apportion(total, areas, expected):
    assert apportion(total, areas) == expected


def test_budgets_at_both_ends():
    assert PruneConfig(budget=2).window == (24, 24)
    assert PruneConfig(budget=1, window=(24, 24)).capacity == 1
    assert PruneConfig(budget=576).capacity == 576


def test_the_default_window_fits_a_narrow_grid():
    config = PruneConfig(grid=(1, 5), regions=(1, 1))
    assert config.window == (1, 2)
    assert replace(config, regions=(1, 5)).window == (1, 2)


def test_it_is_a_value():
    config = PruneConfig(grid=[24, 24])
    assert hash(config) == hash(PruneConfig())
    with pytest.raises(AttributeError):
        config.budget = 3


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"grid": (24,)}, TypeError, r"grid must be two positive integers .* got \(24,\)"),
        ({"grid": (24.0, 24)}, TypeError, "grid must be two positive integers"),
        ({"grid": (0, 24)}, ValueError, "grid must be two positive integers"),
        (
            {"grid": (1, MAX_PATCHES + 1)},
            ValueError,
            f"grid must hold at most {MAX_PATCHES} patches",
        ),
        ({"regions": (25, 1)}, ValueError, r"regions must be between \(1, 1\) and the grid"),
        ({"regions": (0, 1)}, ValueError, "regions must be two positive integers"),
        ({"window": (True, 1)}, TypeError, "window must be two positive integers"),
        ({"window": (25, 1)}, ValueError, r"window must be between \(1, 1\) and \(24, 24\)"),
        ({"ratio": 1.01}, ValueError, r"ratio must be in \[0, 1\], got 1.01"),
        ({"ratio": float("nan")}, ValueError, r"ratio must be in \[0, 1\], got nan"),
        ({"ratio": True}, TypeError, "ratio must be a number"),
        ({"ratio": 0.25, "budget": 64}, ValueError, "ratio and budget exclude each other"),
        ({"budget": True}, TypeError, "budget must be a positive integer"),
        ({"budget": "64"}, TypeError, "budget must be a positive integer"),
        ({"budget": 1.0}, ValueError, "strictly between 0 and 1, got 1.0"),
        ({"budget": 577}, ValueError, "at most the 576 patches of the grid, got 577"),
        ({"budget": 1}, ValueError, "budget must be at least 2 if no window is given"),
        ({"budget": -5}, ValueError, "budget must be a positive integer, .*, got -5"),
        ({"budget": 143, "window": (2, 2)}, ValueError, "at least 144, one patch for each 2 x 2"),
    ],
)
def test_bad_input(arguments, error, message):
    with pytest.raises(error, match=message):
        PruneConfig(**arguments)
