"""Build the package's extension with its CUDA kernels on the CPU, by CMake."""

import fcntl
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

HERE = Path(__file__).parent
SOURCES = HERE.parents[2] / "csrc"


def missing():
    """What the build lacks, or None."""
    if not SOURCES.is_dir():
        return f"the emulator has no sources of kernels at {SOURCES}"
    if importlib.util.find_spec("pybind11") is None:
        return "the emulator needs pybind11"
    for names in (("cmake",), ("ninja",), (os.environ.get("CXX", "c++"), "g++", "clang++")):
        if not any(shutil.which(name, path=_path()) for name in names):
            return f"the emulator needs {names[0]}"
    return None


def extension(folder):
    """Build what changed, in a folder that is kept, and load the extension."""
    import pybind11

    options = {"Python_EXECUTABLE": sys.executable, "pybind11_DIR": pybind11.get_cmake_dir()}
    defines = [f"-D{name}={value}" for name, value in options.items()]
    with open(folder / "lock", "w") as lock:  # workers of pytest-xdist come at the same time
        fcntl.flock(lock, fcntl.LOCK_EX)
        _run("cmake", "-G", "Ninja", "-S", str(HERE), "-B", str(folder), *defines)
        _run("cmake", "--build", str(folder))
    path = folder / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
    spec = importlib.util.spec_from_file_location("cuda_emulator._C", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def folder_of(extension):
    return Path(extension.__file__).parent


def _path():
    """The PATH with the scripts of this Python's environment, which may not be active."""
    return os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", "")])


def _run(*command):
    result = subprocess.run(
        command,
        env=os.environ | {"PATH": _path()},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert result.returncode == 0, f"{' '.join(command)}\n{result.stdout}"
