"""The public ops: checks and documentation. Each calls one `torch.ops.hivtp` op, no more."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _checks, _ops  # noqa: F401  (importing _ops defines torch.ops.hivtp)
from .backends import check_name
from .config import PruneConfig
from .types import Selection


def attention_scores(
    q: Tensor | Sequence[Tensor],
    k: Tensor | Sequence[Tensor],
    *,
    rows: str = "cls",
    prefix: int = 1,
    scale: float | None = None,
    lse: Tensor | Sequence[Tensor] | None = None,
    backend: str = "auto",
) -> Tensor:
    """Importance of each patch: the attention it receives, averaged over layers, heads and rows.

    `softmax(scale * q k^T)` over all keys, without ever holding the map. The prefix columns are
    dropped after the softmax, whose denominator includes them. fp32 accumulation throughout.

    Parameters
    ----------
    q, k : Tensor or list of Tensor
        `[batch, heads, tokens, head_dim]`, fp32, fp16 or bf16, any strides with a unit last one; or
        equally long lists, one tensor a layer, at most 8 of one shape, dtype and device. `head_dim`
        is a multiple of 8 up to 128, `tokens` at most 4101. With `rows="cls"`, `q` may be
        `[batch, heads, 1, head_dim]`, the CLS row alone.
    rows : {"cls", "all"}
        Query rows to average over: row 0 only (needs `prefix >= 1`), or all of them.
    prefix : int
        Tokens in front of the patches (CLS first, then registers).
    scale : float, optional
        Factor on `q k^T`; `head_dim ** -0.5` by default.
    lse : Tensor or list of Tensor, optional
        fp32 `[batch, heads, queries]`: natural logarithm of the sum of `exp(scale * q k)` over all
        keys, as flash attention returns it. Saves a pass.
    backend : str
        "auto" takes the fastest that can run; a named one runs or raises.

    Returns
    -------
    Tensor
        fp32 `[batch, tokens - prefix]`. Not differentiable: `q` and `k` are detached.

    Raises
    ------
    TypeError, ValueError
        Naming the argument, what came and what is legal.
    RuntimeError
        Where a named backend cannot run, with the reason.

    Notes
    -----
    Never synchronises; can be captured in a CUDA graph. The backend triton first needs one call
    outside it, with the same dtypes, `head_dim`, number of layers and sizes padded to powers of
    two; it copies layers that are not all laid out alike. A NaN in the rows that are read makes all
    scores of that image NaN; with a finite `lse`, the score of its patch. Except with torch, an
    image's scores have the same bits in every run, whatever its batch mates and the number of
    threads; between backends they agree to rounding.

    References
    ----------
    HIVTP, arXiv 2509.23663, importance score from the middle layers.
    """
    check_name(backend)
    q, k, lse, _, _, scale = _attention(q, k, lse, rows, prefix, scale)
    return torch.ops.hivtp.attention_scores(q, k, lse, rows, prefix, scale, backend)


def select_tokens(scores: Tensor, config: PruneConfig, *, backend: str = "auto") -> Selection:
    """Keep the best patches of each region, then the best remaining one of each window.

    "Best" is score descending, then raster index ascending; NaN counts as -inf and -0.0 equals
    +0.0. The result is the same, bit for bit, on every backend.

    Parameters
    ----------
    scores : Tensor
        fp32 `[batch, H * W]`.
    config : PruneConfig
        The rule; its grid is `(H, W)`.
    backend : str
        "auto" takes the fastest that can run; a named one runs or raises.

    Returns
    -------
    Selection
        Kept patches in ascending raster order. Not differentiable.

    Raises
    ------
    TypeError, ValueError
        Naming the argument, what came and what is legal.
    RuntimeError
        Where a named backend cannot run, with the reason.

    Notes
    -----
    Never synchronises; can be captured in a CUDA graph (triton: after one call outside it whose
    grid, regions and windows have the same sizes, padded to powers of two; any budget then).

    References
    ----------
    HIVTP, arXiv 2509.23663, global and local stage. Budget mode is this package's own.
    """
    check_name(backend)
    _checks.scores(scores)
    _checks.config(config)
    _checks.patches("scores", scores.shape[1], config.grid)
    indices, counts, stage = torch.ops.hivtp.select_tokens(scores.detach(), *config.rule, backend)
    return Selection(indices, counts, stage, config.grid)


def score_and_select(
    q: Tensor | Sequence[Tensor],
    k: Tensor | Sequence[Tensor],
    config: PruneConfig,
    *,
    rows: str = "cls",
    prefix: int = 1,
    scale: float | None = None,
    lse: Tensor | Sequence[Tensor] | None = None,
    backend: str = "auto",
) -> Selection:
    """`select_tokens(attention_scores(q, k), config)` as one fused op.

    Parameters are those of `attention_scores` and `select_tokens`.

    Returns
    -------
    Selection
        Kept patches in ascending raster order. Not differentiable. A patch may differ from scoring
        and selecting in two calls only where its score lies within the rounding of the scores of
        its region's cut or its window's winner.

    Raises
    ------
    TypeError, ValueError
        Naming the argument, what came and what is legal.
    RuntimeError
        Where a named backend cannot run, with the reason.

    Notes
    -----
    Never synchronises; can be captured in a CUDA graph (triton: after one call outside it, as in
    `attention_scores` and `select_tokens`). With `rows="cls"` on cuda and triton it is one kernel
    launch for the batch and all layers.

    References
    ----------
    HIVTP, arXiv 2509.23663.
    """
    check_name(backend)
    _checks.config(config)
    q, k, lse, _, patches, scale = _attention(q, k, lse, rows, prefix, scale)
    _checks.patches("k", patches, config.grid)
    indices, counts, stage = torch.ops.hivtp.score_and_select(
        q, k, lse, rows, prefix, scale, *config.rule, backend
    )
    return Selection(indices, counts, stage, config.grid)


def gather_tokens(x: Tensor, selection: Selection, *, backend: str = "auto") -> Tensor:
    """The kept rows of `x`, padded with zero rows to the selection's capacity.

    Parameters
    ----------
    x : Tensor
        `[batch, prefix + H * W, channels]`, fp32, fp16, bf16 or fp64, with a unit last stride. The
        prefix is read off its shape and `selection.grid`; prefix rows are never output.
    selection : Selection
        As `select_tokens` returns it, on the device of `x`.
    backend : str
        "auto" takes the fastest that can run; a named one runs or raises.

    Returns
    -------
    Tensor
        `[batch, capacity, channels]` in ascending raster order, zeros past `selection.counts`.
        Differentiable in `x`.

    Raises
    ------
    TypeError, ValueError
        Naming the argument, what came and what is legal.
    RuntimeError
        Where a named backend cannot run, with the reason.

    Notes
    -----
    Never synchronises; can be captured in a CUDA graph (triton: after one call outside it).
    """
    check_name(backend)
    prefix = _checks.features(x, selection)
    return torch.ops.hivtp.gather_tokens(x, selection.indices, prefix, backend)


def pack_tokens(x: Tensor, selection: Selection, *, backend: str = "auto") -> tuple[Tensor, Tensor]:
    """The kept rows of all images behind each other, without padding.

    Parameters
    ----------
    x : Tensor
        `[batch, prefix + H * W, channels]`, as for `gather_tokens`.
    selection : Selection
        As `select_tokens` returns it, on the device of `x`.
    backend : str
        "auto" takes the fastest that can run; a named one runs or raises.

    Returns
    -------
    packed : Tensor
        `[counts.sum(), channels]`. Differentiable in `x`.
    cu_seqlens : Tensor
        int32 `[batch + 1]`: image `b` is `packed[cu_seqlens[b]:cu_seqlens[b + 1]]`.

    Raises
    ------
    TypeError, ValueError
        Naming the argument, what came and what is legal.
    RuntimeError
        Where a named backend cannot run, with the reason.

    Notes
    -----
    **Synchronises**: the output's length is read from the device, so it cannot be captured in a
    CUDA graph. `gather_tokens` needs neither.
    """
    check_name(backend)
    prefix = _checks.features(x, selection)
    # Counted anew: a length that goes wrong would write over other memory.
    counts = (selection.indices >= 0).sum(dim=1)
    cu_seqlens = F.pad(counts.cumsum(0, dtype=torch.int32), (1, 0))
    total = int(cu_seqlens[-1])  # the one synchronisation of all the ops
    packed = torch.ops.hivtp.pack_tokens(x, selection.indices, cu_seqlens, total, prefix, backend)
    return packed, cu_seqlens


def _attention(
    q: Tensor | Sequence[Tensor],
    k: Tensor | Sequence[Tensor],
    lse: Tensor | Sequence[Tensor] | None,
    rows: str,
    prefix: int,
    scale: float | None,
) -> tuple[list[Tensor], list[Tensor], list[Tensor], int, int, float]:
    q, k = _checks.layers("q", q), _checks.layers("k", k)
    lse = [] if lse is None else _checks.layers("lse", lse)
    batch, patches = _checks.attention(q, k, lse, rows, prefix)
    return q, k, lse, batch, patches, _checks.scale(scale, k[0].shape[3])
