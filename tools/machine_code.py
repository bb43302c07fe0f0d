"""Compile the kernels without a GPU and inspect them: registers, memory, instructions.

The one place that compiles, disassembles and counts, for `static_report` and the tests.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch.utils._python_dispatch import TorchDispatchMode

SOURCES = Path(__file__).parents[1] / "csrc"
CUDA_TARGETS = (75, 80, 86, 89, 90, 100, 120)
TRITON_TARGETS = (75, 80, 90, 100, 120)

# Classes of instructions, by regular expressions on their names; the first match counts.
CLASSES = {
    "load_128": r"LDG\..*\.(128|256)$|LDG\..*\.(128|256)\.",
    "load_64": r"LDG\..*\.64(\.|$)",
    "load_narrow": r"LDG\..*\.[US](8|16)(\.|$)",
    "load_32": r"LDG\.",
    # cp.async of 16 bytes; bulk and tensor copies are wider.
    "async_16": r"LDGSTS\..*\.128|UTMALDG|UBLKCP",
    "async_narrow": r"LDGSTS",
    "store": r"STG|UTMASTG",
    "tensor_core": r"U?[A-Z]*MMA(\.|$)",
    "shuffle": r"SHFL",
    "barrier": r"BAR\.|SYNCS",
    "special": r"MUFU",
    "atomic": r"(ATOMG?|REDG?)(\.|$)",
    "multiply": r"F(FMA|MUL)2?(\.|$)|HFMA2(\.|$)",
}
GLOBAL_READS = ("load_128", "load_64", "load_narrow", "load_32", "async_16", "async_narrow")
INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z]\w*(?:\.\w+)*)(.*)")
LABEL = re.compile(r"^(\.L\w+):")
# Per multiprocessor: threads, blocks, bytes of shared memory; then the bytes of shared memory that
# the system reserves per block. CUDA C++ Programming Guide 13.0, "Technical Specifications per
# Compute Capability".
MULTIPROCESSOR = {
    75: (1024, 16, 64 << 10, 0),
    80: (2048, 32, 164 << 10, 1024),
    86: (1536, 16, 100 << 10, 1024),
    89: (1536, 24, 100 << 10, 1024),
    90: (2048, 32, 228 << 10, 1024),
    100: (2048, 32, 228 << 10, 1024),
    120: (1536, 24, 100 << 10, 1024),
}


def tool(name: str) -> str | None:
    """Path of a CUDA toolkit program; without a toolkit, of the one from PyPI or Triton."""
    path = shutil.which(name)
    if path is None and name == "nvcc" and (installed := find_spec("nvidia")):
        folders = installed.submodule_search_locations or []
        path = next((str(p) for f in folders for p in Path(f).glob("cu*/bin/nvcc")), None)
    if path is None and name != "nvcc" and find_spec("triton"):
        from triton import knobs

        path = getattr(knobs.nvidia, name).path
    return path


def _output(*command: Any) -> str:
    if command[0] is None:
        raise FileNotFoundError("nvcc, nvdisasm and cuobjdump are needed: CUDA, PyPI or Triton")
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def inspect(cubin: Path) -> dict[str, dict[str, Any]]:
    """The resources of each kernel in a cubin, and its instructions by class."""
    usage = _output(tool("cuobjdump"), "--dump-resource-usage", cubin)
    text = _output(tool("nvdisasm"), "-c", cubin)
    code = dict(re.findall(r"^//-+ \.text\.(\w+) +-+$(.*?)(?=^//-|\Z)", text, re.M | re.S))
    found = re.findall(r"Function (\w+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", usage)
    return {
        name: {
            "registers": int(registers),
            "stack": int(stack) + int(local),
            "static_shared": int(shared),
            **count(code[name]),
        }
        for name, registers, stack, shared, local in found
    }


@cache
def classify(opcode: str) -> str | None:
    return next((name for name, rule in CLASSES.items() if re.match(rule, opcode)), None)


def count(code: str) -> dict[str, Any]:
    """Instructions by class, and `product_loops`: the same for each loop that reads and multiplies.

    A loop is the code between a label and a branch back to it. Of nested loops, the innermost one
    that reads global memory counts, so a walk along a row in shared memory is not a separate loop.
    """
    classes: list[str | None] = []
    labels: dict[str, int] = {}
    loops = []
    for line in code.splitlines():
        if label := LABEL.match(line):
            labels[label[1]] = len(classes)
        elif instruction := INSTRUCTION.match(line):
            classes.append(classify(instruction[1]))
            target = re.search(r"`\((\.L\w+)\)", instruction[2])
            if instruction[1].startswith("BRA") and target and target[1] in labels:
                loops.append((labels[target[1]], len(classes)))

    def tally(begin: int, end: int) -> dict[str, int]:
        part = classes[begin:end]
        return {name: part.count(name) for name in CLASSES}

    reading = [span for span in loops if any(tally(*span)[name] for name in GLOBAL_READS)]
    inner = [
        (a, b) for a, b in reading if not any((c, d) != (a, b) and a <= c and d <= b
                                              for c, d in reading)
    ]  # fmt: skip
    inner_tallies = [tally(*span) for span in inner]
    # A loop without tensor cores is a product if it multiplies and its lanes exchange rows or sums.
    # Loops that take exp of each element multiply too, but exchange nothing.
    products = [
        t
        for t in inner_tallies
        if t["tensor_core"] or (t["multiply"] >= 16 and t["shuffle"] + t["barrier"])
    ]
    return {"instructions": len(classes), **tally(0, len(classes)), "product_loops": products}


def wide(kernel: dict[str, Any]) -> bool:
    """Whether every loop that multiplies rows of q and k reads them 16 bytes at a time."""
    return bool(kernel["product_loops"]) and all(
        loop["load_128"] + loop["async_16"]
        and not loop["load_64"] + loop["load_narrow"] + loop["async_narrow"]
        for loop in kernel["product_loops"]
    )


def occupancy(target: int, registers: int, threads: int, shared: int) -> float:
    """The share of a multiprocessor's warps that its limits allow."""
    most_threads, blocks, bytes_all, reserved = MULTIPROCESSOR[target]
    warps = -(-threads // 32)
    # Registers are allocated in units of 256 per warp, to four warps at a time.
    by_registers = 65536 // (-(-registers * 32 // 256) * 256) // 4 * 4 // warps
    granule = 256 if target == 75 else 128
    of_block = -(-(shared + reserved) // granule) * granule
    by_shared = bytes_all // of_block if of_block else blocks
    return (
        min(blocks, most_threads // 32 // warps, by_registers, by_shared)
        * warps
        * 32
        / (most_threads)
    )


def compile_cuda(target: int, folder: Path) -> dict[str, dict[str, Any]]:
    """Compile all CUDA kernels for `sm_{target}`, with warnings as errors, and inspect them."""
    kernels = sorted((SOURCES / "cuda" / "kernels").glob("*.cu"))
    source, cubin = folder / f"sm_{target}.cu", folder / f"sm_{target}.cubin"
    source.write_text("".join(f'#include "{path.name}"\n' for path in kernels))
    command = [tool("nvcc"), "-cubin", f"-arch=sm_{target}", "-std=c++17", "-o", cubin, source]
    command += [f"-I{SOURCES / 'include'}", f"-I{SOURCES / 'cuda' / 'kernels'}"]
    _output(*command, "-Werror=all-warnings", "-Xptxas=-v,-Werror")
    return inspect(cubin)


class TorchOps(TorchDispatchMode):
    """Counts torch's own ops, except for allocations and views, and the bytes they move."""

    def __init__(self) -> None:
        super().__init__()
        self.count = self.bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = function(*args, **(kwargs or {}))
        name = function.overloadpacket.__name__
        # _unsafe_view is a view too, although its schema does not say so.
        if not name.startswith(("empty", "new_empty", "_unsafe_view")) and not function.is_view:
            self.count += 1
            tensors = torch.utils._pytree.tree_leaves((args, kwargs, result))
            self.bytes += sum(t.nbytes for t in tensors if isinstance(t, torch.Tensor))
        return result


class CompileOnly:
    """A Triton driver for an absent device."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return self.capability

    def get_current_stream(self, device: int) -> int:
        return 0


def compile_triton(
    targets: Iterable[int], calls: Callable[[int], Iterable[tuple[str, Callable[[], object]]]]
) -> Iterator[dict[str, Any]]:
    """Compile and inspect each launch that `calls(target)` would make, without making it.

    `calls` yields pairs of a name and a call on CPU tensors. Going through the backend's own calls
    finds exactly what it launches. Triton keeps the last target as its device, so run this in a
    process of its own.
    """
    import triton

    run = triton.JITFunction.run
    launches: list[tuple[str, Any, Any, dict[str, Any]]] = []
    inspected: dict[int, tuple[Any, dict[str, Any]]] = {}

    def compile_only(self, *args, grid, warmup, **options):  # type: ignore[no-untyped-def]
        kernel = run(self, *args, grid=grid, warmup=True, **options)
        size = grid(options) if callable(grid) else grid
        launches.append((self.fn.__name__, kernel, size, options))

    with patch.object(triton.JITFunction, "run", compile_only):
        for target in targets:
            triton.runtime.driver.set_active(CompileOnly(target))
            for case, call in calls(target):
                launches.clear()
                with TorchOps() as torch_ops:
                    call()
                for name, kernel, grid, options in launches:
                    if id(kernel) not in inspected:
                        with tempfile.TemporaryDirectory() as folder:
                            cubin = Path(folder) / "kernel.cubin"
                            cubin.write_bytes(kernel.asm["cubin"])
                            # Keep the kernel, so that its id stays unique.
                            inspected[id(kernel)] = kernel, next(iter(inspect(cubin).values()))
                    blocks = 1
                    for extent in grid:
                        blocks *= extent
                    yield {
                        "target": target,
                        "case": case,
                        "kernel": name,
                        "blocks": blocks,
                        "threads": kernel.metadata.num_warps * 32,
                        "shared": kernel.metadata.shared,
                        "torch_ops": torch_ops.count,
                        "fp_fusion": options.get("enable_fp_fusion"),
                        **inspected[id(kernel)][1],
                    }


def environment(cache: Path) -> dict[str, str]:
    """Environment for compiling: no Triton settings, a separate cache, this repository."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith("TRITON_")}
    path = [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    return clean | {"PYTHONPATH": os.pathsep.join(path), "TRITON_CACHE_DIR": str(cache)}
