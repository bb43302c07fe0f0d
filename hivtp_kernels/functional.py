"""The public ops: documentation and checks. Each calls one `torch.ops.hivtp` op, no more."""

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
    q: Tensor | Sequence[Tensor], k: Tensor | Sequence[Tensor], *, rows: str = "cls",
    prefix: int = 1, scale: float | None = None, lse: Tensor | Sequence[Tensor] | None = None,
    backend: str = "auto",
) -> Tensor:  # fmt: skip
    """Importance of each patch: the attention it receives, averaged over layers, heads and rows.

    `softmax(scale * q k^T)` over all keys, without materializing the map. The prefix columns are
    dropped after the softmax, whose denominator includes them. fp32 accumulation throughout.

    Parameters
    ----------
    q, k : Tensor or list of Tensor
        `[batch, num_heads, tokens, head_dim]` in fp32, fp16 or bf16, with any strides except that
        the last one is 1; or lists of such tensors, one per layer, of the same shape, dtype and
        device. `head_dim` is a multiple of 8. With `rows="cls"`, `q` may be
        `[batch, num_heads, 1, head_dim]`, the CLS row alone. The limits are `MAX_LAYERS`,
        `MAX_TOKENS` and `MAX_HEAD_DIM` in `hivtp_kernels.types`.
    rows : {"cls", "all"}
        Query rows to average over: row 0 only, which requires `prefix >= 1`, or all rows.
    prefix : int
        Number of tokens in front of the patches (CLS first, then registers).
    scale : float, optional
        Factor on `q k^T`; `head_dim ** -0.5` by default.
    lse : Tensor or list of Tensor, optional
        fp32 `[batch, num_heads, queries]`: natural logarithm of the sum of `exp(scale * q k)` over
        all keys, as flash attention returns it. Saves a pass.
    backend : str
        "auto" takes the fastest backend that can run; a named one runs or raises.

    Returns
    -------
    Tensor
        fp32 `[batch, tokens - prefix]`. Not differentiable: `q` and `k` are detached.

    Raises
    ------
    TypeError
        If an argument has the wrong type or dtype.
    ValueError
        If `q`, `k` and `lse` disagree in layers, shape or device, or exceed the limits; if `rows`,
        `prefix` or `scale` is out of range. Either message names the argument, its value and the
        accepted values.
    RuntimeError
        If a named backend cannot run; the message gives the reason.

    Notes
    -----
    Never synchronises; can be captured in a CUDA graph. Before a capture, triton needs one call
    with the same dtypes, `head_dim`, number of layers and sizes padded to powers of two; it copies
    layers that do not all have the same layout. A NaN in a row that is read makes all scores of its
    image NaN; with a finite `lse`, only the score of its patch. On every backend except torch, an
    image's scores have the same bits in every run, for any batch and number of threads; backends
    agree up to rounding.

    References
    ----------
    HIVTP, arXiv 2509.23663, importance score from the middle layers.
    """
    check_name(backend)
    attention = _checks.attention(q, k, lse, rows, prefix, scale)
    return torch.ops.hivtp.attention_scores(*attention, backend)


def select_tokens(scores: Tensor, config: PruneConfig, *, backend: str = "auto") -> Selection:
    """Keep the best patches of each region, then the best remaining patch of each window.

    "Best" is score descending, then raster index ascending; NaN counts as -inf and -0.0 equals
    +0.0. The result is the same, bit for bit, on every backend.

    Parameters
    ----------
    scores : Tensor
        fp32 `[batch, H * W]`.
    config : PruneConfig
        What to keep; its grid is `(H, W)`.
    backend : str
        As in `attention_scores`.

    Returns
    -------
    Selection
        Kept patches in ascending raster order. Not differentiable.

    Raises
    ------
    TypeError
        If `scores` is not a dense fp32 tensor or `config` not a `PruneConfig`.
    ValueError
        If the shape of `scores` does not match `config.grid`, or its device is not supported.
    RuntimeError
        As in `attention_scores`.

    Notes
    -----
    Never synchronises; can be captured in a CUDA graph (triton: after one call whose grid, regions
    and windows have the same sizes, padded to powers of two, with any budget).

    References
    ----------
    HIVTP, arXiv 2509.23663, global and local stage. Budget mode is this package's own.
    """
    check_name(backend)
    _checks.scores(scores)
    _checks.config(config)
    _checks.patches("scores", scores.shape[1], config.grid)
    indices, counts, stage = torch.ops.hivtp.select_tokens(scores.detach(), *config.params, backend)
    return Selection(indices, counts, stage, config.grid)


def score_and_select(
    q: Tensor | Sequence[Tensor], k: Tensor | Sequence[Tensor], config: PruneConfig, *,
    rows: str = "cls", prefix: int = 1, scale: float | None = None,
    lse: Tensor | Sequence[Tensor] | None = None, backend: str = "auto",
) -> Selection:  # fmt: skip
    """`select_tokens(attention_scores(q, k), config)` as one fused op.

    Parameters
    ----------
    q, k, rows, prefix, scale, lse, backend
        As for `attention_scores`.
    config : PruneConfig
        What to keep; its grid `(H, W)` has as many patches as `k`.

    Returns
    -------
    Selection
        Kept patches in ascending raster order. Not differentiable. A patch may differ from scoring
        and selecting in two calls only if its score is within rounding of its region's cut or of
        its window's winner.

    Raises
    ------
    TypeError, ValueError, RuntimeError
        As `attention_scores` and `select_tokens` raise them.

    Notes
    -----
    Never synchronises; can be captured in a CUDA graph (triton: after one call, as in
    `attention_scores` and `select_tokens`). With `rows="cls"`, cuda and triton launch one kernel
    for the whole batch and all layers.

    References
    ----------
    HIVTP, arXiv 2509.23663.
    """
    check_name(backend)
    _checks.config(config)
    attention = _checks.attention(q, k, lse, rows, prefix, scale)
    _checks.patches("k", attention.k[0].shape[2] - prefix, config.grid)
    indices, counts, stage = torch.ops.hivtp.score_and_select(*attention, *config.params, backend)
    return Selection(indices, counts, stage, config.grid)


def gather_tokens(x: Tensor, selection: Selection, *, backend: str = "auto") -> Tensor:
    """Gather the kept rows of `x`, padded with zero rows to the selection's capacity.

    Parameters
    ----------
    x : Tensor
        `[batch, prefix + H * W, channels]` in fp32, fp16, bf16 or fp64, with a unit last stride.
        The prefix is inferred from this shape and `selection.grid`; prefix rows are never output.
    selection : Selection
        As returned by `select_tokens`, on the device of `x`.
    backend : str
        As in `attention_scores`.

    Returns
    -------
    Tensor
        `[batch, capacity, channels]` in ascending raster order, zeros past `selection.counts`.
        Differentiable in `x`.

    Raises
    ------
    TypeError
        If `x` or a tensor of `selection` has the wrong type or dtype.
    ValueError
        If `x` and `selection` disagree in batch, grid or device, or the strides of `x` are not
        supported. On cpu also if an index is outside the grid.
    RuntimeError
        As in `attention_scores`.

    Notes
    -----
    Never synchronises; can be captured in a CUDA graph (triton: after one call).
    """
    check_name(backend)
    prefix = _checks.features(x, selection)
    return torch.ops.hivtp.gather_tokens(x, selection.indices, prefix, backend)


def pack_tokens(x: Tensor, selection: Selection, *, backend: str = "auto") -> tuple[Tensor, Tensor]:
    """Concatenate the kept rows of all images, without padding.

    Parameters
    ----------
    x, selection, backend
        As for `gather_tokens`: `x` is `[batch, prefix + H * W, channels]`.

    Returns
    -------
    packed : Tensor
        `[counts.sum(), channels]`, in the dtype of `x`. Differentiable in `x`.
    cu_seqlens : Tensor
        int32 `[batch + 1]`: image `b` is `packed[cu_seqlens[b]:cu_seqlens[b + 1]]`.

    Raises
    ------
    TypeError, ValueError, RuntimeError
        As `gather_tokens` raises them.

    Notes
    -----
    **Synchronises**: the length of the output is read from the device, so this op cannot be
    captured in a CUDA graph. `gather_tokens` can.
    """
    check_name(backend)
    prefix = _checks.features(x, selection)
    # Recount instead of trusting `counts`: a wrong length would write out of bounds.
    counts = (selection.indices >= 0).sum(dim=1)
    cu_seqlens = F.pad(counts.cumsum(0, dtype=torch.int32), (1, 0))
    total = int(cu_seqlens[-1])  # the only synchronisation in all ops
    packed = torch.ops.hivtp.pack_tokens(x, selection.indices, cu_seqlens, total, prefix, backend)
    return packed, cu_seqlens
