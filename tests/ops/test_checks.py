"""Bad input: each error names the argument, what came and what is legal."""

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


def t(*shape, dtype=torch.float32, device="cpu"):
    return torch.zeros(shape, dtype=dtype, device=device)


Q = t(2, 3, 10, 16)


@pytest.mark.parametrize(
    ("q", "k", "options", "error", "message"),
    [
        (None, Q, {}, TypeError, "q must be a tensor or a list of tensors, got NoneType"),
        ([], [], {}, ValueError, "q must hold 1 to 8 layers, got 0"),
        ([Q] * 9, [Q] * 9, {}, ValueError, "q must hold 1 to 8 layers, got 9"),
        ([Q, Q], [Q], {}, ValueError, "q and k must have equally many layers, got 2 and 1"),
        ([Q, Q[:1]], [Q, Q], {}, ValueError, r"q must have one shape in all layers, .* layer 1"),
        ([Q, Q.half()], [Q, Q], {}, ValueError, "q must have one dtype in all layers"),
        (Q[0], Q, {}, ValueError, r"q must be \[batch, heads, tokens, head_dim\], got shape"),
        (Q, Q[0], {}, ValueError, r"k must be \[batch, heads, tokens, head_dim\], got shape"),
        (Q.double(), Q.double(), {}, TypeError, "q must be float32, float16 or bfloat16, got"),
        (Q, Q.half(), {}, TypeError, "q and k must have one dtype"),
        (Q, Q.to("meta"), {}, ValueError, "k must lie on one of"),
        (Q.mT, Q.mT, {}, ValueError, "q must have a unit last stride, got strides"),
        (Q[:, :0], Q[:, :0], {}, ValueError, "k must have at least one head"),
        (t(2, 3, 10, 12), t(2, 3, 10, 12), {}, ValueError, "multiple of 8 from 8 to 128, got 12"),
        (t(1, 1, 4, 136), t(1, 1, 4, 136), {}, ValueError, "multiple of 8 from 8 to 128, got 136"),
        (t(1, 1, 4102, 8), t(1, 1, 4102, 8), {}, ValueError, "1 to 4101 tokens, got 4102"),
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
            "lse must have one tensor a layer, 1, got 2",
        ),
        (Q, Q, {"lse": t(2, 3, 1)}, ValueError, r"lse must be \[batch, heads, queries\]"),
        (Q, Q, {"lse": t(2, 3, 10).half()}, TypeError, "lse must be float32"),
        (Q, Q, {"lse": t(2, 3, 10, device="meta")}, ValueError, "lse must lie on"),
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
        (t(1, 9, device="meta"), ValueError, "scores must lie on one of"),
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
            r"x must have at least the 9 rows of the grid \(3, 3\), got 8",
        ),
        (t(3, 10, 4), KEPT, ValueError, "x must hold the selection's 2 images, got 3"),
        (t(2, 4, 10).mT, KEPT, ValueError, "x must have a unit last stride"),
        (t(2, 10, 4, device="meta"), KEPT, ValueError, "x must lie on one of"),
        (t(2, 10, 4).to_sparse(), KEPT, TypeError, "x must be a dense tensor, got layout"),
        (t(2, 10, 4), KEPT._replace(grid=9), TypeError, r"grid must be \(rows, columns\), got 9"),
        (
            t(2, 10, 4),
            KEPT._replace(counts=KEPT.counts.to("meta")),
            ValueError,
            "selection.counts must lie on cpu like x, got meta",
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
    """A selection made by hand may hold anything; where the CPU can look, it does."""
    kept = KEPT._replace(
        indices=torch.full_like(KEPT.indices, index), counts=torch.full_like(KEPT.counts, 5)
    )
    with pytest.raises(ValueError, match="indices must be from -1 to patches - 1"):
        op(t(2, 9, 4), kept, backend="cpu")
