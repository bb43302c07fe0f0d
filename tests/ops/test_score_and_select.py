import os
from pathlib import Path

import numpy as np
import oracle
import pytest
import torch

from hivtp_kernels import PruneConfig, attention_scores, score_and_select, select_tokens
from hivtp_kernels.testing import TOLERANCE, random_qk

GOLDEN = np.load(Path(__file__).parents[1] / "data" / "scores_clip_336.npz")
CONFIGS = [
    PruneConfig(grid=(9, 11), regions=(2, 3)),
    PruneConfig(grid=(9, 11), regions=(2, 2), budget=40),
]


def test_golden(backend):
    q, k = (list(torch.from_numpy(GOLDEN[name])) for name in "qk")
    selection = score_and_select(
        q, k, PruneConfig(), rows="all", scale=float(GOLDEN["scale"]), backend=backend
    )
    np.testing.assert_array_equal(selection.indices[0], GOLDEN["indices_all"])


def stages(selection, image, patches):
    stage = np.zeros(patches, dtype=int)
    count = selection.counts[image]
    stage[selection.indices[image, :count]] = selection.stage[image, :count]
    return stage


def outside_the_band(stage, scores, config, tolerance):
    """Count the patches that differ from the fp64 selection, and those beyond rounding.

    The score of a different patch of the global stage must be within `tolerance` of its region's
    cut. If a window's global patches agree, the score of a different winner must be within
    `tolerance` of the fp64 winner's. Windows whose global patches differ, and patches filled in
    after a difference, are consequences.
    """
    (height, width), (rows, columns), (wy, wx) = config.grid, config.regions, config.window
    y, x = np.divmod(np.arange(height * width), width)
    region = y * rows // height * columns + x * columns // width
    window = y // wy * -(-width // wx) + x // wx
    expected = oracle.select(scores, config)
    outside = 0
    for r in np.unique(region):
        members = region == r
        cut = scores[members & (expected == 1)].min(initial=np.inf)
        for patch in np.flatnonzero(members & ((stage == 1) != (expected == 1))):
            outside += abs(scores[patch] - cut) > tolerance * cut
    for w in np.unique(window):
        members = window == w
        if ((stage == 1) == (expected == 1))[members].all():
            winner = scores[members & (expected == 2)]
            chosen = scores[members & (stage == 2)]
            assert len(winner) == len(chosen)
            outside += int((np.abs(chosen - winner) > tolerance * winner).sum())
    return int(((stage > 0) != (expected > 0)).sum()), outside


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("rows", ["cls", "all"])
@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_against_the_oracle(config, rows, dtype, backend):
    q, k = random_qk(3, 3, 2, 100, 64, dtype)
    scores = oracle.attention_scores(q, k, 0.125, rows, 1)
    selection = score_and_select(q, k, config, rows=rows, backend=backend)
    for image in range(3):
        different, outside = outside_the_band(
            stages(selection, image, 99), scores[image], config, TOLERANCE[dtype]
        )
        assert outside == 0
        # All backends compute in fp32 here, so rounding hardly ever changes a patch.
        assert different <= 2


@pytest.mark.parametrize("rows", ["cls", "all"])
def test_the_fused_op_is_score_then_select(rows, backend):
    """On one backend the fused op's scores have the same bits, so nothing may differ."""
    q, k = random_qk(2, 4, 2, 100, 32)
    for config in CONFIGS:
        fused = score_and_select(q, k, config, rows=rows, backend=backend)
        scores = attention_scores(q, k, rows=rows, backend=backend)
        for got, expected in zip(
            fused, select_tokens(scores, config, backend=backend), strict=True
        ):
            assert torch.equal(got, expected) if isinstance(got, torch.Tensor) else got == expected


@pytest.mark.parametrize("rows", ["cls", "all"])
def test_lse(rows, backend):
    q, k = random_qk(2, 2, 2, 100, 32)
    lse = [
        torch.from_numpy(oracle.log_sum_exp(a, b, 0.2)).float() for a, b in zip(q, k, strict=True)
    ]
    with_lse, without = (
        score_and_select(q, k, CONFIGS[0], rows=rows, scale=0.2, lse=x, backend=backend)
        for x in (lse, None)
    )
    assert torch.equal(with_lse.indices, without.indices)


def test_no_image(backend):
    q, k = random_qk(2, 0, 2, 100, 32)
    selection = score_and_select(q, k, CONFIGS[0], backend=backend)
    assert selection.indices.shape == (0, CONFIGS[0].capacity)


def test_a_nan_image_is_selected_by_index(backend):
    q, k = random_qk(1, 2, 1, 100, 16)
    k[0][0] = float("nan")
    selection = score_and_select(q, k, CONFIGS[0], backend=backend)
    stage = oracle.select(np.full(99, np.nan), CONFIGS[0])
    np.testing.assert_array_equal(stages(selection, 0, 99), stage)


@pytest.mark.parametrize("seed", range(int(os.environ.get("HIVTP_RAND_SWEEP", "30")) // 3))
def test_random_sweep(seed, backend):
    rng = np.random.default_rng(seed)
    height, width, prefix = (int(n) for n in rng.integers((1, 1, 0), (13, 13, 6)))
    regions = (int(rng.integers(1, height + 1)), int(rng.integers(1, width + 1)))
    config = PruneConfig((height, width), regions, ratio=float(rng.random()))
    layers, batch, heads, head_dim = (int(n) for n in rng.integers(1, (5, 4, 4, 17)))
    dtype = list(TOLERANCE)[int(rng.integers(3))]
    rows = "cls" if prefix and rng.random() < 0.5 else "all"
    patches = height * width
    q, k = random_qk(layers, batch, heads, prefix + patches, 8 * head_dim, dtype, seed=seed)
    scores = oracle.attention_scores(q, k, (8 * head_dim) ** -0.5, rows, prefix)
    got = attention_scores(q, k, rows=rows, prefix=prefix, backend=backend)
    np.testing.assert_allclose(got, scores, rtol=TOLERANCE[dtype])
    selection = score_and_select(q, k, config, rows=rows, prefix=prefix, backend=backend)
    for image in range(batch):
        stage = stages(selection, image, patches)
        assert outside_the_band(stage, scores[image], config, TOLERANCE[dtype])[1] == 0
