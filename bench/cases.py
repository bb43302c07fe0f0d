"""What is timed: each op at each shape, dtype and backend, with its least traffic and its check."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from hivtp_kernels import (
    PruneConfig,
    Selection,
    attention_scores,
    gather_tokens,
    pack_tokens,
    score_and_select,
    select_tokens,
)
from hivtp_kernels.backends import NAMES, load

TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
CLIP = (24, 24)


@dataclass(frozen=True)
class Case:
    """One row of the sweep.

    Attributes
    ----------
    op, shape, dtype, backend : str
        Its name; contestants share all but the backend.
    run : callable
        The public call.
    check : callable
        Whether its output is right, against the backend `torch` in fp64, which is not timed.
    bytes, flops : int
        The least it can move (each input it needs once, each output once), and its products.
    """

    op: str
    shape: str
    dtype: str
    backend: str
    run: Callable[[], object]
    check: Callable[[], bool]
    bytes: int
    flops: int


def attention(
    grid: tuple[int, int],
    batch: int,
    dtype: torch.dtype,
    *,
    layers: int = 3,
    heads: int = 16,
    head_dim: int = 64,
    device: str = "cpu",
) -> tuple[list[Tensor], list[Tensor]]:
    """`q` and `k` of each layer as a projection leaves them: `[B, T, heads * D]`, transposed."""
    generator = torch.Generator().manual_seed(0)
    tokens = 1 + grid[0] * grid[1]

    def projection() -> Tensor:
        flat = torch.randn(batch, tokens, heads * head_dim, generator=generator).to(device, dtype)
        return flat.view(batch, tokens, heads, head_dim).transpose(1, 2)

    return [projection() for _ in range(layers)], [projection() for _ in range(layers)]


def cases(
    device: str = "cpu", quick: bool = False, batches: tuple[int, ...] = (1, 8, 64)
) -> Iterator[list[Case]]:
    """Groups of contestants. Quick: one small shape of each op."""
    grids = [(4, 4)] if quick else [CLIP, (64, 64)]
    dtypes = [torch.float32] if quick else list(TOLERANCE)
    # A kernel in Triton's interpreter says nothing of its speed.
    names = [name for name in NAMES if not (name == "triton" and device == "cpu")]
    backends = [n for n in names if load(n).unavailable(torch.device(device)) is None]
    for grid in grids:
        for batch in batches[:1] if quick else batches:
            # Beyond the paper's grid one image says it all: the cost is linear in them.
            if grid != CLIP and batch != 1:
                continue
            for dtype in dtypes:
                yield from _scores(grid, batch, dtype, backends, device)
            yield _select(grid, batch, backends, device)
            for dtype in dtypes:
                yield from _rows(grid, batch, dtype, backends, device)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _runs(backend: str, device: str, rows: str) -> bool:
    return load(backend).unavailable(torch.device(device), rows) is None


def _close(scores: Tensor, q: list[Tensor], k: list[Tensor], rows: str) -> bool:
    """The first and last image against fp64, one head at a time so that long maps fit."""
    tolerance = TOLERANCE[k[0].dtype]
    for image in {0, scores.shape[0] - 1}:
        expected = torch.zeros(scores.shape[1], dtype=torch.float64, device=scores.device)
        heads = k[0].shape[1]
        for head in range(heads):
            alone = [[t[image, None, head, None] for t in tensors] for tensors in (q, k)]
            expected += attention_scores(*alone, rows=rows, backend="torch")[0].double()
        expected /= heads
        if not bool(((scores[image] - expected).abs() <= tolerance * expected).all()):
            return False
    return True


def _same(got: Selection, expected: Selection) -> bool:
    return all(torch.equal(a, b) for a, b in zip(got[:3], expected[:3], strict=True))


def _scores(
    grid: tuple[int, int], batch: int, dtype: torch.dtype, backends: list[str], device: str
) -> Iterator[list[Case]]:
    q, k = attention(grid, batch, dtype, device=device)
    layers, (_, heads, tokens, head_dim) = len(k), k[0].shape
    shape = f"{layers}x[{batch}, {heads}, {tokens}, {head_dim}]"
    config = PruneConfig(grid)
    one = sum(t.nbytes for t in k)
    for rows in ("cls", "all"):
        # Maps of 4097 rows, and a batch of them, are what the backend torch is not for.
        fits = rows == "cls" or (grid == CLIP and batch == 1) or tokens < 100
        queries = one // tokens if rows == "cls" else one
        flops = 2 * layers * batch * heads * (1 if rows == "cls" else tokens) * tokens * head_dim
        names = [b for b in backends if _runs(b, device, rows) and (fits or b != "torch")]
        scoring, fused = [], []
        for name in names:

            def score(name: str = name, rows: str = rows) -> Tensor:
                return attention_scores(q, k, rows=rows, backend=name)

            def prune(name: str = name, rows: str = rows) -> Selection:
                return score_and_select(q, k, config, rows=rows, backend=name)

            def right_scores(score=score, rows: str = rows) -> bool:  # type: ignore[no-untyped-def]
                return _close(score(), q, k, rows)

            def right_kept(score=score, prune=prune, name: str = name) -> bool:  # type: ignore[no-untyped-def]
                return _same(prune(), select_tokens(score(), config, backend="torch"))

            scores = batch * (tokens - 1) * 4
            kept = batch * (config.capacity * 5 + 4)
            common = (shape, _name(dtype), name)
            moved = one + queries
            scoring.append(
                Case(
                    f"attention_scores {rows}", *common, score, right_scores, moved + scores, flops
                )
            )
            fused.append(
                Case(f"score_and_select {rows}", *common, prune, right_kept, moved + kept, flops)
            )
        yield scoring
        yield fused


def _select(grid: tuple[int, int], batch: int, backends: list[str], device: str) -> list[Case]:
    patches = grid[0] * grid[1]
    config = PruneConfig(grid)
    generator = torch.Generator().manual_seed(1)
    scores = torch.rand(batch, patches, generator=generator).to(device)
    group = []
    for name in backends:

        def run(name: str = name) -> Selection:
            return select_tokens(scores, config, backend=name)

        def right(run=run) -> bool:  # type: ignore[no-untyped-def]
            return _same(run(), select_tokens(scores, config, backend="torch"))

        moved = scores.nbytes + batch * (config.capacity * 5 + 4)
        shape = f"[{batch}, {grid[0]}, {grid[1]}]"
        group.append(Case("select_tokens", shape, "float32", name, run, right, moved, 0))
    return group


def _rows(
    grid: tuple[int, int], batch: int, dtype: torch.dtype, backends: list[str], device: str
) -> Iterator[list[Case]]:
    patches = grid[0] * grid[1]
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(batch, 1 + patches, 1024, generator=generator).to(device, dtype)
    scores = torch.rand(batch, patches, generator=generator).to(device)
    kept = select_tokens(scores, PruneConfig(grid, budget=max(patches // 3, 4)), backend="torch")
    shape = f"{list(x.shape)} -> {kept.indices.shape[1]}"
    # Every index is a patch in budget mode, so the two ops move the same rows.
    picked = x[torch.arange(batch, device=device)[:, None], kept.indices.long() + 1]
    moved = 2 * picked.nbytes + kept.indices.nbytes
    gathers, packs = [], []
    for name in backends:

        def gather(name: str = name) -> Tensor:
            return gather_tokens(x, kept, backend=name)

        def pack(name: str = name) -> Tensor:
            return pack_tokens(x, kept, backend=name)[0]

        def right_gather(gather=gather) -> bool:  # type: ignore[no-untyped-def]
            return torch.equal(gather(), picked)

        def right_pack(pack=pack) -> bool:  # type: ignore[no-untyped-def]
            return torch.equal(pack(), picked.flatten(0, 1))

        common = (shape, _name(dtype), name)
        gathers.append(Case("gather_tokens", *common, gather, right_gather, moved, 0))
        if device == "cpu":  # it synchronises, so no CUDA graph can hold it
            packs.append(Case("pack_tokens", *common, pack, right_pack, moved, 0))
    yield gathers
    if packs:
        yield packs
