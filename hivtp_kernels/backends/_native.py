"""Arguments of the C++ kernels, those for CPUs and those for CUDA devices. `C` is the extension."""

from __future__ import annotations

from functools import lru_cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ..config import Rule
from ._quotas import quota_classes

_DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
_ROWS = {"cls": 0, "all": 1}


def attention(
    C: ModuleType,
    q: list[Tensor],
    k: list[Tensor],
    lse: list[Tensor],
    rows: str,
    prefix: int,
    scale: float,
) -> Any:
    batch, heads, tokens, head_dim = k[0].shape
    return C.Attention(
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
def rule(C: ModuleType, rule: Rule) -> Any:
    base, cut = quota_classes(rule)
    return C.Rule(rule.grid, rule.regions, rule.window, base, cut, rule.capacity, rule.fill)


def features(x: Tensor, prefix: int) -> tuple[int, ...]:
    """`x` as the kernels take it: address, strides and row in bytes, and the shape."""
    batch, rows, channels = x.shape
    size = x.element_size()
    return (
        x.data_ptr(),
        x.stride(0) * size,
        x.stride(1) * size,
        channels * size,
        batch,
        rows - prefix,
        prefix,
    )


def empty_selection(like: Tensor, rule: Rule) -> tuple[Tensor, Tensor, Tensor]:
    batch, device = like.shape[0], like.device
    return (
        torch.empty((batch, rule.capacity), dtype=torch.int32, device=device),
        torch.empty(batch, dtype=torch.int32, device=device),
        torch.empty((batch, rule.capacity), dtype=torch.int8, device=device),
    )


def workspace(size: int, like: Tensor) -> Tensor:
    return torch.empty(size, dtype=torch.uint8, device=like.device)


def pointers(tensors: tuple[Tensor, ...]) -> list[int]:
    return [t.data_ptr() for t in tensors]


def rows_at_16_bytes(tensors: list[Tensor]) -> list[Tensor]:
    """Copies of those whose rows do not all begin at multiples of 16 bytes, which are rare.

    There is one kernel for all layouts, whose additions have one order, so that an image's bits do
    not depend on how it is stored. Strides become multiples of eight elements.
    """
    return [
        t.clone(memory_format=torch.contiguous_format)
        if t.data_ptr() % 16 or any(stride % 8 for stride in t.stride()[:3])
        else t
        for t in tensors
    ]
