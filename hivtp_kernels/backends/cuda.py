"""C++ kernels for CUDA devices, in `csrc/cuda/`. torch allocates; its device and stream launch."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _extension
from ..config import Rule
from . import _native


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


def attention_scores(
    q: list[Tensor], k: list[Tensor], lse: list[Tensor], rows: str, prefix: int, scale: float
) -> Tensor:
    C = _extension.extension()
    batch, _, tokens, _ = k[0].shape
    scores = torch.empty((batch, tokens - prefix), dtype=torch.float32, device=k[0].device)
    q, k = _native.rows_at_16_bytes(q), _native.rows_at_16_bytes(k)
    attention = _native.attention(C, q, k, lse, rows, prefix, scale)
    workspace = _native.workspace(C.cuda_attention_scores_workspace(attention), scores)
    with torch.cuda.device_of(scores):
        C.cuda_attention_scores(
            attention, scores.data_ptr(), workspace.data_ptr(), *_queue(scores.device)
        )
    return scores


def select_tokens(scores: Tensor, rule: Rule) -> tuple[Tensor, Tensor, Tensor]:
    C = _extension.extension()
    if scores.stride(1) != 1:
        scores = scores.contiguous()
    out = _native.empty_selection(scores, rule)
    with torch.cuda.device_of(scores):
        C.cuda_select_tokens(
            scores.data_ptr(),
            scores.stride(0),
            scores.shape[0],
            _native.rule(C, rule),
            *_native.pointers(out),
            *_queue(scores.device),
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
    out = _native.empty_selection(k[0], rule)
    q, k = _native.rows_at_16_bytes(q), _native.rows_at_16_bytes(k)
    attention = _native.attention(C, q, k, lse, rows, prefix, scale)
    c_rule = _native.rule(C, rule)
    workspace = _native.workspace(C.cuda_score_and_select_workspace(attention, c_rule), k[0])
    with torch.cuda.device_of(k[0]):
        C.cuda_score_and_select(
            attention,
            c_rule,
            *_native.pointers(out),
            workspace.data_ptr(),
            *_queue(k[0].device),
        )
    return out


def gather_tokens(x: Tensor, indices: Tensor, prefix: int) -> Tensor:
    out = torch.empty((*indices.shape, x.shape[2]), dtype=x.dtype, device=x.device)
    indices = indices.contiguous()
    with torch.cuda.device_of(x):
        _extension.extension().cuda_gather_tokens(
            *_native.features(x, prefix),
            indices.data_ptr(),
            indices.shape[1],
            out.data_ptr(),
            *_queue(x.device),
        )
    return out


def pack_tokens(x: Tensor, indices: Tensor, cu_seqlens: Tensor, total: int, prefix: int) -> Tensor:
    out = torch.empty((total, x.shape[2]), dtype=x.dtype, device=x.device)
    indices, cu_seqlens = indices.contiguous(), cu_seqlens.contiguous()
    with torch.cuda.device_of(x):
        _extension.extension().cuda_pack_tokens(
            *_native.features(x, prefix),
            indices.data_ptr(),
            indices.shape[1],
            cu_seqlens.data_ptr(),
            total,
            out.data_ptr(),
            *_queue(x.device),
        )
    return out


def _queue(device: torch.device) -> tuple[int, int]:
    """The device's number and its current stream."""
    stream = torch.cuda.current_stream(device)
    return stream.device_index, stream.cuda_stream
