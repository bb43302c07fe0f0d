"""C++ kernels for CPU tensors, in `csrc/cpu/`. They allocate nothing: torch does it here."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from .. import _extension
from ..config import Rule
from ._quotas import quota_classes

_DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
_ROWS = {"cls": 0, "all": 1}


def unavailable(device: torch.device, rows: str | None = None) -> str | None:
    if device.type != "cpu":
        return f"it takes CPU tensors, not {device.type}"
    return _extension.unavailable()


def attention_scores(
    q: list[Tensor], k: list[Tensor], lse: list[Tensor], rows: str, prefix: int, scale: float
) -> Tensor:
    batch, _, tokens, _ = k[0].shape
    scores = torch.empty((batch, tokens - prefix), dtype=torch.float32)
    C = _extension.extension()
    attention = _attention(q, k, lse, rows, prefix, scale)
    threads = torch.get_num_threads()
    workspace = _workspace(C.attention_scores_workspace(attention, threads))
    C.attention_scores(attention, scores.data_ptr(), workspace.data_ptr(), threads)
    return scores


def select_tokens(scores: Tensor, rule: Rule) -> tuple[Tensor, Tensor, Tensor]:
    C = _extension.extension()
    if scores.stride(1) != 1:
        scores = scores.contiguous()
    out = _selection(scores.shape[0], rule)
    c_rule = _rule(rule)
    threads = torch.get_num_threads()
    workspace = _workspace(C.select_tokens_workspace(c_rule, threads))
    C.select_tokens(
        scores.data_ptr(),
        scores.stride(0),
        scores.shape[0],
        c_rule,
        *_pointers(out),
        workspace.data_ptr(),
        threads,
    )
    return out


def score_and_select(
    q: list[Tensor],
    k: list[Tensor],
    lse: list[Tensor],
    rows: str,
    prefix: int,
    scale: float,
    rule: Rule,
) -> tuple[Tensor, Tensor, Tensor]:
    C = _extension.extension()
    out = _selection(k[0].shape[0], rule)
    attention = _attention(q, k, lse, rows, prefix, scale)
    c_rule = _rule(rule)
    threads = torch.get_num_threads()
    workspace = _workspace(C.score_and_select_workspace(attention, c_rule, threads))
    C.score_and_select(attention, c_rule, *_pointers(out), workspace.data_ptr(), threads)
    return out


def gather_tokens(x: Tensor, indices: Tensor, prefix: int) -> Tensor:
    out = torch.empty((*indices.shape, x.shape[2]), dtype=x.dtype)
    _copy(_extension.extension().gather_tokens, x, indices, prefix, out)
    return out


def pack_tokens(x: Tensor, indices: Tensor, cu_seqlens: Tensor, total: int, prefix: int) -> Tensor:
    out = torch.empty((total, x.shape[2]), dtype=x.dtype)
    cu_seqlens = cu_seqlens.contiguous()
    pack = _extension.extension().pack_tokens
    _copy(pack, x, indices, prefix, out, cu_seqlens.data_ptr(), total)
    return out


def _attention(
    q: list[Tensor], k: list[Tensor], lse: list[Tensor], rows: str, prefix: int, scale: float
) -> Any:
    batch, heads, tokens, head_dim = k[0].shape
    return _extension.extension().Attention(
        [(t.data_ptr(), *t.stride()[:3]) for t in q],
        [(t.data_ptr(), *t.stride()[:3]) for t in k],
        [(t.data_ptr(), *t.stride()) for t in lse],
        batch,
        heads,
        tokens,
        head_dim,
        prefix,
        _DTYPES[k[0].dtype],
        _ROWS[rows],
        scale,
    )


@lru_cache(maxsize=1024)
def _rule(rule: Rule) -> Any:
    base, cut = quota_classes(rule)
    return _extension.extension().Rule(
        rule.grid, rule.regions, rule.window, base, cut, rule.capacity, rule.fill
    )


def _selection(batch: int, rule: Rule) -> tuple[Tensor, Tensor, Tensor]:
    return (
        torch.empty((batch, rule.capacity), dtype=torch.int32),
        torch.empty(batch, dtype=torch.int32),
        torch.empty((batch, rule.capacity), dtype=torch.int8),
    )


def _workspace(size: int) -> Tensor:
    return torch.empty(size, dtype=torch.uint8)


def _pointers(tensors: tuple[Tensor, ...]) -> list[int]:
    return [t.data_ptr() for t in tensors]


def _copy(
    op: Callable[..., None], x: Tensor, indices: Tensor, prefix: int, out: Tensor, *packing: int
) -> None:
    indices = indices.contiguous()
    batch, rows, channels = x.shape
    size = x.element_size()
    op(
        x.data_ptr(),
        x.stride(0) * size,
        x.stride(1) * size,
        channels * size,
        batch,
        rows - prefix,
        prefix,
        indices.data_ptr(),
        indices.shape[1],
        *packing,
        out.data_ptr(),
        torch.get_num_threads(),
    )
