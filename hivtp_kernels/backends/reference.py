"""The backend "torch": readable ground truth in plain torch operations. Never synchronises."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..config import region_bounds
from ..types import FILLED, GLOBAL, LOCAL, Attention, Kept, SelectParams


def unavailable(device: torch.device, rows: str | None = None) -> str | None:
    if device.type == "cuda" and not torch.cuda.is_available():
        return "there is no CUDA device"
    if device.type not in ("cpu", "cuda"):
        return f"the ops take CPU and CUDA tensors, not {device.type}"
    return None


def attention_scores(attention: Attention) -> Tensor:
    rows = slice(0, 1) if attention.rows == "cls" else slice(None)
    total = torch.zeros((), device=attention.device, dtype=torch.float64)
    for layer, (q, k) in enumerate(zip(attention.q, attention.k, strict=True)):
        # fp64, which neither autocast nor the precision set for fp32 products affects.
        logits = q[:, :, rows].double() @ k.double().mT * attention.scale
        if attention.lse:
            weights = (logits - attention.lse[layer][:, :, rows, None]).exp()
        else:
            weights = logits.softmax(dim=-1)
        total = total + weights.mean(dim=(1, 2))
    return (total[:, attention.prefix :] / attention.layers).float()


def select_tokens(scores: Tensor, params: SelectParams) -> Kept:
    batch, patches = scores.shape
    height, width = params.grid
    rank = _rank(scores.masked_fill(scores.isnan(), -torch.inf))
    rank = rank.view(batch, height, width)
    stage = torch.zeros_like(rank, dtype=torch.int8)

    quotas = iter(params.quotas)
    for top, bottom in region_bounds(height, params.regions[0]):
        for left, right in region_bounds(width, params.regions[1]):
            region = rank[:, top:bottom, left:right]
            if quota := next(quotas):
                cut = region.flatten(1).kthvalue(quota).values
                stage[:, top:bottom, left:right] = (region <= cut[:, None, None]) * GLOBAL

    wy, wx = params.window
    remaining = rank.masked_fill(stage > 0, patches)
    padded = F.pad(remaining, (0, -width % wx, 0, -height % wy), value=patches)
    rows, columns = padded.shape[1] // wy, padded.shape[2] // wx
    tiles = padded.view(batch, rows, wy, columns, wx)
    winner = (tiles == tiles.amin(dim=(2, 4), keepdim=True)) & (tiles < patches)
    stage.masked_fill_(winner.view(padded.shape)[:, :height, :width], LOCAL)

    stage = stage.view(batch, patches)
    if params.fill:
        missing = params.capacity - (stage > 0).sum(dim=1, keepdim=True)
        remaining = rank.view(batch, patches).masked_fill(stage > 0, patches)
        stage.masked_fill_(remaining.argsort(dim=1).argsort(dim=1) < missing, FILLED)

    kept = stage > 0
    order = kept.logical_not().to(torch.int8).argsort(dim=1, stable=True)[:, : params.capacity]
    valid = kept.gather(1, order)
    indices = order.masked_fill(~valid, -1).to(torch.int32)
    return indices, kept.sum(dim=1, dtype=torch.int32), stage.gather(1, order)


def score_and_select(attention: Attention, params: SelectParams) -> Kept:
    return select_tokens(attention_scores(attention), params)


def gather_tokens(x: Tensor, indices: Tensor, prefix: int) -> Tensor:
    row = (indices.clamp(min=0) + prefix).long()
    gathered = x.gather(1, row[:, :, None].expand(-1, -1, x.shape[2]))
    return gathered.masked_fill(indices[:, :, None] < 0, 0)


def pack_tokens(x: Tensor, indices: Tensor, cu_seqlens: Tensor, total: int, prefix: int) -> Tensor:
    return gather_tokens(x, indices, prefix)[indices >= 0]


def _rank(scores: Tensor) -> Tensor:
    """Rank of each element in the order (score descending, index ascending), from 0."""
    order = scores.argsort(dim=1, descending=True, stable=True)
    places = torch.arange(scores.shape[1], device=scores.device).expand_as(order)
    return torch.empty_like(order).scatter_(1, order, places)
