"""Triton kernels, on CUDA devices and under Triton's interpreter. Never synchronises."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._errors import why_not
from ..types import Attention, Kept, SelectParams
from ._quotas import quota_classes
from ._tensors import empty_scores, empty_selection, rows_at_16_bytes


def _interpreter_fault() -> str | None:
    """Why Triton's interpreter cannot run a kernel here, or None."""
    import numpy

    # Before 3.7 it converts one-dimensional arrays to integers, which numpy refuses since 2.4.
    versions = [
        tuple(int(part) for part in module.__version__.split(".")[:2]) for module in (triton, numpy)
    ]
    if versions[0] < (3, 7) and versions[1] >= (2, 4):
        return f"the interpreter of triton {triton.__version__} needs numpy<2.4"
    return None


try:
    import triton
    import triton.language as tl

    from ..triton_kernels import gather, score, select

    # What counts is the flag when triton was first imported, not the environment now.
    _INTERPRETED = not isinstance(tl.cdiv, triton.JITFunction)
    _MISSING = _interpreter_fault() if _INTERPRETED else None
except Exception as error:  # an installed triton may be broken in any way
    _INTERPRETED = False
    _MISSING = why_not(error)

# A fused multiply-add rounds once instead of twice; explicit, as Triton 3.10 changes the default.
# Without `maxnreg`, ptxas spills a few bytes to fit one more block on a multiprocessor.
_OPTIONS: dict[str, Any] = {"enable_fp_fusion": True, "maxnreg": 128}
# For rows="all": the rows that a program holds, and those that it streams at a time.
_TILES = {torch.float16: (128, 64), torch.bfloat16: (128, 64), torch.float32: (32, 32)}
if _INTERPRETED:
    # The interpreter's cost is per operation, so use large tiles.
    _TILES = dict.fromkeys(_TILES, (128, 256))


class _Outputs(NamedTuple):
    """Pointers that a selection writes to."""

    indices: Tensor
    counts: Tensor
    stage: Tensor
    workspace: Tensor


def unavailable(device: torch.device, rows: str | None = None) -> str | None:
    if _MISSING is not None:
        return _MISSING
    if _INTERPRETED:
        return None if device.type == "cpu" else "TRITON_INTERPRET=1 is for CPU tensors"
    if device.type != "cuda":
        return "triton takes CPU tensors only with TRITON_INTERPRET=1, set before it is imported"
    if not torch.cuda.is_available():
        return "there is no CUDA device"
    if rows == "all" and torch.cuda.get_device_capability(device) < (8, 0):
        return "rows='all' needs compute capability 8.0: Triton has no tensor-core code below it"
    return None


def attention_scores(attention: Attention) -> Tensor:
    return _score(attention)


def select_tokens(scores: Tensor, params: SelectParams) -> Kept:
    outputs = _outputs(scores, params)
    if scores.shape[0]:
        with torch.cuda.device_of(scores):
            select.select_kernel[(scores.shape[0],)](
                scores.contiguous(),
                outputs,
                **_by_value(params),
                **_blocks(scores.shape[1], params),
                **_OPTIONS,
            )
    return outputs[:3]


def score_and_select(attention: Attention, params: SelectParams) -> Kept:
    outputs = _outputs(attention.k[0], params)
    _score(attention, params, outputs)
    return outputs[:3]


def gather_tokens(x: Tensor, indices: Tensor, prefix: int) -> Tensor:
    out = torch.empty((*indices.shape, x.shape[2]), dtype=x.dtype, device=x.device)
    _gather(x, indices, None, out, prefix)
    return out


def pack_tokens(x: Tensor, indices: Tensor, cu_seqlens: Tensor, total: int, prefix: int) -> Tensor:
    out = torch.empty((total, x.shape[2]), dtype=x.dtype, device=x.device)
    _gather(x, indices, cu_seqlens.contiguous(), out, prefix)
    return out


def _score(
    attention: Attention, params: SelectParams | None = None, outputs: _Outputs | None = None
) -> Tensor:
    """Score and, if given, select by `params` into `outputs`."""
    attention = rows_at_16_bytes(attention)
    scores, device, tokens = empty_scores(attention), attention.device, attention.tokens
    batch, patches = scores.shape
    if not batch:
        return scores
    grid = (batch, attention.layers * attention.num_heads)
    block_d = max(16, triton.next_power_of_2(attention.head_dim))
    inputs: dict[str, Any] = {
        **_layers("q", attention.q, unit=8),
        **_layers("k", attention.k, unit=8),
        "scale": attention.scale,
        "heads": attention.num_heads,
        "tokens": tokens,
        "HEAD_DIM": attention.head_dim,
        "BLOCK_D": block_d,
        **_OPTIONS,
    }
    reduction: dict[str, Any] = {
        "weights": torch.empty((*grid, patches), device=device, dtype=torch.float32),
        # A memset for each call: counters kept from call to call could be left in mid-count.
        "tickets": torch.zeros(batch, device=device, dtype=torch.int32),
        "scores": scores,
        "outputs": outputs,
        "patches": patches,
        **_by_value(params),
        **_blocks(patches, params),
    }
    lse = attention.lse
    with torch.cuda.device_of(scores):
        if attention.rows == "cls":
            score.cls_kernel[grid](BLOCK_T=8192 // block_d, **inputs, **_lse(lse), **reduction)
            return scores
        tile, step = _TILES[attention.dtype]
        tiles = (*grid, triton.cdiv(tokens, tile))
        inputs["UPCAST"] = _INTERPRETED
        if not lse:
            # Each layer must start at 16 bytes, so rows are padded to that.
            shape = (attention.layers, batch, attention.num_heads, tokens + -tokens % 4)
            lse = list(torch.empty(shape, device=device, dtype=torch.float32)[..., :tokens])
            score.lse_kernel[tiles](BLOCK_M=tile, BLOCK_N=step, num_warps=8, **inputs, **_lse(lse))
        score.columns_kernel[tiles](BLOCK_M=step, BLOCK_N=tile, **inputs, **_lse(lse), **reduction)
    return scores


def _layers(
    name: str,
    tensors: list[Tensor],
    axes: tuple[str, ...] = ("batch", "head", "token"),
    unit: int = 1,
) -> dict[str, Any]:
    """`q`, `k` or `lse` of all layers for a kernel: pointers, and strides in `unit` elements.

    Layers that do not all have the same strides, and `lse` without a unit last stride, are copied,
    which is rare. So are pointers that are not multiples of 16, for which Triton would compile
    another variant.
    """
    strides = tensors[0].stride() if tensors else ()
    if any(t.stride() != strides or strides[-1] != 1 or t.data_ptr() % 16 for t in tensors):
        tensors = [t.clone(memory_format=torch.contiguous_format) for t in tensors]
        strides = tensors[0].stride()
    given = strides[: len(axes)] or (0,) * len(axes)
    return {
        name: tuple(tensors) or None,
        **{f"{name}_{axis}_stride": s // unit for axis, s in zip(axes, given, strict=True)},
    }


def _lse(tensors: list[Tensor]) -> dict[str, Any]:
    return _layers("lse", tensors, axes=("batch", "head"))


def _by_value(params: SelectParams | None) -> dict[str, int]:
    """The integers of `params`, one by one, as kernels take them."""
    if params is None:
        return dict.fromkeys(select.FlatParams._fields, 0)
    (height, width), (wy, wx) = params.grid, params.window
    base, cut = quota_classes(params)
    return select.FlatParams(
        height, width, *params.regions, min(wy, height), min(wx, width),
        params.capacity, int(params.fill), *base, *cut,
    )._asdict()  # fmt: skip


def _blocks(patches: int, params: SelectParams | None) -> dict[str, Any]:
    """The sizes, padded to powers of two, and number of warps that kernels are compiled for.

    The number of warps depends on the grid alone, not on whether there are `params`, so that both
    ways add in the same order.
    """
    area = window = 1
    if params is not None:
        (height, width), (ry, rx), (wy, wx) = params.grid, params.regions, params.window
        area = triton.cdiv(height, ry) * triton.cdiv(width, rx)
        window = min(wy, height) * min(wx, width)
    block = max(1024, triton.next_power_of_2(patches))
    return {
        "BLOCK": block,
        "REGION_AREA": triton.next_power_of_2(area),
        "WINDOW_AREA": triton.next_power_of_2(window),
        "num_warps": 8 if block <= 2048 else 16,
    }


def _outputs(like: Tensor, params: SelectParams) -> _Outputs:
    # Each image's row of the workspace starts at 16 bytes, so that kernels can use wide accesses.
    row = triton.cdiv(params.grid[0] * params.grid[1], 16) * 16
    workspace = torch.empty((like.shape[0], row), device=like.device, dtype=torch.int8)
    return _Outputs(*empty_selection(like, params), workspace)


def _gather(
    x: Tensor, indices: Tensor, cu_seqlens: Tensor | None, out: Tensor, prefix: int
) -> None:
    (batch, capacity), channels = indices.shape, x.shape[2]
    if not out.numel():
        return
    unit = max(1, 16 // x.element_size())
    wide = x.data_ptr() % 16 == 0 and not any(s % unit for s in (*x.stride()[:2], channels))
    step = unit if wide else 1
    block = min(512, triton.next_power_of_2(channels))
    rows = 4096 // block
    grid = (batch, triton.cdiv(capacity, rows), triton.cdiv(channels, block))
    with torch.cuda.device_of(x):
        gather.gather_kernel[grid](
            x,
            x.stride(0) // step,
            x.stride(1) // step,
            indices.contiguous(),
            cu_seqlens,
            out,
            x.shape[1] - prefix,
            prefix,
            capacity,
            channels // step,
            int(wide),
            UNIT=unit,
            ROWS=rows,
            BLOCK_C=block,
            num_warps=4,
            **_OPTIONS,
        )
