"""The CUDA kernels, compiled for every target by nvcc: registers, spills, loads, tensor cores."""

import os
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

import pytest

SOURCES = Path(__file__).parents[1] / "csrc"
TARGETS = (75, 80, 86, 89, 90, 100, 120)
DTYPES = ("f32", "f16", "bf16")
SCORE = {f"hivtp_{name}_{dtype}" for name in ("cls", "lse", "columns") for dtype in DTYPES}
MOVE = {"hivtp_gather", "hivtp_pack"}

pytestmark = pytest.mark.skipif(
    not SOURCES.exists(), reason="tests that lie beside an installed wheel"
)


def tool(name):
    """A program of the CUDA toolkit; for those who lack it, that of PyPI or Triton."""
    path = shutil.which(name)
    if path is None and name == "nvcc" and (installed := find_spec("nvidia")):
        (path, *_) = [
            str(found)
            for folder in installed.submodule_search_locations
            for found in Path(folder).glob("cu*/bin/nvcc")
        ] or [None]
    if path is None and name == "nvdisasm" and find_spec("triton"):
        from triton import knobs

        path = knobs.nvidia.nvdisasm.path
    if path is None and "cuda" in os.environ.get("HIVTP_REQUIRE_BACKENDS", "").split(","):
        pytest.fail(f"backend cuda is required: there is no {name}")
    if path is None:
        pytest.skip(f"there is no {name}")
    return path


def compile_for(target, nvcc, nvdisasm, folder):
    """What ptxas says of each kernel, as (stack, spilled bytes, registers), and its code."""
    cubin = folder / f"sm_{target}.cubin"
    command = [nvcc, "-cubin", f"-arch=sm_{target}", "-std=c++17", "-o", cubin, folder / "all.cu"]
    command += [f"-I{SOURCES / 'include'}", f"-I{SOURCES / 'cuda' / 'kernels'}"]
    command += ["-Werror=all-warnings", "-Xptxas=-v,-Werror"]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        return result.stderr
    resources = {
        name: (int(stack), int(spilled), int(registers))
        for name, stack, spilled, registers in re.findall(
            r"Function properties for (\w+)\n\D*(\d+) bytes stack frame, (\d+) bytes spill stores"
            r".*\n.*Used (\d+) registers",
            result.stderr,
        )
    }
    text = subprocess.run([nvdisasm, "-c", cubin], check=True, capture_output=True, text=True)
    code = dict(re.findall(r"^//-+ \.text\.(\w+) +-+$(.*?)(?=^//-|\Z)", text.stdout, re.M | re.S))
    return resources, code


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cubins")
    kernels = sorted((SOURCES / "cuda" / "kernels").glob("*.cu"))
    (folder / "all.cu").write_text("".join(f'#include "{path.name}"\n' for path in kernels))
    nvcc, nvdisasm = tool("nvcc"), tool("nvdisasm")
    with ThreadPoolExecutor(2) as pool:
        results = pool.map(lambda t: compile_for(t, nvcc, nvdisasm, folder), TARGETS)
        return dict(zip(TARGETS, results, strict=True))


@pytest.fixture(params=TARGETS)
def target(request, compiled):
    """Each target in turn, its kernels compiled without a warning."""
    assert not isinstance(compiled[request.param], str), compiled[request.param]
    return request.param


def test_registers_and_spills(target, compiled):
    resources, _ = compiled[target]
    assert set(resources) == SCORE | MOVE | {"hivtp_select"}
    for name, (stack, spilled, registers) in resources.items():
        assert stack == spilled == 0, name
        assert registers <= 128, name


def test_rows_are_read_16_bytes_at_a_time(target, compiled):
    _, code = compiled[target]
    for name in SCORE | MOVE:
        assert re.search(r"\bLDG\.E\.\S*128\b", code[name]), name
    # Nothing else reads q and k: what is narrower are 4 bytes of lse.
    for name in SCORE:
        assert not re.search(r"\bLDG\.E\S*\.(U8|S8|U16|S16|64)\b", code[name]), name


def test_all_rows_run_on_tensor_cores(target, compiled):
    _, code = compiled[target]
    with_tensor_cores = {name for name in SCORE if re.search(r"\bHMMA\.", code[name])}
    types = ("f16", "bf16") if target >= 80 else ("f16",)
    assert with_tensor_cores == {f"hivtp_{k}_{t}" for k in ("lse", "columns") for t in types}
