"""Bad input: each error names the argument, its value and the accepted values."""

import pytest
import torch

from hivtp_kernels import (
    PruneConfig,
    Selection,
    attention_scores,
    gather_tokens,
    pack_tokens,
    score_and_select,
    select_tokens,
)
from hivtp_kernels.types import MAX_HEAD_DIM, MAX_LAYERS, MAX_TOKENS


def t(*shape, dtype=torch.float32, device="cpu"):
    return torch.zeros(shape, dtype=dtype, device=device)


Q = t(2, 3, 10, 16)
WIDE, LONG = t(1, 1, 4, MAX_HEAD_DIM + 8), t(1, 1, MAX_TOKENS + 1, 8)
MANY = MAX_LAYERS + 1


@pytest.mark.parametrize(
    ("q", "k", "options", "error", "message"),
    [
        (None, Q, {}, TypeError, "q must be a tensor or a list of tensors, got NoneType"),
        ([], [], {}, ValueError, f"q must hold 1 to {MAX_LAYERS} layers, got 0"),
        ([Q] * MANY, [Q] * MANY, {}, ValueError, f"1 to {MAX_LAYERS} layers, got {MANY}"),
        ([Q, Q], [Q], {}, ValueError, "q and k must have the same number of layers, got 2 and 1"),
        (
            [Q, Q[:1]],
            [Q, Q],
            {},
            ValueError,
            r"q must have the same shape in all layers, .* layer 1",
        ),
        ([Q, Q.half()], [Q, Q], {}, ValueError, "q must have the same dtype in all layers"),
        (Q[0], Q, {}, ValueError, r"q must be \[batch, heads, tokens, head_dim\], got shape"),
        (Q, Q[0], {}, ValueError, r"k must be \[batch, heads, tokens, head_dim\], got shape"),
        (Q.double(), Q.double(), {}, TypeError, "q must be float32, float16 or bfloat16, got"),
        (Q, Q.half(), {}, TypeError, "q and k must have the same dtype"),
        (Q, Q.to("meta"), {}, ValueError, "k must be on one of"),
        (Q.mT, Q.mT, {}, ValueError, "q must have a unit last stride, got strides"),
        (Q[:, :0], Q[:, :0], {}, ValueError, "k must have at least one head"),
        (t(2, 3, 10, 12), t(2, 3, 10, 12), {}, ValueError, "head_dim must be a multiple of 8"),
        (WIDE, WIDE, {}, ValueError, f"from 8 to {MAX_HEAD_DIM}, got {MAX_HEAD_DIM + 8}"),
        (LONG, LONG, {}, ValueError, f"1 to {MAX_TOKENS} tokens, got {MAX_TOKENS + 1}"),
        (Q, t(2, 3, 11, 16), {}, ValueError, r"q must be \[2, 3, 11 or 1, 16\] for k of shape"),
        (Q[:, :, :1], Q, {"rows": "all"}, ValueError, r"q must be \[2, 3, 10, 16\]"),
        (Q, Q, {"rows": "mean"}, ValueError, "rows must be 'cls' or 'all', got 'mean'"),
        (Q, Q, {"prefix": 10}, ValueError, "prefix must be from 0 to 9 for 10 tokens, got 10"),
        (Q, Q, {"prefix": -1}, ValueError, "prefix must be from 0 to 9"),
        (Q, Q, {"prefix": 1.0}, TypeError, "prefix must be an integer, got 1.0"),
        (Q, Q, {"prefix": 0}, ValueError, "rows='cls' needs a CLS token"),
        (Q, Q, {"scale": "1"}, TypeError, "scale must be a number or None, got '1'"),
        (Q, Q, {"scale": float("inf")}, ValueError, "scale must be finite, got inf"),
        (
            Q,
            Q,
            {"lse": [t(2, 3, 10)] * 2},
            ValueError,
            "lse must have one tensor per layer, 1, got 2",
        ),
        (Q, Q, {"lse": t(2, 3, 1)}, ValueError, r"lse must be \[batch, heads, queries\]"),
        (Q, Q, {"lse": t(2, 3, 10).half()}, TypeError, "lse must be float32"),
        (Q, Q, {"lse": t(2, 3, 10, device="meta")}, ValueError, "lse must be on one of"),
        (Q, Q, {"backend": "gpu"}, ValueError, "backend must be 'auto' or one of"),
    ],
)
def test_attention(q, k, options, error, message):
    with pytest.raises(error, match=message):
        attention_scores(q, k, **options)
    with pytest.raises(error, match=message):
        score_and_select(q, k, PruneConfig(grid=(3, 3)), **options)


def test_grid_of_another_size():
    with pytest.raises(
        ValueError, match=r"config.grid must match k: k has 9 patches, grid \(4, 3\)"
    ):
        score_and_select(Q, Q, PruneConfig(grid=(4, 3)))
    with pytest.raises(ValueError, match="config.grid must match scores: scores has 9 patches"):
        select_tokens(t(1, 9), PruneConfig(grid=(4, 3)))


@pytest.mark.parametrize(
    ("scores", "error", "message"),
    [
        ([1.0], TypeError, "scores must be a tensor, got list"),
        (t(1, 9).half(), TypeError, "scores must be float32, got torch.float16"),
        (t(1, 9).to_sparse(), TypeError, "scores must be a dense tensor, got layout"),
        (t(9), ValueError, r"scores must be \[batch, patches\], got shape \(9,\)"),
        (t(1, 9, device="meta"), ValueError, "scores must be on one of"),
    ],
)
def test_scores(scores, error, message):
    with pytest.raises(error, match=message):
        select_tokens(scores, PruneConfig(grid=(3, 3)))


def test_config():
    with pytest.raises(TypeError, match="config must be a hivtp_kernels.PruneConfig, got dict"):
        select_tokens(t(1, 9), {"grid": (3, 3)})
    with pytest.raises(TypeError, match="config must be a hivtp_kernels.PruneConfig, got int"):
        score_and_select(Q, Q, 64)


KEPT = Selection(t(2, 5, dtype=torch.int32), t(2, dtype=torch.int32), t(2, 5).char(), (3, 3))


@pytest.mark.parametrize(
    ("x", "selection", "error", "message"),
    [
        (None, KEPT, TypeError, "x must be a tensor, got NoneType"),
        (t(2, 10, 4), KEPT.indices, TypeError, "selection must be a hivtp_kernels.Selection"),
        (t(2, 10), KEPT, ValueError, r"x must be \[batch, prefix \+ patches, channels\]"),
        (t(2, 10, 4).int(), KEPT, TypeError, "x must be float32, float16, bfloat16 or float64"),
        (
            t(2, 8, 4),
            KEPT,
            ValueError,
            r"x must have at least 9 tokens, the patches of the grid \(3, 3\), got 8",
        ),
        (t(3, 10, 4), KEPT, ValueError, "x must hold the selection's 2 images, got 3"),
        (t(2, 4, 10).mT, KEPT, ValueError, "x must have a unit last stride"),
        (t(2, 10, 4, device="meta"), KEPT, ValueError, "x must be on one of"),
        (t(2, 10, 4).to_sparse(), KEPT, TypeError, "x must be a dense tensor, got layout"),
        (t(2, 10, 4), KEPT._replace(grid=9), TypeError, r"grid must be \(rows, columns\), got 9"),
        (
            t(2, 10, 4),
            KEPT._replace(counts=KEPT.counts.to("meta")),
            ValueError,
            "selection.counts must be on cpu like x, got meta",
        ),
        (
            t(2, 10, 4),
            KEPT._replace(indices=KEPT.indices.long()),
            TypeError,
            "selection.indices must be int32 with 2 dimension",
        ),
    ],
)
@pytest.mark.parametrize("op", [gather_tokens, pack_tokens])
def test_features(op, x, selection, error, message):
    with pytest.raises(error, match=message):
        op(x, selection)


@pytest.mark.parametrize("op", [gather_tokens, pack_tokens])
@pytest.mark.parametrize("index", [9, -2, 2**31 - 1])
def test_an_index_outside_the_grid_reads_nothing(op, index):
    """A selection made by hand may hold anything; only the CPU can check it."""
    kept = KEPT._replace(
        indices=torch.full_like(KEPT.indices, index), counts=torch.full_like(KEPT.counts, 5)
    )
    with pytest.raises(ValueError, match="indices must be from -1 to patches - 1"):
        op(t(2, 9, 4), kept, backend="cpu")
