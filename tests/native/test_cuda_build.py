"""How the build of the CUDA kernels and the wheel builder interpret their settings."""

import os
import runpy
import struct
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.skipif(
    not (ROOT / "csrc").exists(), reason="tests next to an installed wheel"
)

KNOWN = {50, 70, 75, 80, 86, 87, 89, 90}


@pytest.fixture(scope="module")
def compile_py():
    return runpy.run_path(str(ROOT / "csrc" / "cuda" / "compile.py"))


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ("", ([75, 80, 86, 89, 90], [90])),
        ("8.0;9.0+PTX", ([80, 90], [90])),
        ("8.7, 7.5 8.7", ([75, 87], [])),
        ("8.0+PTX 8.0", ([80], [80])),
    ],
)
def test_architectures(asked, expected, compile_py):
    assert compile_py["architectures"](asked, KNOWN) == expected


def test_by_default_all_architectures_that_the_compiler_knows(compile_py):
    known = KNOWN | {100, 101, 103, 120, 121}
    expected = ([75, 80, 86, 89, 90, 100, 120], [120])
    assert compile_py["architectures"]("", known) == expected


@pytest.mark.parametrize("wrong", ["7.0", "9.0a", "80", "10.0", "Hopper", "8.0+ptx"])
def test_unsupported_architectures(wrong, compile_py):
    message = rf"HIVTP_CUDA_ARCHS .* some of 7.5 8.0 8.6 8.7 8.9 9.0, .* got {wrong}"
    with pytest.raises(SystemExit, match=message.replace("+", r"\+")):
        compile_py["architectures"](f"8.0 {wrong}", KNOWN)


@pytest.mark.parametrize(
    ("build", "compiler", "driver", "label"),
    [
        ("auto", True, True, "cu130"),
        ("auto", True, False, "cpu"),
        ("auto", False, True, "cpu"),
        ("cuda", True, False, "cu130"),
        ("cpu", True, True, "cpu"),
        ("none", True, True, None),
    ],
)
def test_which_variant_is_built(build, compiler, driver, label, tmp_path):
    # First in the search path: a driver, or a file that cannot be loaded.
    (tmp_path / "libcuda.so.1").write_bytes(b"")
    if driver:
        source = Path(__file__).parent / "cuda_driver" / "libcuda.c"
        command = ["cc", "-shared", "-fPIC", "-o", tmp_path / "libcuda.so.1", source, "-pthread"]
        subprocess.run(command, check=True)
    if compiler:
        (tmp_path / "nvcc").write_text(
            "#!/bin/sh\necho Cuda compilation tools, release 13.0, V13.0.88"
        )
        (tmp_path / "nvcc").chmod(0o755)
    env = {"HIVTP_BUILD": build, "PATH": str(tmp_path), "LD_LIBRARY_PATH": str(tmp_path)}
    kept = {k: v for k, v in os.environ.items() if k not in ("HIVTP_CUDA_VERSION", "PYTHONPATH")}
    result = subprocess.run(
        [sys.executable, "setup.py", "--version"],
        cwd=ROOT,
        env=kept | env,
        capture_output=True,
        text=True,
    )
    version = result.stdout.splitlines()[-1]
    assert version.partition("+")[2] == (label or ""), result.stderr


def test_no_device_compiler(compile_py, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", "")
    main = compile_py["main"]
    monkeypatch.setitem(main.__globals__, "_compilers", lambda: iter(()))
    with pytest.raises(SystemExit, match=r"no device compiler of CUDA 12.8 \(found: none\)"):
        main(tmp_path, "12.8", "")


def test_requirements_from_pypi(compile_py):
    requirements = compile_py["requirements"]
    assert requirements("12.8") == [
        "nvidia-cuda-nvrtc-cu12==12.8.*",
        "nvidia-nvfatbin-cu12==12.8.*",
    ]
    assert requirements("13.0") == ["nvidia-cuda-nvrtc==13.0.*", "nvidia-nvfatbin==13.0.*"]


def test_the_wheel_builder_refuses_an_unknown_cuda_version():
    pytest.importorskip("tomllib")
    check_asked = runpy.run_path(str(ROOT / "tools" / "wheels.py"))["check_asked"]
    known = {"12.4", "12.10", "13.0"}
    check_asked(["12.4", "13.0", "cpu", "none"], known)
    for wrong in ("11.8", "12", "gpu"):
        with pytest.raises(SystemExit, match=rf"\(12.4, 12.10, 13.0\), got {wrong}"):
            check_asked(["12.4", wrong], known)


def test_architectures_of_an_image():
    read = runpy.run_path(str(ROOT / ".ci" / "check_wheels.py"))["architectures"]

    def entry(kind, architecture, payload):
        header = struct.pack("<HHIQIIHHI", kind, 1, 64, len(payload), 0, 0, 0, 0, architecture)
        return header.ljust(64, b"\0") + payload

    entries = entry(2, 80, b"x" * 24) + entry(2, 120, b"y" * 8) + entry(1, 120, b"z" * 16)
    image = struct.pack("<IHHQ", 0xBA55ED50, 1, 16, len(entries)) + entries
    assert read(b"before" + image + b"after") == ["sm_80", "sm_120", "compute_120"]
    assert read(b"none") == []
