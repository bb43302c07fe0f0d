"""What a wheel of this package contains and requires."""

import importlib.util
import os
import subprocess
import sys
from importlib.resources import files
from pathlib import Path

import pytest

import hivtp_kernels

ROOT = Path(__file__).parents[1]


def needed(library):
    """The NEEDED entries of an ELF file."""
    from elftools.elf.elffile import ELFFile

    with open(library, "rb") as file:
        dynamic = ELFFile(file).get_section_by_name(".dynamic")
        return {tag.needed for tag in dynamic.iter_tags() if tag.entry.d_tag == "DT_NEEDED"}


@pytest.mark.parametrize("backend", ["cpu"], indirect=True)
def test_the_extension_links_nothing_but_the_c_library(backend):
    spec = importlib.util.find_spec("hivtp_kernels._C")
    names = needed(spec.origin)
    allowed = ("libc.so", "libm.so", "libpthread.so", "libdl.so", "ld-linux")
    assert names
    assert all(name.startswith(allowed) for name in names), names


def test_typed():
    assert files("hivtp_kernels").joinpath("py.typed").is_file()
    assert files("hivtp_transformers").joinpath("py.typed").is_file()


def test_everything_public_is_documented():
    for name in hivtp_kernels.__all__:
        if name != "__version__":
            text = getattr(hivtp_kernels, name).__doc__
            assert text and ("Parameters" in text or "Attributes" in text), name


@pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="tests next to an installed wheel")
@pytest.mark.parametrize(
    ("env", "message"),
    [
        ({"HIVTP_BUILD": "gpu"}, "must be auto, cpu, cuda or none, got 'gpu'"),
        (
            {"HIVTP_BUILD": "cuda"},
            "There is no device compiler (found: none). Put nvcc on the PATH",
        ),
        (
            {"HIVTP_BUILD": "cuda", "HIVTP_CUDA_VERSION": "12"},
            "HIVTP_CUDA_VERSION must be like 12.8 or 13.0, got '12'",
        ),
    ],
    ids=str,
)
def test_a_build_with_wrong_settings_fails(env, message):
    # With an empty PATH there is no nvcc.
    result = subprocess.run(
        [sys.executable, "setup.py", "--version"],
        cwd=ROOT,
        env=os.environ | {"PATH": ""} | env,
        capture_output=True,
        text=True,
    )
    assert result.returncode != 0
    assert message in result.stderr
