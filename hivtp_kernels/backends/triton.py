"""Triton kernels, on CUDA devices and under Triton's interpreter. Never synchronises."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._errors import why_not
from ..config import Rule
from ._native import rows_at_16_bytes
from ._quotas import quota_classes


def _interpreter_fault() -> str | None:
    """Why Triton's interpreter cannot run a kernel here, or None."""
    import numpy

    # Before 3.7 it makes integers of arrays with one dimension, which numpy refuses from 2.4 on.
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

    # The flag counts when triton is first imported; what the environment says now does not.
    _INTERPRETED = not isinstance(tl.cdiv, triton.JITFunction)
    _MISSING = _interpreter_fault() if _INTERPRETED else None
except Exception as error:  # an installed triton may be broken in any way
    _INTERPRETED = False
    _MISSING = why_not(error)

# A fused multiply-add rounds once instead of twice; explicit, as Triton 3.10 changes the default.
# Without a limit of its own ptxas spills a few bytes to fit one more block on a multiprocessor.
_OPTIONS: dict[str, Any] = {"enable_fp_fusion": True, "maxnreg": 128}
# Rows that a program of rows="all" holds, and rows that it streams at a time.
_TILES = {torch.float16: (128, 64), torch.bfloat16: (128, 64), torch.float32: (32, 32)}
if _INTERPRETED:
    # It pays by the operation, not by the element.
    _TILES = dict.fromkeys(_TILES, (128, 256))


class _Kept(NamedTuple):
    """What a selection writes."""

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


def attention_scores(
    q: list[Tensor], k: list[Tensor], lse: list[Tensor], rows: str, prefix: int, scale: float
) -> Tensor:
    return _score(q, k, lse, rows, prefix, scale, None, None)


def select_tokens(scores: Tensor, rule: Rule) -> tuple[Tensor, Tensor, Tensor]:
    kept = _empty_selection(scores, rule)
    if scores.shape[0]:
        with torch.cuda.device_of(scores):
            select.select_kernel[(scores.shape[0],)](
                scores.contiguous(),
                kept,
                **_by_value(rule),
                **_blocks(scores.shape[1], rule),
                **_OPTIONS,
            )
    return kept.indices, kept.counts, kept.stage


def score_and_select(
    q: list[Tensor],
    k: list[Tensor],
    lse: list[Tensor],
    rows: str,
    prefix: int,
    scale: float,
    rule: Rule,
) -> tuple[Tensor, Tensor, Tensor]:
    kept = _empty_selection(k[0], rule)
    _score(q, k, lse, rows, prefix, scale, rule, kept)
    return kept.indices, kept.counts, kept.stage


def gather_tokens(x: Tensor, indices: Tensor, prefix: int) -> Tensor:
    out = torch.empty((*indices.shape, x.shape[2]), dtype=x.dtype, device=x.device)
    _gather(x, indices, None, out, prefix)
    return out


def pack_tokens(x: Tensor, indices: Tensor, cu_seqlens: Tensor, total: int, prefix: int) -> Tensor:
    out = torch.empty((total, x.shape[2]), dtype=x.dtype, device=x.device)
    _gather(x, indices, cu_seqlens.contiguous(), out, prefix)
    return out


def _score(
    q: list[Tensor],
    k: list[Tensor],
    lse: list[Tensor],
    rows: str,
    prefix: int,
    scale: float,
    rule: Rule | None,
    kept: _Kept | None,
) -> Tensor:
    batch, heads, tokens, head_dim = k[0].shape
    patches, device = tokens - prefix, k[0].device
    scores = torch.empty((batch, patches), device=device, dtype=torch.float32)
    if not batch:
        return scores
    grid = (batch, len(k) * heads)
    block_d = max(16, triton.next_power_of_2(head_dim))
    attention: dict[str, Any] = {
        **_layers("q", rows_at_16_bytes(q), unit=8),
        **_layers("k", rows_at_16_bytes(k), unit=8),
        "scale": scale,
        "heads": heads,
        "tokens": tokens,
        "HEAD_DIM": head_dim,
        "BLOCK_D": block_d,
        **_OPTIONS,
    }
    reduction: dict[str, Any] = {
        "weights": torch.empty((*grid, patches), device=device, dtype=torch.float32),
        # Zeroed for each call by a memset: a counter that outlives calls could be left half-way.
        "tickets": torch.zeros(batch, device=device, dtype=torch.int32),
        "scores": scores,
        "kept": kept,
        "patches": patches,
        **_by_value(rule),
        **_blocks(patches, rule),
    }
    with torch.cuda.device_of(k[0]):
        if rows == "cls":
            score.cls_kernel[grid](
                BLOCK_T=8192 // block_d,
                **attention,
                **_lse(lse),
                **reduction,
            )
            return scores
        tile, step = _TILES[k[0].dtype]
        tiles = (*grid, triton.cdiv(tokens, tile))
        attention["UPCAST"] = _INTERPRETED
        if not lse:
            # Rows padded to 16 bytes, at which each layer has to start.
            shape = (len(k), batch, heads, tokens + -tokens % 4)
            lse = list(torch.empty(shape, device=device, dtype=torch.float32)[..., :tokens])
            score.lse_kernel[tiles](
                BLOCK_M=tile,
                BLOCK_N=step,
                num_warps=8,
                **attention,
                **_lse(lse),
            )
        score.columns_kernel[tiles](
            BLOCK_M=step, BLOCK_N=tile, **attention, **_lse(lse), **reduction
        )
    return scores


def _layers(
    name: str,
    tensors: list[Tensor],
    axes: tuple[str, ...] = ("batch", "head", "token"),
    unit: int = 1,
) -> dict[str, Any]:
    """One argument of all layers as kernels take it: pointers, and strides in units of elements.

    Layers that are not laid out alike are copied, which is rare, and so is lse with anything but a
    unit last stride. Pointers to 16 bytes, of which Triton takes note, are all alike too.
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


def _by_value(rule: Rule | None) -> dict[str, int]:
    if rule is None:
        return dict.fromkeys(select.SelectParams._fields, 0)
    (height, width), (wy, wx) = rule.grid, rule.window
    base, cut = quota_classes(rule)
    return select.SelectParams(
        height, width, *rule.regions, min(wy, height), min(wx, width),
        rule.capacity, int(rule.fill), *base, *cut,
    )._asdict()  # fmt: skip


def _blocks(patches: int, rule: Rule | None) -> dict[str, Any]:
    """Paddings to powers of two, and threads for them: all that kernels are compiled for.

    The threads follow the grid, with a rule or without, so that both add in one order.
    """
    area = window = 1
    if rule is not None:
        (height, width), (ry, rx), (wy, wx) = rule.grid, rule.regions, rule.window
        area = triton.cdiv(height, ry) * triton.cdiv(width, rx)
        window = min(wy, height) * min(wx, width)
    block = max(1024, triton.next_power_of_2(patches))
    return {
        "BLOCK": block,
        "REGION_AREA": triton.next_power_of_2(area),
        "WINDOW_AREA": triton.next_power_of_2(window),
        "num_warps": 8 if block <= 2048 else 16,
    }


def _empty_selection(like: Tensor, rule: Rule) -> _Kept:
    batch, device = like.shape[0], like.device
    # Each image's row of the workspace starts at 16 bytes: kernels then read it in wide accesses.
    row = triton.cdiv(rule.grid[0] * rule.grid[1], 16) * 16
    return _Kept(
        torch.empty((batch, rule.capacity), device=device, dtype=torch.int32),
        torch.empty(batch, device=device, dtype=torch.int32),
        torch.empty((batch, rule.capacity), device=device, dtype=torch.int8),
        torch.empty((batch, row), device=device, dtype=torch.int8),
    )


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
