import os
import subprocess
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch

from hivtp_kernels import (
    PruneConfig,
    available_backends,
    backends,
    gather_tokens,
    select_tokens,
)
from hivtp_kernels.backends import NAMES, load, resolve, unavailable

CPU = torch.device("cpu")


def run(code, **environment):
    """Run `code` in a new interpreter, without this process's flags."""
    env = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "HIVTP_BACKEND")}
    return subprocess.run(
        [sys.executable, "-c", code], env=env | environment, capture_output=True, text=True
    )


def test_every_backend_is_listed_with_its_reason():
    for device in (None, "cpu", torch.device("cpu")):
        reasons = available_backends(device)
        assert set(reasons) == set(NAMES)
        assert reasons["torch"] is None
        assert all(reason is None or "\n" not in reason for reason in reasons.values())


def test_a_device_that_is_not_there_runs_nothing():
    for device in ("mps", *(() if torch.cuda.is_available() else ("cuda",))):
        assert None not in available_backends(device).values()


def test_auto_takes_the_first_that_can_run(monkeypatch):
    monkeypatch.delenv("HIVTP_BACKEND", raising=False)
    fastest = next(n for n in ("cpu", "torch") if available_backends("cpu")[n] is None)
    assert resolve("auto", CPU, "select_tokens") is load(fastest)


def test_auto_on_a_cuda_device_takes_cuda_then_triton_then_torch(monkeypatch):
    monkeypatch.delenv("HIVTP_BACKEND", raising=False)
    able = {"cuda", "triton", "torch"}
    for name in sorted(able):
        monkeypatch.setattr(
            load(name),
            "unavailable",
            lambda *_, name=name: None if name in able else "gone fishing",
        )
    for best in ("cuda", "triton", "torch"):
        assert resolve("auto", torch.device("cuda"), "select_tokens") is load(best)
        able.remove(best)


def test_the_environment_sets_the_default(monkeypatch):
    monkeypatch.setenv("HIVTP_BACKEND", "torch")
    assert resolve("auto", CPU, "select_tokens") is load("torch")
    monkeypatch.setenv("HIVTP_BACKEND", "fastest")
    with pytest.raises(ValueError, match="HIVTP_BACKEND must be 'auto' or one of .* got 'fastest'"):
        select_tokens(torch.zeros(1, 576), PruneConfig())


def test_a_named_backend_never_falls_back(monkeypatch):
    monkeypatch.setattr(load("cpu"), "unavailable", lambda device, rows=None: "gone fishing")
    with pytest.raises(RuntimeError, match="'cpu' cannot run on cpu: gone fishing"):
        select_tokens(torch.zeros(1, 576), PruneConfig(), backend="cpu")
    assert resolve("auto", CPU, "select_tokens") is load("torch")
    assert available_backends()["cpu"] == "gone fishing"


@pytest.fixture
def partial(monkeypatch):
    """A backend that only gathers, in place of cpu."""
    module = ModuleType("partial")
    module.unavailable = lambda device, rows=None: None
    module.gather_tokens = lambda x, indices, prefix: x[:, prefix:][:, : indices.shape[1]] * 0 + 7
    monkeypatch.setattr(backends, "load", lambda name: module if name == "cpu" else load(name))
    return module


def test_auto_passes_over_a_backend_that_lacks_the_op(partial, monkeypatch):
    monkeypatch.delenv("HIVTP_BACKEND", raising=False)
    assert resolve("auto", CPU, "gather_tokens") is partial
    assert resolve("auto", CPU, "select_tokens") is load("torch")
    assert available_backends("cpu")["cpu"] is None
    config = PruneConfig(grid=(2, 2), budget=2)
    kept = select_tokens(torch.zeros(1, 4), config)
    assert kept.indices.tolist() == [[0, 1]]
    assert (gather_tokens(torch.zeros(1, 4, 3), kept) == 7).all()


def test_a_named_backend_that_lacks_the_op_says_so(partial):
    assert unavailable("cpu", CPU, "select_tokens") == "it has no select_tokens"
    assert unavailable("cpu", CPU, "gather_tokens") is unavailable("cpu", CPU) is None
    message = "backend 'cpu' cannot run on cpu: it has no select_tokens"
    with pytest.raises(RuntimeError, match=message):
        select_tokens(torch.zeros(1, 4), PruneConfig(grid=(2, 2)), backend="cpu")


def test_no_backend_at_all(partial, monkeypatch):
    monkeypatch.delenv("HIVTP_BACKEND", raising=False)
    monkeypatch.setattr(load("torch"), "unavailable", lambda device, rows=None: "gone fishing")
    message = "no backend can run select_tokens on cpu: cpu: it has no .*; torch: gone fishing"
    with pytest.raises(RuntimeError, match=message):
        select_tokens(torch.zeros(1, 4), PruneConfig(grid=(2, 2)))


def test_triton_takes_cpu_tensors_only_under_the_interpreter():
    code = (
        "import torch, hivtp_kernels as h\n"
        "h.select_tokens(torch.zeros(1, 576), h.PruneConfig(), backend='triton')"
    )
    result = run(code)
    assert result.returncode != 0
    assert "backend 'triton' cannot run on cpu" in result.stderr
    assert "TRITON_INTERPRET" in result.stderr


@pytest.mark.parametrize(
    ("device", "changes", "reason"),
    [
        ("cuda", {"unavailable": "not built"}, "not built"),
        (
            "cuda",
            {"target": None},
            "this build (cpu) has no CUDA kernels: HIVTP_BUILD=cuda has them",
        ),
        (
            "cuda",
            {"found": False},
            "torch finds no CUDA device for the kernels, built by CUDA 12.8",
        ),
        ("cpu", {}, "it takes CUDA tensors, not cpu"),
        ("cuda", {"capability": (7, 0)}, "it is sm_70, and the kernels were built by CUDA 12.8"),
        ("cuda", {"capability": (9, 0)}, None),
    ],
)
def test_why_cuda_cannot_run(device, changes, reason, monkeypatch):
    facts = {"unavailable": None, "target": "CUDA 12.8", "found": True, "capability": (8, 0)}
    facts |= changes
    cuda = load("cuda")
    extension = SimpleNamespace(
        unavailable=lambda: facts["unavailable"],
        cuda_target=lambda: facts["target"],
        variant=lambda: "cpu",
        extension=lambda: SimpleNamespace(cuda_runs_on=lambda major, minor: major >= 8),
    )
    monkeypatch.setattr(cuda, "_extension", extension)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: facts["found"])
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: facts["capability"])
    assert cuda.unavailable(torch.device(device)) == reason


@pytest.mark.parametrize("missing", ["triton", "hivtp_kernels._C"])
def test_imports_and_works_without(missing):
    code = (
        "import sys\n"
        f"sys.modules[{missing!r}] = None\n"
        "import torch, hivtp_kernels as h\n"
        "name = {'triton': 'triton', 'hivtp_kernels._C': 'cpu'}[" + repr(missing) + "]\n"
        "assert h.available_backends()[name], h.available_backends()\n"
        # All-equal scores: each region's first 36 patches are three rows of 12, which fill six
        # windows, so that 36 + 30 patches of each region are kept.
        "assert h.select_tokens(torch.zeros(1, 576), h.PruneConfig()).counts.item() == 264\n"
    )
    result = run(code)
    assert result.returncode == 0, result.stderr


def test_importing_is_light():
    code = (
        "import sys, hivtp_kernels\n"
        "heavy = {'triton', 'transformers', 'hivtp_kernels._C'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "import torch\n"
        "assert not torch.cuda.is_initialized()"
    )
    result = run(code)
    assert result.returncode == 0, result.stderr


def test_the_module_prints_what_is_there():
    result = subprocess.run(
        [sys.executable, "-m", "hivtp_kernels"], capture_output=True, text=True, check=True
    )
    for word in ("hivtp_kernels", "torch", "triton", "build", "cpu"):
        assert word in result.stdout
