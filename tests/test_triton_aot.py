"""Every Triton kernel, compiled for every target without a GPU: registers, spills, tensor cores.

The ops of `backends/triton.py` run on CPU tensors in a process of their own, where launching a
kernel compiles it and stops, so that what is checked here is what the backend launches.
"""

import json
import subprocess
import sys
from collections import Counter

import pytest

from bench import machine_code
from bench.machine_code import TRITON_TARGETS as TARGETS

# The least of what the targets' multiprocessors give to one block, that of sm_86, 89 and 120.
SHARED_MEMORY = 101376


def cases():
    """Name and a call of one op of the backend, for what its kernels are compiled differently."""
    import torch

    from hivtp_kernels import PruneConfig
    from hivtp_kernels.backends import triton as backend

    small = PruneConfig().rule
    large = PruneConfig(grid=(64, 64), regions=(7, 5), budget=1111).rule
    dtypes = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}

    for name, rule in (
        ("24x24", small),
        ("64x64", large),
        ("64x64-2x2", PruneConfig(grid=(64, 64)).rule),
        ("40x40-1x1", PruneConfig(grid=(40, 40), regions=(1, 1)).rule),
        ("many-regions", PruneConfig(regions=(24, 24), window=(24, 24), ratio=1).rule),
    ):
        scores = torch.zeros(1, rule.grid[0] * rule.grid[1])
        yield f"select-{name}", lambda s=scores, r=rule: backend.select_tokens(s, r)

    for rows in ("cls", "all"):
        for name, dtype in dtypes.items():
            for head_dim, layers, rule in ((64, 3, small), (128, 8, large)):
                if name == "bf16" and head_dim == 128:
                    continue
                tokens = rule.grid[0] * rule.grid[1] + 1
                k = [torch.zeros(1, 1, tokens, head_dim, dtype=dtype) for _ in range(layers)]
                q = [t[:, :, :1] for t in k] if rows == "cls" else k
                call = (q, k, [], rows, 1, 0.125)
                case = f"{rows}-{name}-{head_dim}"
                yield case, lambda c=call, r=rule: backend.score_and_select(*c, r)
                if name == "fp16" and head_dim == 64:
                    lse = [torch.zeros(t.shape[:3]) for t in q]
                    call_lse = (q, k, lse, rows, 1, 0.125)
                    yield f"{case}-score", lambda c=call: backend.attention_scores(*c)
                    yield f"{case}-lse", lambda c=call_lse: backend.attention_scores(*c)
                    fused = lambda c=call_lse, r=rule: backend.score_and_select(*c, r)  # noqa: E731
                    yield f"{case}-fused-lse", fused

    indices = torch.zeros(1, 288, dtype=torch.int32)
    cu_seqlens = torch.tensor([0, 288], dtype=torch.int32)
    for name, dtype in (("fp16", torch.float16), ("fp64", torch.float64)):
        x = torch.zeros(1, 577, 1024, dtype=dtype)
        yield f"gather-{name}", lambda x=x: backend.gather_tokens(x, indices, 1)
        yield f"pack-{name}", lambda x=x: backend.pack_tokens(x, indices, cu_seqlens, 288, 1)


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    pytest.importorskip("triton")
    environment = machine_code.environment(tmp_path_factory.mktemp("triton"))
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, *map(str, targets)],
            env=environment,
            stdout=subprocess.PIPE,
            text=True,
        )
        for targets in (TARGETS[::2], TARGETS[1::2])
    ]
    lines = [line for process in processes for line in process.communicate()[0].splitlines()]
    assert [process.returncode for process in processes] == [0, 0]
    return [json.loads(line) for line in lines]


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
    """One kernel for `cls`, two for `all` and one where lse is given, with or without selection."""
    counts = Counter((k["target"], k["case"]) for k in compiled)
    for (_, case), count in counts.items():
        assert count == (2 if case.startswith("all") and not case.endswith("lse") else 1), case


def test_fp_fusion_is_explicit(compiled):
    for kernel in compiled:
        assert kernel["fp_fusion"] is True, kernel


def run(targets):
    """One line of JSON for each launch of the cases."""

    def of(target):
        # Triton has no tensor-core code below compute capability 8.0.
        return ((n, call) for n, call in cases() if target > 75 or not n.startswith("all"))

    for launch in machine_code.compile_triton(targets, of):
        print(json.dumps(launch), flush=True)


if __name__ == "__main__":
    run([int(target) for target in sys.argv[1:]])
