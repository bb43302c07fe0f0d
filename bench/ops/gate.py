"""The limits that the CPU kernels must meet, relative to the machine's own in the same run.

A section has contestants and a judge, which turns their seconds into lines that pass or fail. The
machine's limits count at their best round, kernels at their median, and torch at the better of one
thread and all.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from hivtp_kernels import (
    PruneConfig,
    _extension,
    attention_scores,
    score_and_select,
    select_tokens,
)
from hivtp_kernels.backends import _native
from hivtp_kernels.backends._tensors import empty_selection
from hivtp_kernels.types import Attention

from ..models import published
from . import timing
from .cases import CLIP, attention
from .contest import Contestant, Samples, best, each_thread_count, median, rounds

MICROSECOND = 1e-6


@dataclass(frozen=True)
class Line:
    """One comparison: `value` must be at most, or at least, `limit`."""

    name: str
    value: float
    limit: float
    unit: str = "x"
    least: bool = False
    note: str = ""

    @property
    def passed(self) -> bool:
        return self.value >= self.limit if self.least else self.value <= self.limit

    def __str__(self) -> str:
        word = "at least" if self.least else "at most"
        limit = f"({word} {self.limit:g}{self.unit})"
        verdict = "pass" if self.passed else "FAIL"
        return f"{verdict}  {self.name:58} {self.value:8.2f}{self.unit:3} {limit:18} {self.note}"


@dataclass(frozen=True)
class Sizes:
    """Sizes of the inputs; tests use smaller ones."""

    grid: tuple[int, int] = CLIP
    large: tuple[int, int] = (64, 64)
    batch: int = 64
    layers: int = 3
    heads: int = 16
    square: int = 1024
    channels: int = 1024
    budget: int = 192


@dataclass(frozen=True)
class Section:
    """Contestants, and the judge of their seconds."""

    contestants: dict[str, Contestant]
    judge: Callable[[Samples], list[Line]]


def _bound(call: Callable[..., None], **arguments: object) -> Callable[..., None]:
    """Bind arguments to `call`, tensors as their addresses; the result keeps the tensors alive."""
    ready = {n: a.data_ptr() if isinstance(a, Tensor) else a for n, a in arguments.items()}

    def run(*, _alive: object = arguments, **rest: object) -> None:
        call(**ready, **rest)

    return run


def _us(seconds: float) -> str:
    return f"{1e6 * seconds:.1f} us" if seconds < 1e-3 else f"{1e3 * seconds:.2f} ms"


def sections(sizes: Sizes, threads: int) -> Iterator[Section]:
    """Yield the sections one by one, so that the inputs of one are freed before the next."""
    yield all_rows(sizes, threads)
    for batch in (1, sizes.batch):
        yield cls_row(sizes, batch, threads)
    for batch, limit in ((1, 20.0), (sizes.batch, 4.0)):
        yield select(sizes, batch, limit)
    for batch in (1, sizes.batch):
        yield gather(sizes, batch, threads)
    for rows in ("cls", "all"):
        yield half_precision(sizes, rows, threads)
    for rows in ("cls", "all"):
        yield growth(sizes, rows, threads)


def all_rows(sizes: Sizes, threads: int) -> Section:
    q, k = attention(sizes.grid, 1, torch.float32, layers=sizes.layers, heads=sizes.heads)
    _, heads, tokens, head_dim = k[0].shape
    a, b = torch.randn(2, sizes.square, sizes.square)
    product = torch.empty_like(a)
    block = torch.randn(32768 * threads)  # torch's grain per thread, so that all take part
    exponentials = torch.empty_like(block)
    pairs = sizes.layers * heads * tokens**2
    scale = head_dim**-0.5
    ones = torch.ones(1, tokens)
    logits, softmax = torch.empty(2, tokens, tokens)

    def softmax_mean() -> Tensor:
        return torch.stack(
            [(x * scale @ y.mT).softmax(-1).mean(dim=(1, 2)) for x, y in zip(q, k, strict=True)]
        ).mean(0)

    def sum_by_product() -> Tensor:
        total = torch.zeros(1, tokens)
        for x, y in zip(q, k, strict=True):
            total += (ones @ (x * scale @ y.mT).softmax(-1)).sum(dim=1)[0]
        return total / (sizes.layers * heads * tokens)

    def head_by_head() -> Tensor:
        total = torch.zeros(tokens)
        for x, y in zip(q, k, strict=True):
            for head in range(heads):
                torch.mm(x[0, head] * scale, y[0, head].mT, out=logits)
                total += torch.softmax(logits, dim=-1, out=softmax).sum(dim=0)
        return total / (sizes.layers * heads * tokens)

    config = PruneConfig(sizes.grid)

    def published_procedure() -> Tensor:
        maps = [(x @ y.mT * scale).softmax(-1) for x, y in zip(q, k, strict=True)]
        return published.select(published.scores(maps, range(sizes.layers)), sizes.grid)

    def fused() -> object:
        return score_and_select(q, k, config, rows="all", backend="cpu")

    assert torch.equal(fused().indices[0, : fused().counts[0]], published_procedure().int())
    ours = attention_scores(q, k, rows="all", backend="cpu")[0]
    formulations = {"maps": softmax_mean, "product": sum_by_product, "head by head": head_by_head}
    for formulation in formulations.values():
        torch.testing.assert_close(formulation().view(-1)[1:], ours, rtol=1e-4, atol=0)

    contestants = {
        "ours": Contestant(lambda: attention_scores(q, k, rows="all", backend="cpu"), threads),
        **each_thread_count("mm", lambda: torch.mm(a, b, out=product), threads),
        **each_thread_count("exp", lambda: torch.exp(block, out=exponentials), threads, calls=20),
    }
    for name, formulation in formulations.items():
        contestants |= each_thread_count(name, formulation, threads)
    contestants |= each_thread_count("published", published_procedure, threads)
    contestants["fused"] = Contestant(fused, threads)

    def judge(samples: Samples) -> list[Line]:
        products = 2 * pairs * head_dim / (2 * sizes.square**3) * best(samples, "mm")
        exponents = pairs / block.numel() * best(samples, "exp")
        time, limit = median(samples, "ours"), products + exponents
        note = f"{_us(time)} against {_us(products)} + {_us(exponents)}"
        maps_time, ratios = median(samples, "maps"), []
        for name in ("product", "head by head"):
            ratios.append(f"{name} {median(samples, name) / time:.2f}x")
        whole = median(samples, "published") / median(samples, "fused")
        ratios.append(f"score_and_select over the published procedure {whole:.2f}x")
        maps_note = f"{_us(maps_time)}; not judged: {', '.join(ratios)}"
        return [
            Line("attention_scores all, over Q K^T and exp", time / limit, 1.5, note=note),
            Line(
                "attention_scores all, faster than torch's mean of the maps",
                maps_time / time, 3.0, least=True, note=maps_note,
            ),
        ]  # fmt: skip

    return Section(contestants, judge)


def cls_row(sizes: Sizes, batch: int, threads: int) -> Section:
    flat, q, k = _keys(sizes, batch)
    C = _extension.extension()
    inputs = Attention(q, k, [], "cls", 1, k[0].shape[3] ** -0.5)
    ready = {"attention": _native.attention(C, inputs), "threads": threads}
    scores = torch.empty(batch, inputs.patches)
    workspace = _native.workspace(C.attention_scores_workspace(**ready), scores)
    kernel = _bound(C.attention_scores, **ready, scores=scores, workspace=workspace)

    def call() -> Tensor:
        return attention_scores(q, k, rows="cls", backend="cpu")

    kernel()
    assert torch.equal(scores, call())
    contestants = {"kernel": Contestant(kernel, threads), "call": Contestant(call, threads)}
    contestants |= each_thread_count("read sum", lambda: [t.sum() for t in flat], threads)
    contestants |= each_thread_count("read dot", lambda: [t.dot(t) for t in flat], threads)
    size = sum(t.nbytes for t in flat)

    def judge(samples: Samples) -> list[Line]:
        times = (median(samples, "kernel"), best(samples, "read"), median(samples, "call"))
        rate, limit, called = (size / time / 1e9 for time in times)
        note = f"{rate:.1f} of {limit:.1f} GB/s; the public call {called:.1f}"
        name = f"attention_scores cls kernel, of the read bandwidth, batch {batch}"
        return [Line(name, 100 * rate / limit, 60.0, "%", least=True, note=note)]

    return Section(contestants, judge)


def _keys(sizes: Sizes, batch: int) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    tokens = 1 + sizes.grid[0] * sizes.grid[1]
    flat = [torch.randn(batch * tokens * sizes.heads * 64) for _ in range(sizes.layers)]
    k = [t.view(batch, tokens, sizes.heads, 64).transpose(1, 2) for t in flat]
    return flat, [t[:, :, :1].clone() for t in k], k


def select(sizes: Sizes, batch: int, limit: float) -> Section:
    config = PruneConfig(sizes.grid)
    scores = torch.rand(batch, sizes.grid[0] * sizes.grid[1])
    C, params = _extension.extension(), config.params
    ready = {"params": _native.select_params(C, params), "threads": 1}
    kept = empty_selection(scores, params)
    selection = _native.selection(C, kept)
    workspace = _native.workspace(C.select_tokens_workspace(**ready), scores)
    into = _bound(
        C.select_tokens, **ready, scores=scores, image_stride=scores.stride(0), batch=batch,
        workspace=workspace,
    )  # fmt: skip

    def kernel(_alive: object = kept) -> None:
        into(selection=selection)

    def with_outputs() -> object:
        fresh = empty_selection(scores, params)
        into(selection=_native.selection(C, fresh))
        return fresh

    def op() -> object:
        return torch.ops.hivtp.select_tokens(scores, *params, "cpu")

    kernel()
    assert torch.equal(kept[0], select_tokens(scores, config, backend="torch").indices)
    calls = max(1, 64 // batch)
    contestants = {"kernel": Contestant(kernel, 1, calls)}
    if batch == 1:
        contestants |= _called(with_outputs, op, calls)

    def judge(samples: Samples) -> list[Line]:
        time = median(samples, "kernel")
        name = f"select_tokens kernel, per image, 1 thread, batch {batch}"
        lines = [Line(name, time / batch / MICROSECOND, limit, "us")]
        if batch == 1:
            lines.append(_overhead("select_tokens", samples))
        return lines

    return Section(contestants, judge)


def _called(
    with_outputs: Callable[[], object], op: Callable[[], object], calls: int
) -> dict[str, Contestant]:
    """The op, and its kernel with freshly allocated outputs, as the op has them."""
    return {"with outputs": Contestant(with_outputs, 1, calls), "op": Contestant(op, 1, calls)}


def _overhead(op: str, samples: Samples) -> Line:
    added = (median(samples, "op") - median(samples, "with outputs")) / MICROSECOND
    return Line(f"{op}, a call through torch.ops adds", added, 15.0, "us")


def gather(sizes: Sizes, batch: int, threads: int) -> Section:
    patches = sizes.grid[0] * sizes.grid[1]
    x = torch.randn(batch, 1 + patches, sizes.channels)
    config = PruneConfig(sizes.grid, budget=sizes.budget)
    indices = select_tokens(torch.rand(batch, patches), config, backend="torch").indices
    out = torch.empty(batch, sizes.budget, sizes.channels)
    C = _extension.extension()

    gather_into = _bound(
        C.gather_tokens, features=_native.features(C, x, 1), indices=indices, capacity=sizes.budget
    )

    def kernel() -> None:
        gather_into(out=out.data_ptr(), threads=torch.get_num_threads())

    def new_output() -> Tensor:
        fresh = torch.empty_like(out)
        gather_into(out=fresh.data_ptr(), threads=torch.get_num_threads())
        return fresh

    # torch gets the easier task: rows of one matrix, at known indices.
    rows = (indices.long() + 1 + torch.arange(batch)[:, None] * (1 + patches)).flatten()
    source, target = x.flatten(0, 1), torch.empty(batch * sizes.budget, sizes.channels)

    def index_select() -> None:
        torch.index_select(source, 0, rows, out=target)

    def new_selected() -> Tensor:
        return torch.index_select(source, 0, rows)

    kernel()
    index_select()
    assert torch.equal(out.flatten(0, 1), target)
    calls = max(1, 64 // batch)
    # The output for many images is so large that the system allocates new memory for it each time.
    ours, torchs = (kernel, index_select) if batch == 1 else (new_output, new_selected)
    contestants = each_thread_count("ours", ours, threads, calls)
    contestants |= each_thread_count("index_select", torchs, threads, calls)
    if batch == 1:
        # Rows of 32 bytes, since the time of large outputs depends on where they are allocated.
        narrow = x[:, :, :8].contiguous()
        narrow_out = torch.empty(1, sizes.budget, 8)
        narrow_into = _bound(
            C.gather_tokens, features=_native.features(C, narrow, 1), indices=indices,
            capacity=sizes.budget, threads=1,
        )  # fmt: skip

        def with_outputs() -> Tensor:
            fresh = torch.empty_like(narrow_out)
            narrow_into(out=fresh.data_ptr())
            return fresh

        def op() -> object:
            return torch.ops.hivtp.gather_tokens(narrow, indices, 1, "cpu")

        contestants |= _called(with_outputs, op, calls)

    def judge(samples: Samples) -> list[Line]:
        time, limit = median(samples, "ours"), median(samples, "index_select")
        note = f"{_us(time)} against {_us(limit)}"
        name = f"gather_tokens kernel, over index_select, batch {batch}"
        lines = [Line(name, time / limit, 1.0, note=note)]
        if batch == 1:
            lines.append(_overhead("gather_tokens", samples))
        return lines

    return Section(contestants, judge)


def half_precision(sizes: Sizes, rows: str, threads: int) -> Section:
    contestants = {}
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        q, k = attention(sizes.grid, 1, dtype, layers=sizes.layers, heads=sizes.heads)

        def run(q: list[Tensor] = q, k: list[Tensor] = k) -> Tensor:
            return attention_scores(q, k, rows=rows, backend="cpu")

        contestants[str(dtype)] = Contestant(run, threads, 5 if rows == "cls" else 1)

    def judge(samples: Samples) -> list[Line]:
        whole = samples["torch.float32"]
        return [
            Line(
                f"attention_scores {rows}, {name} over fp32",
                timing.paired_ratio(samples[f"torch.{name}"], whole), 1.0,
            )
            for name in ("float16", "bfloat16")
        ]  # fmt: skip

    return Section(contestants, judge)


def growth(sizes: Sizes, rows: str, threads: int) -> Section:
    """Time per unit of work, of large inputs relative to small ones.

    The unit is one scored pair of tokens.
    """
    power = 1 if rows == "cls" else 2
    variants = {
        "few": (sizes.grid, max(sizes.batch // 8, 1), 1),
        f"{sizes.batch} images": (sizes.grid, sizes.batch, 1),
        "8 layers": (sizes.grid, max(sizes.batch // 8, 1), 8),
        f"{sizes.large[0]}x{sizes.large[1]} grid": (sizes.large, 1, 1),
    }
    contestants, work = {}, {}
    for name, (grid, batch, layers) in variants.items():
        q, k = attention(grid, batch, torch.float32, layers=layers, heads=sizes.heads)

        def run(q: list[Tensor] = q, k: list[Tensor] = k) -> Tensor:
            return attention_scores(q, k, rows=rows, backend="cpu")

        contestants[name] = Contestant(run, threads)
        work[name] = layers * batch * (1 + grid[0] * grid[1]) ** power

    def judge(samples: Samples) -> list[Line]:
        unit = {name: median(samples, name) / work[name] for name in variants}
        return [
            Line(f"attention_scores {rows}, unit of work, {name}", unit[name] / unit["few"], 1.25)
            for name in list(variants)[1:]
        ]

    return Section(contestants, judge)


def main(count: int, force: bool, sizes: Sizes | None = None) -> bool:
    """Print one line per limit; returns whether all hold."""
    if reason := _extension.unavailable():
        raise SystemExit(f"--gate cpu needs the backend cpu: {reason}")
    if count < 15 and not force:
        raise SystemExit(f"--rounds must be at least 15 to judge, got {count}; --force overrides")
    if busy := timing.load():
        print(f"{busy}\n")
        if not force:
            raise SystemExit("no judgement on a busy machine; --force overrides")
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    print(f"{timing.machine()}, {threads} threads, {count} rounds\n")
    lines: list[Line] = []
    for section in sections(sizes or Sizes(), threads):
        for line in section.judge(rounds(section.contestants, count)):
            print(line)
            sys.stdout.flush()
            lines.append(line)
    failed = sum(not line.passed for line in lines)
    print(f"\n{len(lines) - failed} of {len(lines)} lines pass")
    return failed == 0
