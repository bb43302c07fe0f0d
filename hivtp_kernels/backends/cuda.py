"""C++ kernels for CUDA devices, in `csrc/cuda/`: torch's memory, on torch's device and stream."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _extension
from ..types import Attention, Kept, SelectParams
from . import _native
from ._tensors import empty_scores, empty_selection, rows_at_16_bytes


def unavailable(device: torch.device, rows: str | None = None) -> str | None:
    reason = _extension.unavailable()
    if reason is not None:
        return reason
    target = _extension.cuda_target()
    if target is None:
        return f"this build ({_extension.variant()}) has no CUDA kernels: HIVTP_BUILD=cuda has them"
    if not torch.cuda.is_available():
        return f"torch finds no CUDA device for the kernels, built by {target}"
    if device.type != "cuda":
        return f"it takes CUDA tensors, not {device.type}"
    major, minor = torch.cuda.get_device_capability(device)
    if not _extension.extension().cuda_runs_on(major, minor):
        return f"it is sm_{major}{minor}, and the kernels were built by {target}"
    return None


def attention_scores(attention: Attention) -> Tensor:
    C = _extension.extension()
    scores = empty_scores(attention)
    attention = rows_at_16_bytes(attention)
    c_attention = _native.attention(C, attention)
    size = C.cuda_attention_scores_workspace(attention=c_attention)
    workspace = _native.workspace(size, scores)
    with torch.cuda.device_of(scores):
        C.cuda_attention_scores(
            attention=c_attention,
            scores=scores.data_ptr(),
            workspace=workspace.data_ptr(),
            **_queue(scores.device),
        )
    return scores


def select_tokens(scores: Tensor, params: SelectParams) -> Kept:
    C = _extension.extension()
    scores = _native.unit_last_stride(scores)
    kept = empty_selection(scores, params)
    with torch.cuda.device_of(scores):
        C.cuda_select_tokens(
            scores=scores.data_ptr(),
            image_stride=scores.stride(0),
            batch=scores.shape[0],
            params=_native.select_params(C, params),
            selection=_native.selection(C, kept),
            **_queue(scores.device),
        )
    return kept


def score_and_select(attention: Attention, params: SelectParams) -> Kept:
    C = _extension.extension()
    kept = empty_selection(attention.k[0], params)
    attention = rows_at_16_bytes(attention)
    structs = {
        "attention": _native.attention(C, attention),
        "params": _native.select_params(C, params),
    }
    size = C.cuda_score_and_select_workspace(**structs)
    workspace = _native.workspace(size, kept[0])
    with torch.cuda.device_of(kept[0]):
        C.cuda_score_and_select(
            **structs,
            selection=_native.selection(C, kept),
            workspace=workspace.data_ptr(),
            **_queue(attention.device),
        )
    return kept


def gather_tokens(x: Tensor, indices: Tensor, prefix: int) -> Tensor:
    C = _extension.extension()
    out = torch.empty((*indices.shape, x.shape[2]), dtype=x.dtype, device=x.device)
    indices = indices.contiguous()
    with torch.cuda.device_of(x):
        C.cuda_gather_tokens(
            **_native.source(C, x, indices, prefix),
            out=out.data_ptr(),
            **_queue(x.device),
        )
    return out


def pack_tokens(x: Tensor, indices: Tensor, cu_seqlens: Tensor, total: int, prefix: int) -> Tensor:
    C = _extension.extension()
    out = torch.empty((total, x.shape[2]), dtype=x.dtype, device=x.device)
    indices, cu_seqlens = indices.contiguous(), cu_seqlens.contiguous()
    with torch.cuda.device_of(x):
        C.cuda_pack_tokens(
            **_native.source(C, x, indices, prefix),
            cu_seqlens=cu_seqlens.data_ptr(),
            total=total,
            out=out.data_ptr(),
            **_queue(x.device),
        )
    return out


def _queue(device: torch.device) -> dict[str, int]:
    """The number of the device and its current stream."""
    stream = torch.cuda.current_stream(device)
    return {"device": stream.device_index, "stream": stream.cuda_stream}
