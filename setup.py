"""Builds the extension `hivtp_kernels._C` with CMake and Ninja. Metadata is in `pyproject.toml`.

Environment: `HIVTP_BUILD=auto|cpu|cuda|none`, `HIVTP_CUDA_VERSION`, `HIVTP_CUDA_ARCHS`,
`HIVTP_LOCAL_VERSION`, `MAX_JOBS`, `CMAKE_ARGS`.
"""

import ctypes
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


CUDA = runpy.run_path(str(ROOT / "csrc" / "cuda" / "compile.py"))


def driver_visible() -> bool:
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return True


def variant() -> tuple[str, str, list[str]]:
    """What to build, the CUDA version of its kernels, and the PyPI packages that this requires."""
    asked = os.environ.get("HIVTP_BUILD", "auto")
    if asked not in ("auto", "cpu", "cuda", "none"):
        raise SystemExit(f"HIVTP_BUILD must be auto, cpu, cuda or none, got {asked!r}")
    if asked in ("cpu", "none") or (asked == "auto" and not driver_visible()):
        return asked.replace("auto", "cpu"), "", []
    version = os.environ.get("HIVTP_CUDA_VERSION", "")
    compiler = CUDA["find_compiler"](version)
    if compiler is not None:
        return "cuda", compiler.version, []
    if asked == "auto":
        return "cpu", "", []
    if not version:
        raise CUDA["no_compiler"](version)
    return "cuda", version, CUDA["requirements"](version)


VARIANT, CUDA_VERSION, MISSING = variant()
LABEL = f"cu{CUDA_VERSION.replace('.', '')}" if VARIANT == "cuda" else VARIANT


def version() -> str:
    """The base version, with the variant as local label except for an sdist."""
    label = os.environ.get("HIVTP_LOCAL_VERSION", "" if VARIANT == "none" else LABEL)
    return BASE_VERSION if "sdist" in sys.argv or not label else f"{BASE_VERSION}+{label}"


class CMakeBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        import pybind11

        output = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        # A build folder for each variant and Python, so that they never share CMake's cache.
        build = ROOT / "build" / f"{LABEL}-{sys.implementation.cache_tag}"
        configure = [
            # Fresh, as the tools of an isolated build are gone by the next build.
            "cmake", "--fresh", "-S", str(ROOT), "-B", str(build), "-G", "Ninja",
            "-DCMAKE_BUILD_TYPE=Release",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={output}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DHIVTP_VERSION={BASE_VERSION}",
            f"-DHIVTP_BUILD={VARIANT}",
            f"-DHIVTP_CUDA_VERSION={CUDA_VERSION}",
            *shlex.split(os.environ.get("CMAKE_ARGS", "")),
        ]  # fmt: skip
        jobs = os.environ.get("MAX_JOBS") or str(min(os.cpu_count() or 1, 4))
        subprocess.run(configure, check=True)
        subprocess.run(["cmake", "--build", str(build), "--parallel", jobs], check=True)


if VARIANT == "none" and "editable_wheel" in sys.argv:
    # Remove the extension of an earlier build, which would still be loaded.
    for stale in (ROOT / "hivtp_kernels").glob("_C.*.so"):
        stale.unlink()

SIBLINGS = find_packages(str(ROOT / "python"))
setup(
    version=version(),
    # An isolated build installs these first.
    setup_requires=MISSING,
    packages=[
        *find_packages(include=["hivtp_kernels", "hivtp_kernels.*"]),
        *SIBLINGS,
    ],
    package_dir={name: f"python/{name}" for name in SIBLINGS if "." not in name},
    package_data={"": ["py.typed"]},
    ext_modules=[Extension("hivtp_kernels._C", sources=[])] if VARIANT != "none" else [],
    cmdclass={"build_ext": CMakeBuild},
)
