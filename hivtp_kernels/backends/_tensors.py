"""Tensors that several backends need."""

from __future__ import annotations

import torch
from torch import Tensor

from ..types import Attention, Kept, SelectParams


def empty_scores(attention: Attention) -> Tensor:
    shape = (attention.batch, attention.patches)
    return torch.empty(shape, dtype=torch.float32, device=attention.device)


def empty_selection(like: Tensor, params: SelectParams) -> Kept:
    """Outputs of a selection, for the batch and on the device of `like`."""
    batch, device = like.shape[0], like.device
    return (
        torch.empty((batch, params.capacity), dtype=torch.int32, device=device),
        torch.empty(batch, dtype=torch.int32, device=device),
        torch.empty((batch, params.capacity), dtype=torch.int8, device=device),
    )


def rows_at_16_bytes(attention: Attention) -> Attention:
    """Copy each `q` and `k` whose rows do not all start at multiples of 16 bytes, which is rare.

    One kernel for all layouts, with one order of additions, keeps an image's bits independent of
    how it is stored. Strides become multiples of eight elements.
    """
    q, k = ([_aligned(t) for t in tensors] for tensors in (attention.q, attention.k))
    return attention._replace(q=q, k=k)


def _aligned(rows: Tensor) -> Tensor:
    if rows.data_ptr() % 16 or any(stride % 8 for stride in rows.stride()[:3]):
        return rows.clone(memory_format=torch.contiguous_format)
    return rows
