"""csrc/cuda/launch.cpp over a driver that only records what is queued."""

from __future__ import annotations

import ctypes
import subprocess
from ctypes import Structure, c_float, c_int32, c_int64, c_void_p
from pathlib import Path

from hivtp_kernels.types import MAX_LAYERS

CUDA = Path(__file__).parents[2] / "csrc" / "cuda"

DRIVER = """
#include <cstring>
#include <string>
#include "driver.h"
extern "C" {
char queue[4096];
int stream_status, queue_status;
}
static HivtpStatus add(const std::string& line) {
  std::strcat(queue, (line + "\\n").c_str());
  return HivtpStatus(queue_status);
}
namespace hivtp {
HivtpStatus check_stream(int32_t, void*) { return HivtpStatus(stream_status); }
HivtpStatus launch(const Launch& l, void**, void*) {
  return add(std::string(l.kernel) + " " + std::to_string(l.grid[0] * l.grid[1] * l.grid[2]) +
             " blocks, " + std::to_string(l.threads) + " threads, " +
             std::to_string(l.shared_bytes) + " bytes");
}
HivtpStatus zero(void*, size_t bytes, void*) { return add("zero " + std::to_string(bytes)); }
}
"""


class View(Structure):
    """`HivtpView` of api.h."""

    _fields_ = [("data", c_void_p), *((f"{n}_stride", c_int64) for n in ("batch", "head", "token"))]


class Attention(Structure):
    """`HivtpAttention` of api.h."""

    _fields_ = [
        *((name, View * MAX_LAYERS) for name in ("q", "k", "lse")),
        *((n, c_int32) for n in "layers batch heads tokens head_dim prefix dtype rows".split()),
        ("scale", c_float),
    ]


class SelectParams(Structure):
    """`HivtpSelectParams` of api.h."""

    _fields_ = [
        *((name, c_int32 * 2) for name in ("grid", "regions", "window")),
        ("quota_base", c_int32 * 4),
        ("quota_cut", c_int32 * 4),
        ("capacity", c_int32),
        ("fill", c_int32),
    ]


class Selection(Structure):
    """`HivtpSelection` of api.h."""

    _fields_ = [(name, c_void_p) for name in ("indices", "counts", "stage")]


class Features(Structure):
    """`HivtpFeatures` of api.h."""

    _fields_ = [
        ("data", c_void_p),
        *((name, c_int64) for name in ("image_stride", "row_stride", "row_bytes")),
        *((name, c_int32) for name in ("batch", "patches", "prefix")),
    ]


def build(folder: Path) -> ctypes.CDLL:
    """Compile the CUDA entry points of api.h into `folder` with the host's compiler."""
    (folder / "driver.cpp").write_text(DRIVER)
    command = ["c++", "-shared", "-fPIC", "-std=c++17", "-Wall", "-Wextra", "-Werror"]
    command += [f"-I{CUDA.parent / 'include'}", f"-I{CUDA}", "-o", str(folder / "launch.so")]
    sources = [str(CUDA / "launch.cpp"), str(folder / "driver.cpp")]
    subprocess.run([*command, *sources], check=True)
    return ctypes.CDLL(str(folder / "launch.so"))


def queued(library: ctypes.CDLL, name: str, *arguments: object) -> tuple[int, list[str]]:
    """Call an entry point; returns its status and what it queued, one line each."""
    queue = (ctypes.c_char * 4096).in_dll(library, "queue")
    queue.value = b""
    entry = getattr(library, f"hivtp_cuda_{name}")
    status = entry(*(ctypes.byref(a) if isinstance(a, Structure) else a for a in arguments))
    return status, queue.value.decode().splitlines()
