"""C++ kernels for CPU tensors, in `csrc/cpu/`. They allocate nothing: torch does it here."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _extension
from ..config import Rule
from . import _native


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
    attention = _native.attention(C, q, k, lse, rows, prefix, scale)
    threads = torch.get_num_threads()
    workspace = _native.workspace(C.attention_scores_workspace(attention, threads), scores)
    C.attention_scores(attention, scores.data_ptr(), workspace.data_ptr(), threads)
    return scores


def select_tokens(scores: Tensor, rule: Rule) -> tuple[Tensor, Tensor, Tensor]:
    C = _extension.extension()
    if scores.stride(1) != 1:
        scores = scores.contiguous()
    out = _native.empty_selection(scores, rule)
    c_rule = _native.rule(C, rule)
    threads = torch.get_num_threads()
    workspace = _native.workspace(C.select_tokens_workspace(c_rule, threads), scores)
    C.select_tokens(
        scores.data_ptr(),
        scores.stride(0),
        scores.shape[0],
        c_rule,
        *_native.pointers(out),
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
    out = _native.empty_selection(k[0], rule)
    attention = _native.attention(C, q, k, lse, rows, prefix, scale)
    c_rule = _native.rule(C, rule)
    threads = torch.get_num_threads()
    workspace = _native.workspace(C.score_and_select_workspace(attention, c_rule, threads), k[0])
    C.score_and_select(attention, c_rule, *_native.pointers(out), workspace.data_ptr(), threads)
    return out


def gather_tokens(x: Tensor, indices: Tensor, prefix: int) -> Tensor:
    out = torch.empty((*indices.shape, x.shape[2]), dtype=x.dtype)
    indices = indices.contiguous()
    _extension.extension().gather_tokens(
        *_native.features(x, prefix),
        indices.data_ptr(),
        indices.shape[1],
        out.data_ptr(),
        torch.get_num_threads(),
    )
    return out


def pack_tokens(x: Tensor, indices: Tensor, cu_seqlens: Tensor, total: int, prefix: int) -> Tensor:
    out = torch.empty((total, x.shape[2]), dtype=x.dtype)
    indices, cu_seqlens = indices.contiguous(), cu_seqlens.contiguous()
    _extension.extension().pack_tokens(
        *_native.features(x, prefix),
        indices.data_ptr(),
        indices.shape[1],
        cu_seqlens.data_ptr(),
        total,
        out.data_ptr(),
        torch.get_num_threads(),
    )
    return out
