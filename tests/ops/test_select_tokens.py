import os
from pathlib import Path

import numpy as np
import oracle
import pytest
import torch

from hivtp_kernels import PruneConfig, select_tokens

GOLDEN = np.load(Path(__file__).parents[1] / "data" / "select_24x24.npz")
NAN, INF = float("nan"), float("inf")


def check(scores, config, backend):
    """Compare every image with the oracle, bit for bit."""
    scores = torch.as_tensor(scores, dtype=torch.float32)
    selection = select_tokens(scores, config, backend=backend)
    assert selection.grid == config.grid
    assert selection.indices.dtype == selection.counts.dtype == torch.int32
    assert selection.stage.dtype == torch.int8
    for image, row in enumerate(scores.numpy()):
        stage = oracle.select(row, config)
        indices, stages = oracle.pad(stage, config.capacity)
        assert selection.counts[image] == (stage > 0).sum()
        np.testing.assert_array_equal(selection.indices[image], indices)
        np.testing.assert_array_equal(selection.stage[image], stages)
    return selection


def rand(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_golden(backend):
    selection = select_tokens(torch.from_numpy(GOLDEN["scores"]), PruneConfig(), backend=backend)
    np.testing.assert_array_equal(selection.indices, GOLDEN["indices"])
    np.testing.assert_array_equal(selection.counts, GOLDEN["counts"])


@pytest.mark.parametrize(
    "scores",
    [
        torch.zeros(576),
        torch.arange(576.0),
        -torch.arange(576.0),
        rand(576).round(),
        rand(576).bfloat16().float(),
        torch.full((576,), NAN),
        torch.full((576,), -INF),
        torch.where(rand(576) > 0, NAN, rand(576, seed=1)),
        torch.where(rand(576) > 0, NAN, -INF),
        torch.where(rand(576) > 0, INF, rand(576, seed=1)),
        torch.where(rand(576) > 0, 0.0, -0.0),
        torch.where(rand(576) > 0, 0.0, -0.0) + rand(576, seed=2).round(),
        rand(576) * 1e-42,
    ],
    ids=[
        "equal", "up", "down", "few-distinct", "bf16", "nan", "-inf", "some-nan",
        "nan-and--inf", "some-inf", "signed-zeros", "zeros-and-more", "denormal",
    ],
)  # fmt: skip
@pytest.mark.parametrize("budget", [None, 288, 300], ids=["ratio", "budget", "budget-filled"])
def test_adversarial_scores(scores, budget, backend):
    check(scores[None], PruneConfig(budget=budget), backend)


def windows_filled(per_region):
    """Scores whose 36 best patches of each region fill nine windows, or are spread over 36."""
    scores = rand(576, seed=3).sigmoid().view(24, 24)
    for top in (0, 12):
        for left in (0, 12):
            tile = scores[top : top + 12, left : left + 12]
            if per_region == 252:
                tile[:6, :6] += 10
            else:
                tile[::2, ::2] += 10
    return scores.view(1, 576)


@pytest.mark.parametrize("kept", [252, 288])
def test_adversarial_windows(kept, backend):
    assert check(windows_filled(kept), PruneConfig(), backend).counts.item() == kept


def test_a_budget_fills_what_full_windows_leave(backend):
    selection = check(windows_filled(252), PruneConfig(budget=288), backend)
    assert (selection.stage == 3).sum() == 36


CONFIGS = [
    PruneConfig(ratio=0),
    PruneConfig(ratio=1),
    PruneConfig(budget=2),
    PruneConfig(budget=144, window=(2, 2)),
    PruneConfig(budget=576),
    PruneConfig(budget=1, window=(24, 24), regions=(5, 3)),
    PruneConfig(regions=(24, 24), window=(1, 1)),
    PruneConfig(regions=(5, 7), window=(5, 3), ratio=0.4),
    PruneConfig(grid=(1, 1), regions=(1, 1)),
    PruneConfig(grid=(1, 1), regions=(1, 1), budget=1, window=(1, 1)),
    PruneConfig(grid=(3, 5), regions=(3, 5)),
    PruneConfig(grid=(16, 16), budget=64),
    PruneConfig(grid=(27, 27)),
    PruneConfig(grid=(27, 27), regions=(3, 2), budget=200),
    PruneConfig(grid=(10, 40), regions=(3, 4), window=(3, 7)),
    PruneConfig(grid=(40, 10), budget=30),
    PruneConfig(grid=(64, 64)),
    PruneConfig(grid=(64, 64), regions=(7, 5), budget=1111),
]


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_grids_and_configs(config, backend):
    patches = config.grid[0] * config.grid[1]
    check(rand(2, patches).round(decimals=1), config, backend)


@pytest.mark.parametrize("batch", [0, 1, 3, 7])
def test_batches(batch, backend):
    selection = check(rand(batch, 576), PruneConfig(), backend)
    assert selection.indices.shape == selection.stage.shape == (batch, 288)
    assert selection.counts.shape == (batch,)


def test_strided_scores(backend):
    scores = rand(4, 577)[::2, 1:]
    assert not scores.is_contiguous()
    check(scores, PruneConfig(), backend)


def random_case(rng):
    height, width = (int(n) for n in rng.integers(1, 29, 2))
    regions = (int(rng.integers(1, height + 1)), int(rng.integers(1, width + 1)))
    window = tuple(int(n) for n in rng.integers(1, min(6, max(height, width)) + 1, 2))
    windows = -(-height // window[0]) * -(-width // window[1])
    if rng.random() < 0.5:
        config = PruneConfig((height, width), regions, float(rng.random()), window)
    else:
        budget = int(rng.integers(windows, height * width + 1))
        config = PruneConfig((height, width), regions, window=window, budget=budget)
    scores = rng.standard_normal((int(rng.integers(1, 3)), height * width))
    decimals = int(rng.integers(0, 6))
    return np.where(rng.random(scores.shape) < 0.02, np.nan, scores.round(decimals)), config


@pytest.mark.parametrize("seed", range(int(os.environ.get("HIVTP_RAND_SWEEP", "30"))))
def test_random_sweep(seed, backend):
    check(*random_case(np.random.default_rng(seed)), backend)
