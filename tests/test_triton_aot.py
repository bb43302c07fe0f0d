"""Every Triton kernel, compiled for every target without a GPU: registers, spills, tensor cores.

The ops of `backends/triton.py` run on CPU tensors in a process of their own, where launching a
kernel compiles it and stops, so that what is checked here is what the backend launches.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

TARGETS = (75, 80, 90, 100, 120)
# The least of what the targets' multiprocessors give to one block, that of sm_86, 89 and 120.
SHARED_MEMORY = 101376
TENSOR_CORES = re.compile(r"\b(mma\.sync|wgmma\.mma_async|tcgen05\.mma)")


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

    indices = torch.zeros(1, 288, dtype=torch.int32)
    cu_seqlens = torch.tensor([0, 288], dtype=torch.int32)
    for name, dtype in (("fp16", torch.float16), ("fp64", torch.float64)):
        x = torch.zeros(1, 577, 1024, dtype=dtype)
        yield f"gather-{name}", lambda x=x: backend.gather_tokens(x, indices, 1)
        yield f"pack-{name}", lambda x=x: backend.pack_tokens(x, indices, cu_seqlens, 288, 1)


class CompileOnly:
    """Triton's driver for a device that is not there."""

    def __init__(self, capability):
        self.capability = capability

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self):
        return self.capability

    def get_current_stream(self, device):
        return 0


def resources(cubin):
    """Registers and stack bytes of a thread; what ptxas spills lies on the stack."""
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return {name: int(re.search(rf"{name}:(\d+)", text)[1]) for name in ("REG", "STACK", "LOCAL")}


def compile_all(targets):
    """One line of JSON for each kernel that is compiled."""
    import triton

    run = triton.JITFunction.run
    compiled = {}

    def compile_only(self, *args, grid, warmup, **options):
        kernel = run(self, *args, grid=grid, warmup=True, **options)
        compiled.setdefault(id(kernel), (self.fn.__name__, kernel, options))

    triton.JITFunction.run = compile_only
    for capability in targets:
        triton.runtime.driver.set_active(CompileOnly(capability))
        for case, call in cases():
            if capability == 75 and case.startswith("all"):
                continue
            before = len(compiled)
            call()
            for name, kernel, options in list(compiled.values())[before:]:
                facts = {
                    "target": capability,
                    "case": case,
                    "kernel": name,
                    "shared": kernel.metadata.shared,
                    "tensor_cores": bool(TENSOR_CORES.search(kernel.asm["ptx"])),
                    "fp_fusion": options.get("enable_fp_fusion"),
                    **resources(kernel.asm["cubin"]),
                }
                print(json.dumps(facts), flush=True)


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    pytest.importorskip("triton")
    environment = {k: v for k, v in os.environ.items() if not k.startswith("TRITON_")}
    path = [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(path)
    environment["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
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
        assert kernel["STACK"] == kernel["LOCAL"] == 0, kernel
        assert kernel["REG"] <= 128, kernel
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
        assert kernel["tensor_cores"], kernel


def test_fp_fusion_is_explicit(compiled):
    for kernel in compiled:
        assert kernel["fp_fusion"] is True, kernel


if __name__ == "__main__":
    compile_all([int(target) for target in sys.argv[1:]])
