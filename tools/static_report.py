"""`python -m tools.static_report [OUT_DIR]`: facts about the GPU kernels, found without a GPU.

Nothing here is a measured time. Kernels are compiled and disassembled, launches are counted, and
bytes and flops are computed from them. A floor is the least time that such traffic can take.
"""

from __future__ import annotations

import argparse
import csv
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from ctypes import c_int32, c_int64, c_void_p
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch

from bench.models import published
from bench.ops import cuda_queue
from hivtp_kernels import PruneConfig
from hivtp_kernels.backends._quotas import quota_classes
from hivtp_kernels.types import Attention

from . import machine_code

LAYERS, HEADS, TOKENS, HEAD_DIM, CHANNELS = 3, 16, 577, 64, 1024  # CLIP-L/336, fp16
TOWER_LAYERS = 24
PATCHES = TOKENS - 1
PARAMS = PruneConfig().params
BATCHES = (1, 8)
KEPT = PARAMS.capacity * 5 + 4  # bytes of the selection of one image: indices, stages, count


class Gpu(NamedTuple):
    """Rates of a GPU: memory in GB/s, dense fp16 TFLOP/s with fp32 sums, L2 in MiB."""

    target: int
    bandwidth: float
    tensor: float
    l2: float
    source: str


GPUS = {
    "T4": Gpu(75, 320, 65, 4, "NVIDIA T4 datasheet; Turing architecture whitepaper"),
    "A100 80GB": Gpu(80, 2039, 312, 40, "NVIDIA A100 datasheet, SXM; Ampere (GA100) whitepaper"),
    "L40S": Gpu(89, 864, 362, 96, "NVIDIA L40S datasheet; Ada whitepaper"),
    "RTX 4090": Gpu(89, 1008, 165.2, 72, "NVIDIA Ada GPU architecture whitepaper"),
    "H100 SXM": Gpu(90, 3350, 989.4, 50, "NVIDIA H100 datasheet, halved from sparse; whitepaper"),
    "B200": Gpu(100, 8000, 2250, 126, "NVIDIA DGX B200 datasheet, of 8 and halved from sparse"),
    "RTX 5090": Gpu(120, 1792, 209.5, 96, "NVIDIA RTX Blackwell GPU architecture whitepaper"),
}

# Per op: rows, whether it selects, whether lse is given.
OPS = {
    "attention_scores cls": ("cls", False, False),
    "attention_scores all": ("all", False, False),
    "attention_scores all+lse": ("all", False, True),
    "score_and_select cls": ("cls", True, False),
    "score_and_select all": ("all", True, False),
    "score_and_select all+lse": ("all", True, True),
    "select_tokens": None,
    "gather_tokens": None,
}
# Targets of a call: at most so many launches, and so many bytes relative to the minimum.
LAUNCHES = {
    "score_and_select cls": 1,
    "score_and_select all": 2,
    "score_and_select all+lse": 1,
}
EXCESS = 1.2
REGISTERS = 128
# Kernels that the published code launches after the attention, a fact about that code. What is
# counted here is our implementation of its definition, bench/models/published.py.
PUBLISHED_OPS = 217
# A package with an equivalent of `attention_scores all`, compiled if it is installed.
FLASH = "flash-colreduce"


# ---- what is launched ----


def cuda_calls(folder: Path) -> Iterator[dict[str, Any]]:
    """Each launch and memset that each op queues, from the entry points of csrc/cuda."""
    library = cuda_queue.build(folder)
    data, null = c_void_p(1 << 20), c_void_p()  # an address that is never read
    queue = c_int32(0), null  # a device and a stream
    base, cut = quota_classes(PARAMS)
    params = cuda_queue.SelectParams(
        PARAMS.grid,
        PARAMS.regions,
        PARAMS.window,
        tuple(base),
        tuple(cut),
        PARAMS.capacity,
        PARAMS.fill,
    )
    selection = cuda_queue.Selection(data, data, data)
    size = TOKENS * HEAD_DIM
    for batch in BATCHES:
        images, capacity = c_int32(batch), c_int32(PARAMS.capacity)
        row = CHANNELS * 2
        x = cuda_queue.Features(data, TOKENS * row, row, row, batch, PATCHES, 1)
        for op, traits in OPS.items():
            arguments: tuple[Any, ...]
            if op == "select_tokens":
                arguments = (data, c_int64(PATCHES), images, params, selection, *queue)
            elif op == "gather_tokens":
                arguments = (x, data, capacity, data, *queue)
            elif traits:
                rows, fused, lse = traits
                attention = cuda_queue.Attention(
                    layers=LAYERS, batch=batch, heads=HEADS, tokens=TOKENS, head_dim=HEAD_DIM,
                    prefix=1, dtype=1, rows=rows == "all", scale=0.125,
                )  # fmt: skip
                for layer in range(LAYERS):
                    view = cuda_queue.View(data, HEADS * size, HEAD_DIM, HEADS * HEAD_DIM)
                    attention.q[layer] = attention.k[layer] = view
                    given = data if lse else null
                    attention.lse[layer] = cuda_queue.View(given, HEADS * TOKENS, TOKENS, 1)
                arguments = (attention, params, selection) if fused else (attention, data)
                arguments = (*arguments, data, *queue)
            status, lines = cuda_queue.queued(library, op.split()[0], *arguments)
            if status:
                raise RuntimeError(f"{op}: the entry point refuses with status {status}")
            for line in lines:
                kernel, *numbers = re.findall(r"\w+", line)
                call = {"backend": "cuda", "op": op, "batch": batch, "kernel": kernel}
                if kernel == "zero":
                    yield call | {"bytes": int(numbers[0])}
                else:
                    yield call | {
                        "blocks": int(numbers[0]),
                        "threads": int(numbers[2]),
                        "shared": int(numbers[4]),
                    }


def triton_ops(target: int) -> Iterator[tuple[str, Callable[[], object]]]:
    """Calls of the backend, on memory that is never read."""
    from hivtp_kernels.backends import triton as backend

    for batch in BATCHES:
        shape = batch, HEADS, TOKENS, HEAD_DIM
        k = [torch.empty(shape, dtype=torch.float16) for _ in range(LAYERS)]
        lse = [torch.empty(shape[:3]) for _ in range(LAYERS)]
        indices = torch.empty(batch, PARAMS.capacity, dtype=torch.int32)
        scores = torch.empty(batch, PATCHES)
        x = torch.empty(batch, TOKENS, CHANNELS, dtype=torch.float16)
        for op, traits in OPS.items():
            if traits:
                rows, fused, with_lse = traits
                if rows == "all" and target < 80:
                    continue  # no tensor cores for Triton, and the backend refuses
                q = [t[:, :, :1] for t in k] if rows == "cls" else k
                call = Attention(q, k, lse if with_lse else [], rows, 1, 0.125)
                if fused:
                    yield f"{op}/{batch}", lambda c=call: backend.score_and_select(c, PARAMS)
                else:
                    yield f"{op}/{batch}", lambda c=call: backend.attention_scores(c)
            elif op == "select_tokens":
                yield f"{op}/{batch}", lambda s=scores: backend.select_tokens(s, PARAMS)
            else:
                yield f"{op}/{batch}", lambda x=x, i=indices: backend.gather_tokens(x, i, 1)


def flash_ops(target: int) -> Iterator[tuple[str, Callable[[], object]]]:
    """Calls of flash-colreduce for `attention_scores all`; the caller reduces heads and layers.

    Its public function takes only CUDA tensors, so this calls the private one behind it.
    """
    import flash_colreduce

    reduce = flash_colreduce.flash._flash_colreduce
    for batch in BATCHES:
        k = [torch.empty(batch, HEADS, TOKENS, HEAD_DIM, dtype=torch.float16)] * LAYERS

        def scores_of(k: list[torch.Tensor] = k) -> torch.Tensor:
            columns = [reduce(t, t, "sum", False, 0.125) for t in k]
            return torch.stack(columns).mean((0, 2))[:, 1:] / TOKENS

        yield f"{FLASH}/{batch}", scores_of


def triton_lines(targets: Sequence[int]) -> Iterator[dict[str, Any]]:
    """Output of the Triton process: launches, and why flash-colreduce has none, if so."""
    yield from machine_code.compile_triton(targets, triton_ops)
    if not find_spec("flash_colreduce"):
        yield {"missing": "not installed: pip install flash-colreduce==0.2.2"}
        return
    import triton

    try:
        yield from machine_code.compile_triton([t for t in targets if t >= 80], flash_ops)
    except triton.compiler.errors.CompilationError as error:
        reason = str(error).strip().splitlines()[-1]
        yield {"missing": f"not compiled by Triton {triton.__version__}: {reason}"}


# ---- what it costs ----


def least_bytes(op: str, batch: int) -> int:
    """Minimum bytes of an op: each needed input once, each output once."""
    if op == "select_tokens":
        return batch * (PATCHES * 4 + KEPT)
    if op == "gather_tokens":
        return batch * PARAMS.capacity * (2 * CHANNELS * 2 + 4)
    rows, fused, lse = OPS["attention_scores all" if op == FLASH else op]
    heads = batch * LAYERS * HEADS
    queries = 1 if rows == "cls" else TOKENS
    return (
        heads * (TOKENS + queries) * HEAD_DIM * 2
        + lse * heads * queries * 4
        + batch * (KEPT if fused else PATCHES * 4)
    )


def traffic(op: str, batch: int, kernel: str, blocks: int, backend: str) -> tuple[int, int, int]:
    """Bytes that the blocks of a launch request, minimum bytes of memory traffic, and flops.

    A launch reads each byte from memory once, since what its blocks share hits in L2. Nothing stays
    in L2 for the next launch. Data handed between blocks is written once and read once.
    """
    # A launch of flash-colreduce covers one layer.
    heads = batch * HEADS * (1 if backend == FLASH else LAYERS)
    matrix, lse = heads * TOKENS * HEAD_DIM * 2, heads * TOKENS * 4
    if "select" in kernel:
        # Each stage reads the scores. In Triton the patches' stages, a byte each, go through memory
        # between the two.
        marks = batch * PATCHES if backend == "triton" else 0
        once = batch * (PATCHES * 4 + KEPT)
        return once + batch * 2 * PATCHES * 4 + 4 * marks, once + 2 * marks, 0
    if "gather" in kernel:
        rows = batch * PARAMS.capacity
        reads = 2 if backend == "triton" else 1  # of an index, once per tile of channels
        return rows * (2 * CHANNELS * 2 + 4 * reads), rows * (2 * CHANNELS * 2 + 4), 0
    sweeps = blocks // heads  # how many times the other matrix is streamed
    product = 2 * heads * TOKENS * TOKENS * HEAD_DIM
    if "lse" in kernel:
        return (1 + sweeps) * matrix + lse, 2 * matrix + lse, product
    if backend == FLASH:
        # A block streams k twice, and adds its sums to the others' by atomics.
        sums = heads * TOKENS * 4
        return (1 + 2 * sweeps) * matrix + sweeps * sums, 2 * matrix + 3 * sums, 2 * product
    fused = "score_and_select" in op
    partials = 2 * heads * PATCHES * 4  # the sums per head, written and read
    finish = partials + batch * (PATCHES * 4 + fused * (PATCHES * 4 + KEPT))
    if "cls" in kernel:
        logits = partials if backend == "triton" else 0  # written, read and overwritten
        row = heads * HEAD_DIM * 2
        return matrix + row + finish + logits, matrix + row + finish, product // TOKENS
    return (
        matrix + sweeps * (matrix + lse) + finish,
        2 * matrix + lse + finish,
        product,
    )


def floor_us(gpu: Gpu, moved: float, flops: float) -> float:
    return max(moved / gpu.bandwidth / 1e3, flops / gpu.tensor / 1e6)


def call_rows(launches: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row per backend, op and batch: launches, bytes, flops, floors."""
    calls: dict[tuple[str, str, int], list[dict[str, Any]]] = {}
    for launch in launches:
        calls.setdefault((launch["backend"], launch["op"], launch["batch"]), []).append(launch)
    rows = []
    for (backend, op, batch), queue in calls.items():
        kernels = [launch for launch in queue if launch["kernel"] != "zero"]
        memsets = len(queue) - len(kernels)
        costs = [traffic(op, batch, k["kernel"], k["blocks"], backend) for k in kernels]
        # torch.zeros is a fill; torch chooses between a kernel and a memset.
        torch_ops = kernels[0].get("torch_ops", 0)
        zeroed = 4 * batch * (memsets or torch_ops) if backend != FLASH else 0
        asked, memory, flops = (sum(column) for column in zip(*costs, strict=True))
        least = least_bytes(op, batch)
        # The products of cls do not use tensor cores, and are left out of its floor.
        one = (
            2 * batch * LAYERS * HEADS * TOKENS * TOKENS * HEAD_DIM * ("all" in op or "flash" in op)
        )
        held = 2 * batch * LAYERS * HEADS * TOKENS * HEAD_DIM * 2
        saved = held if len(kernels) == 2 else 0
        row = {
            "row": "call", "backend": backend, "op": op, "batch": batch,
            "kernels": len(kernels), "memsets": memsets, "torch_ops": torch_ops,
            "bytes_asked": asked + zeroed, "bytes_memory": memory + zeroed, "bytes_least": least,
            "excess": round((memory + zeroed) / least, 3),
            # If L2 keeps q and k from the first launch to the second.
            "excess_kept": round((memory + zeroed - saved) / least, 3),
            "keeps": ", ".join(n for n, g in GPUS.items() if saved and held <= g.l2 * 2**20),
            "flops": flops,
        }  # fmt: skip
        for name, gpu in GPUS.items():
            floor = sum(floor_us(gpu, cost[1], cost[2]) for cost in costs)
            row[f"floor_us {name}"] = round(floor, 2)
            # The floor of any implementation: minimum bytes and one product.
            row[f"least_us {name}"] = round(floor_us(gpu, least, one), 2)
        rows.append(row)
    return rows


def published_rows() -> list[dict[str, Any]]:
    """The published procedure for one image: the maps, and the ops that torch runs on them.

    Its flops are one product per layer, which the tower pays for anyway.
    """
    rows = []
    for dtype, name in ((torch.float16, "fp16"), (torch.float32, "fp32")):
        maps = {n: torch.rand(1, HEADS, TOKENS, TOKENS, dtype=dtype) for n in (6, 7, 8)}
        with machine_code.TorchOps() as counted:
            published.select(published.scores(maps, (6, 7, 8)))
        held = TOWER_LAYERS * maps[6].nbytes
        row = {
            "row": "published", "op": f"published, {name} maps", "batch": 1,
            "torch_ops": counted.count, "torch_ops_authors": PUBLISHED_OPS,
            "maps_bytes": held,
            # The maps, written once, and the counted ops.
            "bytes_memory": held + counted.bytes,
            "flops": 2 * TOWER_LAYERS * HEADS * TOKENS * TOKENS * HEAD_DIM,
            "bytes_least": least_bytes("score_and_select all", 1),
        }  # fmt: skip
        row["excess"] = round(row["bytes_memory"] / row["bytes_least"], 3)
        for gpu_name, gpu in GPUS.items():
            row[f"floor_us {gpu_name}"] = round(floor_us(gpu, row["bytes_memory"], 0), 2)
        rows.append(row)
    return rows


# ---- kernels ----


def kernel_rows(
    compiled: dict[int, dict[str, dict[str, Any]]],
    queued: Iterable[dict[str, Any]],
    triton: Iterable[dict[str, Any]],
) -> list[dict[str, Any]]:
    """One row per kernel and target, for the largest launch of the calls above."""
    found: dict[tuple[str, int, str, str], dict[str, Any]] = {}
    for launch in queued:
        for target, kernels in compiled.items():
            if launch["kernel"] in kernels:
                key = "cuda", target, launch["kernel"], ""
                shared = max(launch["shared"], found.get(key, {}).get("shared", 0))
                found[key] = kernels[launch["kernel"]] | {
                    "threads": launch["threads"], "shared": shared,
                }  # fmt: skip
    for target, kernels in compiled.items():
        for name, kernel in kernels.items():
            # Not launched at this shape and dtype: only the compiler's facts.
            found.setdefault(("cuda", target, name, ""), kernel)
    for launch in triton:
        variant = launch["case"].split("/")[0]
        found[("triton", launch["target"], launch["kernel"], variant)] = launch
    rows = []
    for (backend, target, name, variant), kernel in sorted(found.items()):
        static = max(0, kernel["static_shared"] - machine_code.MULTIPROCESSOR[target][3])
        row = {"row": "kernel", "backend": backend, "target": target, "kernel": name, "op": variant}
        row |= {k: kernel[k] for k in ("registers", "stack", "instructions", *machine_code.CLASSES)}
        row["product_loops"] = len(kernel["product_loops"])
        row["wide_loops"] = machine_code.wide(kernel) if scores(name) else ""
        if "threads" in kernel:
            shared = static + kernel["shared"]
            row |= {"threads": kernel["threads"], "shared": shared}
            row["occupancy"] = round(
                machine_code.occupancy(target, kernel["registers"], kernel["threads"], shared), 3
            )
        rows.append(row)
    return rows


def scores(kernel: str) -> bool:
    """Whether it is one of our kernels that multiply q by k."""
    return kernel.startswith(("cls_", "lse_", "columns_", "hivtp_cls", "hivtp_lse", "hivtp_col"))


def ours(row: dict[str, Any]) -> bool:
    return FLASH not in (row["backend"], row["op"])


# ---- targets ----


def targets(rows: list[dict[str, Any]]) -> list[tuple[str, list[str]]]:
    """Each target, and the calls or kernels that miss it."""
    calls = [r for r in rows if r["row"] == "call"]
    kernels = [r for r in rows if r["row"] == "kernel" and ours(r)]

    def name(row: dict[str, Any]) -> str:
        where = f"batch {row['batch']}" if row["row"] == "call" else f"sm_{row['target']}"
        what = row["op"] if row["row"] == "call" else f"{row['kernel']} {row['op']}".strip()
        return f"{row['backend']} {what}, {where}"

    def told(row: dict[str, Any]) -> str:
        kept = f"; {row['excess_kept']} if L2 keeps q and k: {row['keeps']}" * bool(row["keeps"])
        return f"{row['excess']}{kept}"

    judged = [
        (
            f"at most {limit} kernel{'s' * (limit > 1)} for {op}",
            [name(r) for r in calls if r["op"] == op and r["kernels"] > limit],
        )
        for op, limit in LAUNCHES.items()
    ]
    judged += [
        (
            f"bytes of memory at most {EXCESS} times the minimum",
            [f"{name(r)}: {told(r)}" for r in calls if ours(r) and r["excess"] > EXCESS],
        ),
        (
            "q and k read 16 bytes at a time in every loop that multiplies them",
            [name(r) for r in kernels if r["wide_loops"] is False],
        ),
        ("no spills", [name(r) for r in kernels if r["stack"]]),
        (
            f"registers at most {REGISTERS}",
            [name(r) for r in kernels if r["registers"] > REGISTERS],
        ),
    ]
    return judged


# ---- the whole ----


def compile_all(folder: Path) -> tuple[dict[int, Any], list[dict[str, Any]]]:
    """Compile the CUDA kernels and Triton's launches, two compilers at a time."""
    command = [sys.executable, "-m", "tools.static_report", "--triton"]

    def triton(targets: Sequence[int]) -> list[dict[str, Any]]:
        out = subprocess.run(
            [*command, *map(str, targets)], check=True, stdout=subprocess.PIPE, text=True,
            env=machine_code.environment(folder / "triton"),
        ).stdout  # fmt: skip
        return [json.loads(line) for line in out.splitlines() if line.startswith("{")]

    every = machine_code.TRITON_TARGETS
    with ThreadPoolExecutor(2) as pool:
        launches = [pool.submit(triton, part) for part in (every[::2], every[1::2])]
        kernels = pool.map(
            lambda t: machine_code.compile_cuda(t, folder), machine_code.CUDA_TARGETS
        )
        compiled = dict(zip(machine_code.CUDA_TARGETS, kernels, strict=True))
        return compiled, [launch for part in launches for launch in part.result()]


def triton_calls(launches: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """The launches of one target; other targets that take the op launch the same."""
    for launch in launches:
        if launch["target"] == 90:
            op, batch = launch["case"].split("/")
            call = {"backend": FLASH if op == FLASH else "triton", "op": op, "batch": int(batch)}
            yield call | {key: launch[key] for key in ("kernel", "blocks", "torch_ops")}


def report(folder: Path) -> list[dict[str, Any]]:
    compiled, lines = compile_all(folder)
    launches = [line for line in lines if "kernel" in line]
    queued = list(cuda_calls(folder))
    rows = kernel_rows(compiled, (q for q in queued if q["kernel"] != "zero"), launches)
    rows += call_rows([*queued, *triton_calls(launches)])
    rows += published_rows()
    for reason in {line["missing"] for line in lines if "missing" in line}:
        rows.append({"row": "kernel", "backend": FLASH, "op": reason})
    return rows


def table(rows: list[dict[str, Any]], columns: Sequence[str]) -> str:
    cells = [list(columns), *([str(row.get(c, "")) for c in columns] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in cells
    )


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(key for row in rows for key in row)))
        writer.writeheader()
        writer.writerows(rows)


def plot(path: Path, rows: list[dict[str, Any]]) -> None:
    """Plot computed floors of a call on each GPU, and bytes relative to the minimum."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    calls = [r for r in rows if r["row"] == "call" and r["batch"] == 1 and r["backend"] == "cuda"]
    calls = [r for r in calls if r["op"].startswith("score_and_select")]
    calls += [r for r in rows if r["row"] == "published"]
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4))
    width = 0.8 / len(calls)
    for number, row in enumerate(calls):
        places = [i + number * width for i in range(len(GPUS))]
        left.bar(places, [row[f"floor_us {name}"] for name in GPUS], width, label=row["op"])
    left.set_xticks(range(len(GPUS)), GPUS, rotation=30)
    left.set(title="floor of a call, one image: computed, not measured", ylabel="microseconds")
    left.set(yscale="log", ylim=(0.1, 1e5))  # room for the legend
    left.legend(fontsize=7, ncols=2)
    names = [row["op"] for row in calls]
    right.barh(names, [row["bytes_memory"] / 1e6 for row in calls], label="memory")
    right.barh(names, [row["bytes_least"] / 1e6 for row in calls], height=0.4, label="least")
    right.set(title="bytes of a call, one image: computed", xlabel="MB", xscale="log")
    right.invert_yaxis()
    right.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=100)
    pyplot.close(figure)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.static_report", description=__doc__)
    parser.add_argument("out", type=Path, nargs="?", default=Path("bench_out"))
    parser.add_argument("--triton", type=int, nargs="+", help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.triton:
        for launch in triton_lines(arguments.triton):
            print(json.dumps(launch), flush=True)
        return 0
    with tempfile.TemporaryDirectory() as folder:
        rows = report(Path(folder))
    kernels = [r for r in rows if r["row"] == "kernel"]
    calls = [r for r in rows if r["row"] != "kernel"]
    print(table(kernels, (
        "backend", "target", "kernel", "op", "registers", "stack", "shared", "threads", "occupancy",
        *machine_code.CLASSES, "wide_loops",
    )), "\n")  # fmt: skip
    print(table(calls, (
        "backend", "op", "batch", "kernels", "memsets", "torch_ops", "torch_ops_authors",
        "bytes_asked", "bytes_memory", "bytes_least", "excess", "excess_kept", "flops",
        *(f"floor_us {name}" for name in GPUS),
    )), "\n")  # fmt: skip
    for name, gpu in GPUS.items():
        print(f"{name}: {gpu.bandwidth} GB/s, {gpu.tensor} TFLOP/s ({gpu.source})")
    write(arguments.out / "static.csv", rows)
    plot(arguments.out / "static.png", rows)
    judged = targets(rows)
    for target, missed in judged:
        print(f"{'FAIL' if missed else 'pass'}  {target}", *missed, sep="\n        ")
    return 1 if any(missed for _, missed in judged) else 0


if __name__ == "__main__":
    sys.exit(main())
