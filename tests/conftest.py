"""Fixtures of all tests: the backend under test, and poisoned outputs."""

import os
import sys
from pathlib import Path

# NumPy's products, in the oracle and in Triton's interpreter, are small: several threads slow them
# down, fivefold if the cores are busy. Read when NumPy is first imported.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import pytest
import torch

# With this flag, which Triton reads when it is first imported, kernels run on the CPU. Only
# `pytest tests/gpu` runs them on a device. Workers of xdist have other arguments, but inherit the
# environment of the process that starts them.
assert "triton" not in sys.modules
on_gpu = torch.cuda.is_available() and any("gpu" in Path(a).parts for a in sys.argv[1:])
os.environ.setdefault("TRITON_INTERPRET", "0" if on_gpu else "1")

from cuda_emulator import build
from helpers import emulate

from hivtp_kernels.backends import NAMES, load

# For the same reason; test_cpu.py sets its own numbers of threads.
torch.set_num_threads(1)

POISON = {torch.int8: 0x7F, torch.int32: 0x7FFFFFFF, torch.int64: 0x7FFFFFFFFFFFFFFF}


@pytest.fixture(scope="session")
def emulator(request):
    """The extension whose CUDA kernels run on the CPU, or why there is none."""
    # A folder for each Python, as CMake stores its paths there.
    name = f"cuda_emulator-{sys.implementation.cache_tag}"
    return build.missing() or build.extension(request.config.cache.mkdir(name))


@pytest.fixture(params=NAMES)
def backend(request, monkeypatch):
    """Each backend in turn. A missing one skips, or fails if HIVTP_REQUIRE_BACKENDS names it."""
    if request.param == "cuda":
        extension = request.getfixturevalue("emulator")
        reason = extension if isinstance(extension, str) else None
        if reason is None:
            emulate(monkeypatch, extension)
    else:
        reason = load(request.param).unavailable(torch.device("cpu"))
    if reason is not None:
        if request.param in os.environ.get("HIVTP_REQUIRE_BACKENDS", "").split(","):
            pytest.fail(f"backend {request.param} is required: {reason}")
        pytest.skip(f"backend {request.param}: {reason}")
    return request.param


@pytest.fixture(autouse=True)
def poison(monkeypatch):
    """Fill fresh tensors with NaN or the largest integer, so that an unwritten output shows."""
    empty = torch.empty

    def poisoned(*args, **kwargs):
        tensor = empty(*args, **kwargs)
        if tensor.dtype == torch.uint8:
            return tensor.fill_(0xFF)
        return tensor.fill_(POISON.get(tensor.dtype, float("nan")))

    monkeypatch.setattr(torch, "empty", poisoned)
