import math
from pathlib import Path

import numpy as np
import oracle
import pytest
import torch

from hivtp_kernels import attention_scores
from hivtp_kernels.backends import NAMES
from hivtp_kernels.testing import TOLERANCE, random_qk
from hivtp_kernels.types import MAX_TOKENS

GOLDEN = np.load(Path(__file__).parents[1] / "data" / "scores_clip_336.npz")
ROWS = ("cls", "all")


def check(scores, expected, dtype=torch.float32):
    assert scores.dtype == torch.float32
    np.testing.assert_allclose(scores.numpy(), expected, rtol=TOLERANCE[dtype])


@pytest.mark.parametrize("rows", ROWS)
def test_golden(rows, backend):
    q, k = (list(torch.from_numpy(GOLDEN[name])) for name in "qk")
    scale = float(GOLDEN["scale"])
    check(
        attention_scores(q, k, rows=rows, scale=scale, backend=backend)[0], GOLDEN[f"scores_{rows}"]
    )
    q, k = ([t.float() for t in tensors] for tensors in (q, k))
    check(
        attention_scores(q, k, rows=rows, scale=scale, backend=backend)[0], GOLDEN[f"scores_{rows}"]
    )


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize(
    "shape",
    [(1, 1, 1, 2, 8), (2, 3, 2, 65, 64), (3, 1, 2, 101, 72), (1, 2, 1, 63, 128), (8, 1, 1, 30, 40)],
    ids=str,
)
def test_shapes_and_dtypes(shape, rows, dtype, backend):
    q, k = random_qk(*shape, dtype=dtype)
    scores = attention_scores(q, k, rows=rows, backend=backend)
    scale = shape[-1] ** -0.5
    check(scores, oracle.attention_scores(q, k, scale, rows, 1), dtype)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("rows", ROWS)
def test_every_head_dim(rows, dtype, backend):
    """With numbers of tokens just below, at and above the tile sizes of the kernels."""
    tokens = (2, 3, 15, 16, 17, 31, 32, 33, 63, 64, 65, 96, 127, 128, 129, 193)
    for head_dim, count in zip(range(8, 129, 8), tokens, strict=True):
        q, k = random_qk(1, 1, 1, count, head_dim, dtype=dtype)
        scores = attention_scores(q, k, rows=rows, backend=backend)
        check(scores, oracle.attention_scores(q, k, head_dim**-0.5, rows, 1), dtype)


def test_one_token(backend):
    q, k = random_qk(2, 2, 2, 1, 8)
    scores = attention_scores(q, k, rows="all", prefix=0, backend=backend)
    check(scores, np.ones((2, 1)))


@pytest.mark.parametrize(
    ("rows", "prefix"), [("cls", 1), ("cls", 5), ("all", 0), ("all", 1), ("all", 5)]
)
def test_prefix(rows, prefix, backend):
    q, k = random_qk(2, 2, 2, 36 + prefix, 16)
    scores = attention_scores(q, k, rows=rows, prefix=prefix, backend=backend)
    check(scores, oracle.attention_scores(q, k, 0.25, rows, prefix))


@pytest.mark.parametrize("rows", ROWS)
def test_lse_saves_the_pass_and_changes_nothing(rows, backend):
    q, k = random_qk(2, 2, 2, 70, 32)
    lse = [
        torch.from_numpy(oracle.log_sum_exp(a, b, 0.1)).float() for a, b in zip(q, k, strict=True)
    ]
    scores = attention_scores(q, k, rows=rows, scale=0.1, lse=lse, backend=backend)
    check(scores, oracle.attention_scores(q, k, 0.1, rows, 1))
    shifted = attention_scores(
        q, k, rows=rows, scale=0.1, lse=[x + math.log(2) for x in lse], backend=backend
    )
    check(shifted, oracle.attention_scores(q, k, 0.1, rows, 1) / 2)


def test_one_cls_row_is_enough(backend):
    q, k = random_qk(2, 2, 3, 50, 64)
    row = [t[:, :, :1] for t in q]
    torch.testing.assert_close(
        attention_scores(row, k, backend=backend),
        attention_scores(q, k, backend=backend),
        rtol=0,
        atol=0,
    )


@pytest.mark.parametrize("rows", ROWS)
def test_strides(rows, backend):
    """Views of a projection's output and layers with different strides give the same scores."""
    q, k = random_qk(2, 2, 3, 50, 32)
    expected = attention_scores(q, k, rows=rows, backend=backend)
    q[0], k[0] = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in (q[0], k[0]))
    k[1] = torch.nn.functional.pad(k[1], (3, 5))[..., 3:-5]
    check(attention_scores(q, k, rows=rows, backend=backend), expected)


@pytest.mark.parametrize("rows", ROWS)
def test_large_logits(rows, backend):
    q, k = random_qk(1, 1, 2, 90, 32, spread=6.0)
    scores = attention_scores(q, k, rows=rows, backend=backend)
    expected = oracle.attention_scores(q, k, 32**-0.5, rows, 1)
    # Logits of +-200 have an fp32 rounding error of 2e-5, which the softmax turns into a relative
    # error of the same size.
    np.testing.assert_allclose(scores.numpy(), expected, rtol=2e-4, atol=1e-7)


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_nan_makes_the_scores_of_its_image_nan(value, rows, backend):
    q, k = random_qk(2, 3, 2, 40, 16)
    clean = attention_scores(q, k, rows=rows, backend=backend)
    k[1][1, 0, 7, 3] = value
    q[1][1, 0, 0, 3] = 1
    scores = attention_scores(q, k, rows=rows, backend=backend)
    assert scores[1].isnan().all()
    assert torch.equal(scores[[0, 2]], clean[[0, 2]])


@pytest.mark.parametrize("rows", ROWS)
def test_keys_that_no_row_attends_to(rows, backend):
    """A logit of -inf has weight 0, even if it fills the first block of keys."""
    q, k = random_qk(1, 1, 2, 200, 16)
    q[0].abs_()
    k[0][:, :, :150] = -float("inf")
    scores = attention_scores(q, k, rows=rows, prefix=1, backend=backend)
    assert (scores[0, :149] == 0).all()
    check(scores[:, 149:], oracle.attention_scores(q, k, 0.25, rows, 1)[:, 149:])


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("batch", [0, 1, 3])
def test_batches(batch, rows, backend):
    q, k = random_qk(1, batch, 2, 26, 16)
    scores = attention_scores(q, k, rows=rows, backend=backend)
    assert scores.shape == (batch, 25)
    if batch:
        check(scores, oracle.attention_scores(q, k, 0.25, rows, 1))


def test_the_longest_sequence(backend):
    q, k = random_qk(1, 1, 1, MAX_TOKENS, 8)
    scores = attention_scores(q, k, rows="cls", prefix=5, backend=backend)
    check(scores, oracle.attention_scores(q, k, 8**-0.5, "cls", 5))


# The torch reference does not promise this.
@pytest.mark.parametrize("backend", [n for n in NAMES if n != "torch"], indirect=True)
@pytest.mark.parametrize("rows", ROWS)
def test_bits_do_not_depend_on_run_or_batch_mates(rows, backend):
    q, k = random_qk(2, 5, 3, 130, 64)
    together = attention_scores(q, k, rows=rows, backend=backend)
    assert torch.equal(together, attention_scores(q, k, rows=rows, backend=backend))
    for image in range(5):
        alone = attention_scores(
            [t[image, None] for t in q], [t[image, None] for t in k], rows=rows, backend=backend
        )
        assert torch.equal(together[image, None], alone)


@pytest.mark.parametrize("rows", ROWS)
def test_precision_settings_change_nothing(rows, backend):
    """Neither autocast nor a lower precision of fp32 products affects the scores."""
    q, k = random_qk(2, 2, 2, 101, 64)
    expected = oracle.attention_scores(q, k, 0.125, rows, 1)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        with torch.autocast("cpu", torch.bfloat16):
            check(attention_scores(q, k, rows=rows, backend=backend), expected)
    finally:
        torch.set_float32_matmul_precision(before)


def test_not_differentiable(backend):
    q, k = random_qk(1, 1, 1, 10, 8)
    q[0].requires_grad_()
    assert not attention_scores(q, k, backend=backend).requires_grad
