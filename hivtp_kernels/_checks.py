"""Argument checks, made before any work. Each error says "X must be Y, got Z"."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .config import PruneConfig
from .types import DTYPES, MAX_HEAD_DIM, MAX_LAYERS, MAX_TOKENS, ROWS, Attention, Selection

DEVICE_TYPES = ("cpu", "cuda")


def _dense(name: str, value: Tensor) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
    if value.layout != torch.strided:
        raise TypeError(f"{name} must be a dense tensor, got layout {value.layout}")
    if value.device.type not in DEVICE_TYPES:
        raise ValueError(f"{name} must be on one of {DEVICE_TYPES}, got {value.device}")


def config(value: PruneConfig) -> None:
    if not isinstance(value, PruneConfig):
        raise TypeError(f"config must be a hivtp_kernels.PruneConfig, got {type(value).__name__}")


def _layers(name: str, value: Tensor | Sequence[Tensor]) -> list[Tensor]:
    """Turn one tensor, or one tensor per layer, into a list of detached tensors."""
    tensors = [value] if isinstance(value, Tensor) else value
    if not isinstance(tensors, list | tuple) or not all(isinstance(t, Tensor) for t in tensors):
        raise TypeError(f"{name} must be a tensor or a list of tensors, got {type(value).__name__}")
    if not 1 <= len(tensors) <= MAX_LAYERS:
        raise ValueError(f"{name} must hold 1 to {MAX_LAYERS} layers, got {len(tensors)}")
    first = tensors[0]
    _dense(name, first)
    for layer, tensor in enumerate(tensors[1:], start=1):
        for what in ("shape", "dtype", "device", "layout"):
            expected, got = getattr(first, what), getattr(tensor, what)
            if got != expected:
                raise ValueError(
                    f"{name} must have the same {what} in all layers, got {expected} in layer 0 "
                    f"and {got} in layer {layer}"
                )
    return [t.detach() for t in tensors]


def attention(
    q: Tensor | Sequence[Tensor],
    k: Tensor | Sequence[Tensor],
    lse: Tensor | Sequence[Tensor] | None,
    rows: str,
    prefix: int,
    scale: float | None,
) -> Attention:
    """Check the arguments of `attention_scores` and fill in the default scale."""
    q, k = _layers("q", q), _layers("k", k)
    lse = [] if lse is None else _layers("lse", lse)
    if rows not in tuple(ROWS):
        raise ValueError(f"rows must be {' or '.join(map(repr, ROWS))}, got {rows!r}")
    if len(q) != len(k):
        raise ValueError(f"q and k must have the same number of layers, got {len(q)} and {len(k)}")
    for name, tensor in (("q", q[0]), ("k", k[0])):
        if tensor.dim() != 4:
            raise ValueError(
                f"{name} must be [batch, heads, tokens, head_dim], got shape {tuple(tensor.shape)}"
            )
        if tensor.dtype not in DTYPES:
            raise TypeError(f"{name} must be float32, float16 or bfloat16, got {tensor.dtype}")
    for name, tensors in (("q", q), ("k", k)):
        for tensor in tensors:
            _unit_last_stride(name, tensor)
    if q[0].dtype != k[0].dtype:
        raise TypeError(f"q and k must have the same dtype, got {q[0].dtype} and {k[0].dtype}")
    if q[0].device != k[0].device:
        raise ValueError(f"q and k must be on the same device, got {q[0].device} and {k[0].device}")
    batch, heads, tokens, head_dim = k[0].shape
    if heads < 1:
        raise ValueError(f"k must have at least one head, got shape {tuple(k[0].shape)}")
    if head_dim % 8 or not 8 <= head_dim <= MAX_HEAD_DIM:
        raise ValueError(
            f"head_dim must be a multiple of 8 from 8 to {MAX_HEAD_DIM}, got {head_dim}"
        )
    if not 1 <= tokens <= MAX_TOKENS:
        raise ValueError(f"k must have 1 to {MAX_TOKENS} tokens, got {tokens}")
    if isinstance(prefix, bool) or not isinstance(prefix, int):
        raise TypeError(f"prefix must be an integer, got {prefix!r}")
    if not 0 <= prefix < tokens:
        raise ValueError(f"prefix must be from 0 to {tokens - 1} for {tokens} tokens, got {prefix}")
    if rows == "cls" and prefix == 0:
        raise ValueError("rows='cls' needs a CLS token, so prefix must be at least 1, got 0")
    queries = (tokens, 1) if rows == "cls" else (tokens,)
    if q[0].shape not in [(batch, heads, n, head_dim) for n in queries]:
        raise ValueError(
            f"q must be [{batch}, {heads}, {' or '.join(map(str, queries))}, {head_dim}] for k of "
            f"shape {tuple(k[0].shape)} and rows={rows!r}, got {tuple(q[0].shape)}"
        )
    if lse:
        if len(lse) != len(q):
            raise ValueError(f"lse must have one tensor per layer, {len(q)}, got {len(lse)}")
        if lse[0].dtype != torch.float32:
            raise TypeError(f"lse must be float32, got {lse[0].dtype}")
        if lse[0].shape != q[0].shape[:3]:
            raise ValueError(
                f"lse must be [batch, heads, queries] = {tuple(q[0].shape[:3])}, "
                f"got {tuple(lse[0].shape)}"
            )
        if lse[0].device != q[0].device:
            raise ValueError(f"lse must be on {q[0].device} like q, got {lse[0].device}")
    return Attention(q, k, lse, rows, prefix, _scale(scale, head_dim))


def _unit_last_stride(name: str, value: Tensor) -> None:
    if value.shape[-1] > 1 and value.stride(-1) != 1:
        raise ValueError(
            f"{name} must have a unit last stride, got strides {tuple(value.stride())}"
        )


def _scale(value: float | None, head_dim: int) -> float:
    if value is None:
        return head_dim**-0.5
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"scale must be a number or None, got {value!r}")
    if not math.isfinite(value):
        raise ValueError(f"scale must be finite, got {value!r}")
    return float(value)


def patches(name: str, count: int, grid: tuple[int, int]) -> None:
    if count != grid[0] * grid[1]:
        raise ValueError(
            f"config.grid must match {name}: {name} has {count} patches, "
            f"grid {grid} has {grid[0] * grid[1]}"
        )


def scores(value: Tensor) -> None:
    _dense("scores", value)
    if value.dtype != torch.float32:
        raise TypeError(f"scores must be float32, got {value.dtype}")
    if value.dim() != 2:
        raise ValueError(f"scores must be [batch, patches], got shape {tuple(value.shape)}")


def features(x: Tensor, selection: Selection) -> int:
    """Check `x` against the selection; returns the number of prefix tokens."""
    _dense("x", x)
    if not isinstance(selection, Selection):
        raise TypeError(
            f"selection must be a hivtp_kernels.Selection, got {type(selection).__name__}"
        )
    if not isinstance(selection.grid, tuple) or len(selection.grid) != 2:
        raise TypeError(f"selection.grid must be (rows, columns), got {selection.grid!r}")
    if x.dim() != 3:
        raise ValueError(f"x must be [batch, prefix + patches, channels], got {tuple(x.shape)}")
    if x.dtype not in (*DTYPES, torch.float64):
        raise TypeError(f"x must be float32, float16, bfloat16 or float64, got {x.dtype}")
    _unit_last_stride("x", x)
    indices, counts = selection.indices, selection.counts
    for name, tensor, dim in (("indices", indices, 2), ("counts", counts, 1)):
        if tensor.dtype != torch.int32 or tensor.dim() != dim:
            raise TypeError(
                f"selection.{name} must be int32 with {dim} dimension(s), "
                f"got {tensor.dtype} of shape {tuple(tensor.shape)}"
            )
        if tensor.device != x.device:
            raise ValueError(f"selection.{name} must be on {x.device} like x, got {tensor.device}")
        if tensor.shape[0] != x.shape[0]:
            raise ValueError(
                f"x must hold the selection's {tensor.shape[0]} images, got {x.shape[0]}"
            )
    number = selection.grid[0] * selection.grid[1]
    prefix = x.shape[1] - number
    if prefix < 0:
        raise ValueError(
            f"x must have at least {number} tokens, the patches of the grid {selection.grid}, "
            f"got {x.shape[1]}"
        )
    return prefix
