"""The CUDA kernels, compiled for every target by nvcc: registers, spills, loads, tensor cores."""

import os
import subprocess
from concurrent.futures import ThreadPoolExecutor

import pytest

from tools import machine_code
from tools.machine_code import CUDA_TARGETS

DTYPES = ("f32", "f16", "bf16")
SCORE = {f"hivtp_{name}_{dtype}" for name in ("cls", "lse", "columns") for dtype in DTYPES}
MOVE = {"hivtp_gather", "hivtp_pack"}

pytestmark = pytest.mark.skipif(
    not machine_code.SOURCES.exists(), reason="tests next to an installed wheel"
)


def compile_for(target, folder):
    """The kernels, or the compiler's message if it fails."""
    try:
        return machine_code.compile_cuda(target, folder)
    except subprocess.CalledProcessError as error:
        return error.stderr


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    for name in ("nvcc", "nvdisasm", "cuobjdump"):
        if machine_code.tool(name) is None:
            if "cuda" in os.environ.get("HIVTP_REQUIRE_BACKENDS", "").split(","):
                pytest.fail(f"backend cuda is required: there is no {name}")
            pytest.skip(f"there is no {name}")
    folder = tmp_path_factory.mktemp("cubins")
    with ThreadPoolExecutor(2) as pool:
        results = pool.map(lambda target: compile_for(target, folder), CUDA_TARGETS)
        return dict(zip(CUDA_TARGETS, results, strict=True))


@pytest.fixture(params=CUDA_TARGETS)
def target(request, compiled):
    """Each target in turn, its kernels compiled without a warning."""
    assert not isinstance(compiled[request.param], str), compiled[request.param]
    return request.param


def test_registers_and_spills(target, compiled):
    kernels = compiled[target]
    assert set(kernels) == SCORE | MOVE | {"hivtp_select"}
    for name, kernel in kernels.items():
        assert kernel["stack"] == 0, name
        assert kernel["registers"] <= 128, name


def test_rows_are_read_16_bytes_at_a_time(target, compiled):
    kernels = compiled[target]
    for name in SCORE | MOVE:
        assert kernels[name]["load_128"], name
    # No other load reads q and k; the only narrower loads are 4 bytes of lse.
    for name in SCORE:
        assert not kernels[name]["load_64"] + kernels[name]["load_narrow"], name
        assert machine_code.wide(kernels[name]), (name, kernels[name]["product_loops"])


def test_all_rows_run_on_tensor_cores(target, compiled):
    with_tensor_cores = {name for name in SCORE if compiled[target][name]["tensor_core"]}
    types = ("f16", "bf16") if target >= 80 else ("f16",)
    assert with_tensor_cores == {f"hivtp_{k}_{t}" for k in ("lse", "columns") for t in types}
