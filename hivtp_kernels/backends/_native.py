"""The structs of csrc/include/hivtp/api.h for the C++ backends. `C` is the extension."""

from __future__ import annotations

from functools import lru_cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ..types import DTYPES, ROWS, Attention, Kept, SelectParams
from ._quotas import quota_classes


def attention(C: ModuleType, attention: Attention) -> Any:
    batch, heads, tokens, head_dim = attention.k[0].shape
    return C.Attention(
        q=_views(attention.q),
        k=_views(attention.k),
        lse=_views(attention.lse),
        batch=batch,
        heads=heads,
        tokens=tokens,
        head_dim=head_dim,
        prefix=attention.prefix,
        dtype=DTYPES[attention.dtype],
        rows=ROWS[attention.rows],
        scale=attention.scale,
    )


def _views(tensors: list[Tensor]) -> list[tuple[int, tuple[int, ...]]]:
    return [(t.data_ptr(), t.stride()[:3]) for t in tensors]


@lru_cache(maxsize=1024)
def select_params(C: ModuleType, params: SelectParams) -> Any:
    base, cut = quota_classes(params)
    return C.SelectParams(
        grid=params.grid,
        regions=params.regions,
        window=params.window,
        quota_base=base,
        quota_cut=cut,
        capacity=params.capacity,
        fill=params.fill,
    )


def selection(C: ModuleType, kept: Kept) -> Any:
    indices, counts, stage = kept
    return C.Selection(indices=indices.data_ptr(), counts=counts.data_ptr(), stage=stage.data_ptr())


def source(C: ModuleType, x: Tensor, indices: Tensor, prefix: int) -> dict[str, Any]:
    """What to copy, as the keyword arguments of `gather_tokens` and `pack_tokens`."""
    return {
        "features": features(C, x, prefix),
        "indices": indices.data_ptr(),
        "capacity": indices.shape[1],
    }


def features(C: ModuleType, x: Tensor, prefix: int) -> Any:
    batch, rows, channels = x.shape
    size = x.element_size()
    return C.Features(
        data=x.data_ptr(),
        image_stride=x.stride(0) * size,
        row_stride=x.stride(1) * size,
        row_bytes=channels * size,
        batch=batch,
        patches=rows - prefix,
        prefix=prefix,
    )


def unit_last_stride(scores: Tensor) -> Tensor:
    """The scores themselves, or a copy if the patches of an image are not adjacent."""
    return scores if scores.stride(1) == 1 else scores.contiguous()


def workspace(size: int, like: Tensor) -> Tensor:
    return torch.empty(size, dtype=torch.uint8, device=like.device)
