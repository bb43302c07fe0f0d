"""The cases: each op at each shape, dtype and backend, with its minimum traffic and its check."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

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
from hivtp_kernels.testing import TOLERANCE, random_qk, scores_close

from . import rivals

CLIP = (24, 24)
SIGLIP = (27, 27)


@dataclass(frozen=True)
class Case:
    """One line of the sweep.

    Attributes
    ----------
    op, shape, dtype, backend : str
        Its name; contestants differ only in the backend.
    run : callable
        The public call.
    check : callable
        Whether its output is correct, compared with the backend `torch` in fp64. Not timed.
    bytes, flops : int
        The minimum traffic (each needed input and each output once), and the flops of products.
    rival : bool
        Not an op of this package: it may be wrong or fail to run.
    """

    op: str
    shape: str
    dtype: str
    backend: str
    run: Callable[[], object]
    check: Callable[[], bool]
    bytes: int
    flops: int
    rival: bool = False


@dataclass(frozen=True)
class Shape:
    """Layers of attention over a batch of images. With `prefix=0` there is no CLS token.

    `compiled` adds rivals under torch.compile, which takes seconds per shape.
    """

    grid: tuple[int, int]
    batch: int = 1
    dtypes: tuple[torch.dtype, ...] = tuple(TOLERANCE)
    prefix: int = 1
    layers: int = 3
    heads: int = 16
    head_dim: int = 64
    compiled: bool = False

    @property
    def patches(self) -> int:
        return self.grid[0] * self.grid[1]


def attention(
    grid: tuple[int, int],
    batch: int,
    dtype: torch.dtype,
    *,
    prefix: int = 1,
    layers: int = 3,
    heads: int = 16,
    head_dim: int = 64,
    device: str = "cpu",
) -> tuple[list[Tensor], list[Tensor]]:
    """`q` and `k` per layer for the patches of a grid, with the strides of a projection."""
    tokens = prefix + grid[0] * grid[1]
    return random_qk(layers, batch, heads, tokens, head_dim, dtype, device=device, interleaved=True)


def cases(
    device: str = "cpu",
    quick: bool = False,
    batches: tuple[int, ...] = (1, 8, 64),
    rehearse: bool = False,
) -> Iterator[list[Case]]:
    """Groups of contestants: the GPU sweep on a GPU or in a rehearsal, else the CPU sweep.

    `quick` uses fewer shapes.
    """
    gpu = rehearse or device == "cuda"
    # The time of Triton's interpreter says nothing about the kernel's.
    names = [name for name in NAMES if not (name == "triton" and device == "cpu")]
    backends = [n for n in names if load(n).unavailable(torch.device(device)) is None]
    if rehearse:
        shapes = _tiny_shapes()
    elif gpu:
        shapes = _gpu_shapes(quick)
    else:
        shapes = _cpu_shapes(quick, batches)
    for shape in shapes:
        for dtype in shape.dtypes:
            yield from _scores(shape, dtype, backends, device, gpu)
        yield _select(shape, backends, device)
        for dtype in shape.dtypes:
            yield from _rows(shape, dtype, backends, device, gpu)


def _cpu_shapes(quick: bool, batches: tuple[int, ...]) -> list[Shape]:
    if quick:
        return [Shape((4, 4), dtypes=(torch.float32,))]
    # For grids beyond the paper's, one image is enough: the cost is linear in their number.
    return [*(Shape(CLIP, batch) for batch in batches), Shape((64, 64))]


def _gpu_shapes(quick: bool) -> list[Shape]:
    half = (torch.float16, torch.bfloat16)
    clip = Shape(CLIP, compiled=True)
    siglip = Shape(SIGLIP, dtypes=half, prefix=0, head_dim=72, compiled=True)
    if quick:
        return [replace(shape, dtypes=half[:1]) for shape in (clip, siglip)]
    return [
        clip,
        replace(clip, batch=8, dtypes=half, compiled=False),
        replace(clip, batch=64, dtypes=half),
        siglip,
        replace(siglip, batch=8, compiled=False),
        replace(siglip, batch=64, compiled=False),
        Shape((64, 64), dtypes=half),
    ]


def _tiny_shapes() -> list[Shape]:
    tiny = Shape((4, 4), 2, (rivals.DTYPE,), layers=1, heads=2, head_dim=16, compiled=True)
    return [tiny, replace(tiny, grid=(5, 3), batch=8, prefix=0, head_dim=24, compiled=False)]


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _runs(backend: str, device: str, rows: str) -> bool:
    return load(backend).unavailable(torch.device(device), rows) is None


def _fp64(q: list[Tensor], k: list[Tensor], rows: str, prefix: int, image: int) -> Tensor:
    """Scores of one image, computed head by head so that long maps fit in memory."""
    heads = k[0].shape[1]
    total = torch.zeros(k[0].shape[2] - prefix, dtype=torch.float64, device=k[0].device)
    for head in range(heads):
        alone = [[t[image, None, head, None] for t in tensors] for tensors in (q, k)]
        scores = attention_scores(*alone, rows=rows, prefix=prefix, backend="torch")
        total += scores[0].double()
    return total / heads


def _close(scores: Tensor, expected: Callable[[int], Tensor], tolerance: float) -> bool:
    """Compare the first and last image with their scores in fp64."""
    images = {0, scores.shape[0] - 1}
    return all(scores_close(scores[image], expected(image), tolerance) for image in images)


def _same(got: Selection, expected: Selection) -> bool:
    return all(torch.equal(a, b) for a, b in zip(got[:3], expected[:3], strict=True))


def _scores(
    shape: Shape, dtype: torch.dtype, backends: list[str], device: str, gpu: bool = False
) -> Iterator[list[Case]]:
    q, k = attention(
        shape.grid, shape.batch, dtype, prefix=shape.prefix, layers=shape.layers,
        heads=shape.heads, head_dim=shape.head_dim, device=device,
    )  # fmt: skip
    # Without a CLS token there is no CLS row.
    for rows in ("cls", "all") if shape.prefix else ("all",):
        yield from _attention_groups(shape, q, k, rows, backends, gpu)


def _attention_groups(
    shape: Shape, q: list[Tensor], k: list[Tensor], rows: str, backends: list[str], gpu: bool
) -> Iterator[list[Case]]:
    layers, dtype, prefix, config = len(k), k[0].dtype, shape.prefix, PruneConfig(shape.grid)
    batch, heads, tokens, head_dim = k[0].shape
    queries = 1 if rows == "cls" else tokens
    read = layers * k[0].nbytes // tokens * (queries + tokens)
    flops = 2 * layers * batch * heads * queries * tokens * head_dim
    expected = functools.cache(functools.partial(_fp64, q, k, rows, prefix))

    def scoring(backend: str, score: Callable[[], Tensor], rival: bool = False) -> Case:
        def right() -> bool:
            tolerance = rivals.TOLERANCE if rival else TOLERANCE[dtype]
            return _close(score(), expected, tolerance)

        written = batch * shape.patches * 4
        return case("attention_scores", backend, score, right, written, rival)

    def fused(
        backend: str, prune: Callable[[], object], right: Callable[[], bool], rival: bool = False
    ) -> Case:
        written = batch * (config.capacity * 5 + 4)
        return case("score_and_select", backend, prune, right, written, rival)

    def case(
        op: str,
        backend: str,
        run: Callable[[], object],
        right: Callable[[], bool],
        written: int,
        rival: bool,
    ) -> Case:
        name = f"{layers}x{list(k[0].shape)}"
        common = (f"{op} {rows}", name, _name(dtype), backend, run, right)
        return Case(*common, read + written, flops, rival)

    def ours(backend: str) -> tuple[Case, Case]:
        def score() -> Tensor:
            return attention_scores(q, k, rows=rows, prefix=prefix, backend=backend)

        def prune() -> Selection:
            return score_and_select(q, k, config, rows=rows, prefix=prefix, backend=backend)

        def right() -> bool:
            return _same(prune(), select_tokens(score(), config, backend="torch"))

        return scoring(backend, score), fused(backend, prune, right)

    def theirs(name: str, score: Callable[[], Tensor]) -> tuple[Case, Case]:
        scored = scoring(name, score, rival=True)

        def topk() -> Tensor:
            return score().topk(config.capacity, dim=1).indices

        return scored, fused(f"{name} + topk", topk, scored.check, rival=True)

    # The backend torch is not meant for maps of 4097 rows, nor for batches of maps. On a GPU, only
    # a rehearsal times its fp64.
    fits = batch * tokens**2 <= 2_000 if gpu else rows == "cls" or batch * tokens**2 <= 600_000
    names = [b for b in backends if _runs(b, k[0].device.type, rows) and (fits or b != "torch")]
    contestants = [ours(backend) for backend in names]
    if gpu and dtype == rivals.DTYPE:
        found = rivals.scores(q, k, rows, prefix, shape.compiled)
        contestants += [theirs(name, score) for name, score in found.items()]
    for group in zip(*contestants, strict=True):
        yield list(group)


def _select(shape: Shape, backends: list[str], device: str) -> list[Case]:
    config = PruneConfig(shape.grid)
    generator = torch.Generator(device).manual_seed(1)
    scores = torch.rand(shape.batch, shape.patches, generator=generator, device=device)
    group = []
    for backend in backends:

        def run(backend: str = backend) -> Selection:
            return select_tokens(scores, config, backend=backend)

        def right(run=run) -> bool:  # type: ignore[no-untyped-def]
            return _same(run(), select_tokens(scores, config, backend="torch"))

        moved = scores.nbytes + shape.batch * (config.capacity * 5 + 4)
        name = f"[{shape.batch}, {shape.grid[0]}, {shape.grid[1]}]"
        group.append(Case("select_tokens", name, "float32", backend, run, right, moved, 0))
    return group


def _rows(
    shape: Shape, dtype: torch.dtype, backends: list[str], device: str, gpu: bool = False
) -> Iterator[list[Case]]:
    batch, prefix, patches, grid = shape.batch, shape.prefix, shape.patches, shape.grid
    size = (batch, prefix + patches, shape.heads * shape.head_dim)
    generator = torch.Generator(device).manual_seed(2)
    x = torch.randn(size, generator=generator, device=device).to(dtype)
    scores = torch.rand(batch, patches, generator=generator, device=device)
    kept = select_tokens(scores, PruneConfig(grid, budget=max(patches // 3, 4)), backend="torch")
    name = f"{list(x.shape)} -> {kept.indices.shape[1]}"
    # In budget mode there is no padding, so the two ops move the same rows.
    picked = x[torch.arange(batch, device=device)[:, None], kept.indices.long() + prefix]
    moved = 2 * picked.nbytes + kept.indices.nbytes
    gathers, packs = [], []
    for backend in backends:

        def gather(backend: str = backend) -> Tensor:
            return gather_tokens(x, kept, backend=backend)

        def pack(backend: str = backend) -> Tensor:
            return pack_tokens(x, kept, backend=backend)[0]

        def right_gather(gather=gather) -> bool:  # type: ignore[no-untyped-def]
            return torch.equal(gather(), picked)

        def right_pack(pack=pack) -> bool:  # type: ignore[no-untyped-def]
            return torch.equal(pack(), picked.flatten(0, 1))

        common = (name, _name(dtype), backend)
        gathers.append(Case("gather_tokens", *common, gather, right_gather, moved, 0))
        if not gpu:  # it synchronizes, so it cannot be captured in a CUDA graph
            packs.append(Case("pack_tokens", *common, pack, right_pack, moved, 0))
    yield gathers
    if packs:
        yield packs
    if gpu and dtype == rivals.DTYPE:
        count = PruneConfig(grid).capacity

        def cosine() -> Tensor:
            return rivals.cosine_topk(x, prefix, count)

        def right_shape() -> bool:
            return cosine().shape == (batch, count)

        # A separate op: it reads only features, and keeps other patches.
        name = f"{list(x.shape)} -> {count}"
        read, written = x.nbytes, batch * count * 8
        yield [
            Case("cosine topk", name, _name(dtype), "eager", cosine, right_shape, read + written,
                 0, rival=True)
        ]  # fmt: skip
