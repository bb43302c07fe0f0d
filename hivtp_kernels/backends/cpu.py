"""C++ kernels for CPU tensors, in `csrc/cpu/`. They allocate nothing: torch does it here."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _extension
from ..types import Attention, Kept, SelectParams
from . import _native
from ._tensors import empty_scores, empty_selection


def unavailable(device: torch.device, rows: str | None = None) -> str | None:
    if device.type != "cpu":
        return f"it takes CPU tensors, not {device.type}"
    return _extension.unavailable()


def attention_scores(attention: Attention) -> Tensor:
    C, threads = _extension.extension(), torch.get_num_threads()
    scores = empty_scores(attention)
    c_attention = _native.attention(C, attention)
    size = C.attention_scores_workspace(attention=c_attention, threads=threads)
    workspace = _native.workspace(size, scores)
    C.attention_scores(
        attention=c_attention,
        scores=scores.data_ptr(),
        workspace=workspace.data_ptr(),
        threads=threads,
    )
    return scores


def select_tokens(scores: Tensor, params: SelectParams) -> Kept:
    C, threads = _extension.extension(), torch.get_num_threads()
    scores = _native.unit_last_stride(scores)
    kept = empty_selection(scores, params)
    c_params = _native.select_params(C, params)
    size = C.select_tokens_workspace(params=c_params, threads=threads)
    workspace = _native.workspace(size, scores)
    C.select_tokens(
        scores=scores.data_ptr(),
        image_stride=scores.stride(0),
        batch=scores.shape[0],
        params=c_params,
        selection=_native.selection(C, kept),
        workspace=workspace.data_ptr(),
        threads=threads,
    )
    return kept


def score_and_select(attention: Attention, params: SelectParams) -> Kept:
    C, threads = _extension.extension(), torch.get_num_threads()
    kept = empty_selection(attention.k[0], params)
    structs = {
        "attention": _native.attention(C, attention),
        "params": _native.select_params(C, params),
    }
    size = C.score_and_select_workspace(**structs, threads=threads)
    workspace = _native.workspace(size, kept[0])
    C.score_and_select(
        **structs,
        selection=_native.selection(C, kept),
        workspace=workspace.data_ptr(),
        threads=threads,
    )
    return kept


def gather_tokens(x: Tensor, indices: Tensor, prefix: int) -> Tensor:
    C, threads = _extension.extension(), torch.get_num_threads()
    out = torch.empty((*indices.shape, x.shape[2]), dtype=x.dtype)
    indices = indices.contiguous()
    C.gather_tokens(
        **_native.source(C, x, indices, prefix),
        out=out.data_ptr(),
        threads=threads,
    )
    return out


def pack_tokens(x: Tensor, indices: Tensor, cu_seqlens: Tensor, total: int, prefix: int) -> Tensor:
    C, threads = _extension.extension(), torch.get_num_threads()
    out = torch.empty((total, x.shape[2]), dtype=x.dtype)
    indices, cu_seqlens = indices.contiguous(), cu_seqlens.contiguous()
    C.pack_tokens(
        **_native.source(C, x, indices, prefix),
        cu_seqlens=cu_seqlens.data_ptr(),
        total=total,
        out=out.data_ptr(),
        threads=threads,
    )
    return out
