"""Build of the extension `hivtp_kernels._C`, by CMake and Ninja. Metadata is in `pyproject.toml`.

Environment: `HIVTP_BUILD=auto|cpu|cuda|none`, `HIVTP_LOCAL_VERSION`, `MAX_JOBS`, `CMAKE_ARGS`.
"""

import os
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
BASE_VERSION = runpy.run_path(str(ROOT / "hivtp_kernels" / "version.py"))["__version__"]


def variant() -> str:
    asked = os.environ.get("HIVTP_BUILD", "auto")
    if asked not in ("auto", "cpu", "cuda", "none"):
        raise SystemExit(f"HIVTP_BUILD must be auto, cpu, cuda or none, got {asked!r}")
    if asked == "cuda":
        raise SystemExit(
            "HIVTP_BUILD=cuda: this version has no CUDA C++ kernels yet. "
            "HIVTP_BUILD=cpu builds the CPU kernels; Triton serves GPUs in every build."
        )
    return "cpu" if asked == "auto" else asked


def version(variant: str) -> str:
    """The base version, and what the wheel holds as its local label; an sdist holds no build."""
    label = os.environ.get("HIVTP_LOCAL_VERSION", "cpu" if variant == "cpu" else "")
    return BASE_VERSION if "sdist" in sys.argv or not label else f"{BASE_VERSION}+{label}"


class CMakeBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        import pybind11

        output = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        # A build folder for each variant and Python: CMake's cache is never one of another.
        build = ROOT / "build" / f"{VARIANT}-{sys.implementation.cache_tag}"
        configure = [
            # Fresh: the paths of an isolated build's tools are gone by the next.
            "cmake", "--fresh", "-S", str(ROOT), "-B", str(build), "-G", "Ninja",
            "-DCMAKE_BUILD_TYPE=Release",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={output}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DHIVTP_VERSION={BASE_VERSION}",
            f"-DHIVTP_BUILD={VARIANT}",
            *shlex.split(os.environ.get("CMAKE_ARGS", "")),
        ]  # fmt: skip
        jobs = os.environ.get("MAX_JOBS") or str(min(os.cpu_count() or 1, 4))
        subprocess.run(configure, check=True)
        subprocess.run(["cmake", "--build", str(build), "--parallel", jobs], check=True)


VARIANT = variant()
if VARIANT == "none" and "editable_wheel" in sys.argv:
    # An extension of an earlier build in place would undo the choice to have none.
    for stale in (ROOT / "hivtp_kernels").glob("_C.*.so"):
        stale.unlink()

setup(
    version=version(VARIANT),
    packages=[
        *find_packages(include=["hivtp_kernels", "hivtp_kernels.*"]),
        *find_packages("python"),
    ],
    package_dir={
        "hivtp_llava": "python/hivtp_llava",
        "hivtp_lmms_eval": "python/hivtp_lmms_eval",
    },
    package_data={"": ["py.typed"]},
    ext_modules=[Extension("hivtp_kernels._C", sources=[])] if VARIANT != "none" else [],
    cmdclass={"build_ext": CMakeBuild},
)
