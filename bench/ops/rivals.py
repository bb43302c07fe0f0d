"""Baselines that compute such scores on a GPU, timed in the same run as the ops.

Maps round to the dtype of `q` and `k` at each step, hence a tolerance of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor

# They take the same time in bf16.
DTYPE = torch.float16
TOLERANCE = 1e-2


def maps(q: Sequence[Tensor], k: Sequence[Tensor], rows: str, prefix: int) -> Tensor:
    """Mean of the softmax maps over layers, heads and query rows, as a user would write it."""
    means = []
    for queries, keys in zip(q, k, strict=True):
        if rows == "cls":
            queries = queries[:, :, :1]
        attention = (queries @ keys.mT * keys.shape[3] ** -0.5).softmax(dim=-1)
        means.append(attention.mean(dim=(1, 2)))
    return torch.stack(means).mean(dim=0)[:, prefix:]


def flash_lse(q: Sequence[Tensor], k: Sequence[Tensor]) -> list[Tensor]:
    """The log-sum-exp of each query row, from torch's FlashAttention."""
    aten = torch.ops.aten
    on_cpu = q[0].device.type == "cpu"
    flash = (
        aten._scaled_dot_product_flash_attention_for_cpu
        if on_cpu
        else aten._scaled_dot_product_flash_attention
    )
    return [flash(queries, keys, keys)[1] for queries, keys in zip(q, k, strict=True)]


def columns(q: Sequence[Tensor], k: Sequence[Tensor], lse: Sequence[Tensor], prefix: int) -> Tensor:
    """Mean of `exp(logits - lse)` over layers, heads and query rows, computed in place."""
    means = []
    for queries, keys, sums in zip(q, k, lse, strict=True):
        logits = (queries * keys.shape[3] ** -0.5) @ keys.mT
        means.append(logits.sub_(sums[..., None]).exp_().mean(dim=(1, 2)))
    return torch.stack(means).mean(dim=0)[:, prefix:]


def flash_colreduce(q: Sequence[Tensor], k: Sequence[Tensor], prefix: int) -> Tensor:
    """The package flash-colreduce; one call reduces the columns of all heads of a layer."""
    import flash_colreduce as package

    means = [
        package.flash_colreduce(queries, keys, reduction="mean").mean(dim=1)
        for queries, keys in zip(q, k, strict=True)
    ]
    return torch.stack(means).mean(dim=0)[:, prefix:]


def scores(
    q: Sequence[Tensor], k: Sequence[Tensor], rows: str, prefix: int, compiled: bool
) -> dict[str, Callable[[], Tensor]]:
    """By name, functions that compute the same as `attention_scores`."""
    found: dict[str, Callable[[], Tensor]] = {"eager maps": lambda: maps(q, k, rows, prefix)}
    if compiled:
        # torch.compile gives up after 8 shapes of one function.
        torch.compiler.reset()
        # On the CPU, Inductor would spend a minute in g++ without exercising any GPU code.
        compiler = "inductor" if q[0].is_cuda else "aot_eager"
        fast_maps = torch.compile(maps, fullgraph=True, dynamic=False, backend=compiler)
        found["compiled maps"] = lambda: fast_maps(q, k, rows, prefix)
    if rows == "all":
        found["flash lse + columns"] = lambda: columns(q, k, flash_lse(q, k), prefix)
        if compiled:
            fast_columns = torch.compile(columns, fullgraph=True, dynamic=False, backend=compiler)
            found["flash lse + compiled columns"] = lambda: fast_columns(
                q, k, flash_lse(q, k), prefix
            )
        if find_spec("flash_colreduce"):
            found["flash-colreduce"] = lambda: flash_colreduce(q, k, prefix)
    return found


def cosine_topk(x: Tensor, prefix: int, count: int) -> Tensor:
    """The `count` patches least similar, on average, to the other patches of their image."""
    features = F.normalize(x[:, prefix:], dim=-1)
    similarity = features @ features.mean(dim=1)[..., None]
    return similarity[..., 0].topk(count, dim=1, largest=False).indices
