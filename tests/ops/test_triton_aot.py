"""Every Triton kernel, compiled for every target without a GPU: registers, spills, tensor cores.

The ops of `backends/triton.py` run on CPU tensors in a separate process, where launching a kernel
only compiles it, so that exactly what the backend launches is checked.
"""

import json
import random
import subprocess
import sys
from collections import Counter
from unittest.mock import patch

import pytest

from tools import machine_code
from tools.machine_code import TRITON_TARGETS as TARGETS

# The smallest limit per block of all targets, that of sm_86, 89 and 120.
SHARED_MEMORY = 101376
PARAMS, CALLS = 64, 50

# Compilation takes minutes if the cores are busy.
pytestmark = pytest.mark.timeout(1800)


def cases():
    """The name and call of one op of the backend, for everything that changes its kernels."""
    import torch

    from hivtp_kernels import PruneConfig
    from hivtp_kernels.backends import triton as backend
    from hivtp_kernels.types import Attention

    small = PruneConfig().params
    large = PruneConfig(grid=(64, 64), regions=(7, 5), budget=1111).params
    dtypes = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}

    for name, params in (
        ("24x24", small),
        ("64x64", large),
        ("64x64-2x2", PruneConfig(grid=(64, 64)).params),
        ("40x40-1x1", PruneConfig(grid=(40, 40), regions=(1, 1)).params),
        ("many-regions", PruneConfig(regions=(24, 24), window=(24, 24), ratio=1).params),
    ):
        scores = torch.zeros(1, params.grid[0] * params.grid[1])
        yield f"select-{name}", lambda s=scores, p=params: backend.select_tokens(s, p)

    for rows in ("cls", "all"):
        for name, dtype in dtypes.items():
            for head_dim, layers, params in ((64, 3, small), (128, 8, large)):
                if name == "bf16" and head_dim == 128:
                    continue
                tokens = params.grid[0] * params.grid[1] + 1
                k = [torch.zeros(1, 1, tokens, head_dim, dtype=dtype) for _ in range(layers)]
                q = [t[:, :, :1] for t in k] if rows == "cls" else k
                call = Attention(q, k, [], rows, 1, 0.125)
                case = f"{rows}-{name}-{head_dim}"
                yield case, lambda c=call, p=params: backend.score_and_select(c, p)
                if name == "fp16" and head_dim == 64:
                    lse = [torch.zeros(t.shape[:3]) for t in q]
                    call_lse = call._replace(lse=lse)
                    yield f"{case}-score", lambda c=call: backend.attention_scores(c)
                    yield f"{case}-lse", lambda c=call_lse: backend.attention_scores(c)
                    fused = lambda c=call_lse, p=params: backend.score_and_select(c, p)  # noqa: E731
                    yield f"{case}-fused-lse", fused

    indices = torch.zeros(1, 288, dtype=torch.int32)
    cu_seqlens = torch.tensor([0, 288], dtype=torch.int32)
    for name, dtype in (("fp16", torch.float16), ("fp64", torch.float64)):
        x = torch.zeros(1, 577, 1024, dtype=dtype)
        yield f"gather-{name}", lambda x=x: backend.gather_tokens(x, indices, 1)
        yield f"pack-{name}", lambda x=x: backend.pack_tokens(x, indices, cu_seqlens, 288, 1)


def random_params(count):
    """Params of every kind: budgets of all residues, ratios, odd grids, ragged regions, windows."""
    from hivtp_kernels import PruneConfig

    draw = random.Random(0)
    for number in range(count):
        height, width = grid = draw.choice([(24, 24), (27, 27), (16, 16), (10, 40), (23, 31)])
        regions = draw.choice([(2, 2), (3, 2), (1, 1), (5, 7), (4, 3)])
        window = draw.choice([None, (2, 2), (3, 3), (4, 3), (1, 5)])
        if number % 4 == 0:
            yield PruneConfig(grid, regions, window=window, ratio=draw.random()).params
            continue
        # Budgets go through all residues modulo 16, as Triton specializes on multiples of 16.
        least = (height * width // 2 + 16) // 16 * 16
        residue = (number - number // 4 - 1) % 16
        yield PruneConfig(grid, regions, window=window, budget=least + residue).params


def random_calls(count):
    """Calls of every op with random params, budgets, batches and layouts."""
    import torch

    from hivtp_kernels import PruneConfig
    from hivtp_kernels.backends import triton as backend
    from hivtp_kernels.types import Attention

    draw = random.Random(1)

    def laid_out(*shape, dtype):
        """A tensor of that shape with random strides, perhaps not aligned to 16 bytes."""
        kind = draw.randrange(4)
        if kind == 0:
            return torch.zeros(shape, dtype=dtype)
        if kind == 1:  # a projection's output: heads interleaved
            order = [0, 2, 1, 3][: len(shape)] if len(shape) == 4 else range(len(shape))
            return torch.zeros([shape[i] for i in order], dtype=dtype).permute(*order)
        wider = [*shape[:-1], shape[-1] + draw.choice([8, 5])]
        return torch.zeros(wider, dtype=dtype)[..., kind - 2 : kind - 2 + shape[-1]]

    for _ in range(count):
        batch, heads, channels = (draw.randrange(1, 18) for _ in range(3))
        rows, prefix = draw.choice([("cls", 1), ("all", 0), ("all", 5)])
        grid = draw.choice([(24, 24), (16, 36), (32, 18), (576, 1)])
        regions, window = draw.choice([((1, 1), (1, 2)), ((2, 1), (2, 2)), ((16, 1), (3, 1))])
        windows = -(-grid[0] // window[0]) * -(-grid[1] // window[1])
        ratio = PruneConfig(grid, regions, window=window, ratio=draw.random())
        budget = draw.randrange(windows, 577)
        budgeted = PruneConfig(grid, regions, window=window, budget=budget)
        params = draw.choice([ratio, budgeted]).params
        dtype = draw.choice([torch.float16, torch.float32])
        shape = (batch, heads, 576 + prefix, 64)
        q, k = ([laid_out(*shape, dtype=dtype) for _ in range(3)] for _ in "qk")
        lse = [laid_out(*shape[:3], dtype=torch.float32) for _ in q] if draw.random() < 0.5 else []
        attention = Attention(q, k, lse, rows, prefix, 0.125)
        indices = laid_out(batch, budget, dtype=torch.int32)
        cu_seqlens = torch.zeros(batch + 2, dtype=torch.int32)[draw.randrange(2) :][: batch + 1]
        x = laid_out(batch, 576 + prefix, 512 + channels, dtype=dtype)
        yield lambda a=attention: backend.attention_scores(a)
        yield lambda a=attention, p=params: backend.score_and_select(a, p)
        scores = laid_out(batch, 576, dtype=torch.float32)
        yield lambda s=scores, p=params: backend.select_tokens(s, p)
        yield lambda x=x, i=indices, p=prefix: backend.gather_tokens(x, i, p)
        yield lambda x=x, i=indices, c=cu_seqlens, p=prefix: backend.pack_tokens(x, i, c, 9, p)


def processes(folder, *commands):
    """The lines of JSON that processes print which run this file with those arguments."""
    environment = machine_code.environment(folder)
    running = [
        subprocess.Popen(
            [sys.executable, __file__, *map(str, command)],
            env=environment,
            stdout=subprocess.PIPE,
            text=True,
        )
        for command in commands
    ]
    lines = [line for process in running for line in process.communicate()[0].splitlines()]
    assert [process.returncode for process in running] == [0] * len(running)
    return [json.loads(line) for line in lines]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    pytest.importorskip("triton")
    return tmp_path_factory.mktemp("triton")


@pytest.fixture(scope="module")
def compiled(folder):
    return processes(folder, ["cases", *TARGETS[::2]], ["cases", *TARGETS[1::2]])


@pytest.mark.parametrize("target", TARGETS)
def test_compiles_within_limits(target, compiled):
    kernels = [k for k in compiled if k["target"] == target]
    names = {"select_kernel", "cls_kernel", "gather_kernel"}
    if target > 75:
        names |= {"lse_kernel", "columns_kernel"}
    assert {k["kernel"] for k in kernels} == names
    for kernel in kernels:
        assert kernel["stack"] == 0, kernel
        assert kernel["registers"] <= 128, kernel
        assert kernel["shared"] <= SHARED_MEMORY, kernel


@pytest.mark.parametrize("target", TARGETS[1:])
def test_all_rows_run_on_tensor_cores(target, compiled):
    products = [
        k
        for k in compiled
        if k["target"] == target and k["case"].startswith(("all-fp16", "all-bf16"))
    ]
    assert {k["kernel"] for k in products} == {"lse_kernel", "columns_kernel"}
    for kernel in products:
        assert kernel["tensor_core"], kernel


@pytest.mark.parametrize("target", TARGETS)
def test_rows_are_read_16_bytes_at_a_time(target, compiled):
    scoring = [
        k
        for k in compiled
        if k["target"] == target and k["kernel"] in ("cls_kernel", "lse_kernel", "columns_kernel")
    ]
    assert scoring
    for kernel in scoring:
        assert machine_code.wide(kernel), kernel


def test_launches(compiled):
    """One kernel for `cls`, two for `all`, one if lse is given; the same with selection."""
    counts = Counter((k["target"], k["case"]) for k in compiled)
    for (_, case), count in counts.items():
        assert count == (2 if case.startswith("all") and not case.endswith("lse") else 1), case


def test_fp_fusion_is_explicit(compiled):
    for kernel in compiled:
        assert kernel["fp_fusion"] is True, kernel


def test_all_params_compile(folder):
    """On every target, within the same limits, for every residue of the budget."""
    launches = processes(folder, ["params", *TARGETS[::2]], ["params", *TARGETS[1::2]])
    assert Counter(k["target"] for k in launches) == dict.fromkeys(TARGETS, PARAMS)
    for kernel in launches:
        assert kernel["stack"] == 0, kernel
        assert kernel["registers"] <= 128, kernel


def test_one_kernel_for_all_params_budgets_batches_and_layouts(folder):
    """Kernels differ only by dtypes, head_dim, number of layers and padded sizes."""
    launches = processes(folder, ["variants", 90])
    variants = {}
    for launch in launches:
        variants.setdefault(json.dumps(launch["key"]), set()).add(launch["kernel"])
    assert len(launches) > 5 * CALLS
    assert {key: len(kernels) for key, kernels in variants.items() if len(kernels) > 1} == {}
    # Few enough that each was launched with many different params.
    names = Counter(json.loads(key)["name"] for key in variants)
    assert names["lse_kernel"] == 2  # dtypes
    assert names["gather_kernel"] == 4  # and padded or packed
    assert names["select_kernel"] <= 8  # padded regions and windows
    assert sum(names.values()) * 3 < len(launches)


def run_variants(target):
    """Print a line of JSON per launch: what a kernel may depend on, and which one it was."""
    import torch
    import triton

    run = triton.JITFunction.run
    kernels = {}

    def describe(value):
        if isinstance(value, tuple):
            return [describe(v) for v in value]
        return str(value.dtype) if isinstance(value, torch.Tensor) else value is None

    def compile_only(self, *args, grid, warmup, **options):
        kernel = run(self, *args, grid=grid, warmup=True, **options)
        constants = {n: v for n, v in options.items() if n.isupper() or n == "num_warps"}
        arguments = [*args, *(v for n, v in options.items() if n not in constants)]
        key = {"name": self.fn.__name__, **constants, "arguments": [describe(a) for a in arguments]}
        number = kernels.setdefault(id(kernel), (len(kernels), kernel))[0]
        print(json.dumps({"key": key, "kernel": number}), flush=True)

    triton.runtime.driver.set_active(machine_code.CompileOnly(target))
    with patch.object(triton.JITFunction, "run", compile_only):
        for call in random_calls(CALLS):
            call()


def run(what, targets):
    """Print a line of JSON per launch of the cases, or of a selection by random params."""

    def of(target):
        if what == "params":
            import torch

            from hivtp_kernels.backends import triton as backend

            for params in random_params(PARAMS):
                scores = torch.zeros(1, params.grid[0] * params.grid[1])
                yield str(params), lambda s=scores, p=params: backend.select_tokens(s, p)
            return
        for name, call in cases():
            # Triton has no tensor-core code below compute capability 8.0.
            if target > 75 or not name.startswith("all"):
                yield name, call

    for launch in machine_code.compile_triton(targets, of):
        print(json.dumps(launch), flush=True)


if __name__ == "__main__":
    targets = [int(target) for target in sys.argv[2:]]
    if sys.argv[1] == "variants":
        run_variants(*targets)
    else:
        run(sys.argv[1], targets)
