"""Broken installations, and importing the package more than once."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import hivtp_kernels

PACKAGE = Path(hivtp_kernels.__file__).parent


def python(code, *path):
    """What `code` prints, in a new interpreter that looks in `path` first."""
    cleared = ("TRITON_INTERPRET", "HIVTP_BACKEND")
    env = {name: value for name, value in os.environ.items() if name not in cleared}
    # No byte code: its time stamps are too coarse for the edits of these tests.
    env |= {"PYTHONPATH": os.pathsep.join(map(str, path)), "PYTHONDONTWRITEBYTECODE": "1"}
    # Python looks in the working directory first, which must not hold the package.
    done = subprocess.run(
        [sys.executable, "-c", code], cwd="/", env=env, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


MAIN = "import runpy; runpy.run_module('hivtp_kernels', run_name='__main__')\n"
USE = (
    "import torch, hivtp_kernels as h\n"
    "assert h.select_tokens(torch.zeros(1, 576), h.PruneConfig()).counts.item() == 264\n"
)


def read(printed):
    """What `python -m hivtp_kernels` prints, by name: first the facts, then the backends."""
    above, backends = (
        dict(line.split(maxsplit=1) for line in part.splitlines())
        for part in printed.split("backends\n")
    )
    assert [*above] == [
        *("hivtp_kernels", "build", "CUDA", "extension", "python", "torch", "triton"),
        *("transformers", "device"),
    ]
    assert [*backends] == ["torch", "cpu", "triton", "cuda"]
    return above, backends


def copy(folder):
    """The package without its extension, in `folder`."""
    shutil.copytree(
        PACKAGE, folder / PACKAGE.name, ignore=shutil.ignore_patterns("_C.*", "__pycache__")
    )
    return folder / PACKAGE.name


@pytest.mark.parametrize("error", ["AttributeError", "OSError", "RuntimeError", "SystemError"])
def test_a_broken_triton_is_a_reason(tmp_path, error):
    (tmp_path / "triton.py").write_text(f"raise {error}('first\\n\\nsecond')")
    code = USE + "print(h.available_backends('cpu')['triton'])\n" + MAIN
    reason, printed = python(code, tmp_path).split("\n", 1)
    assert reason == f"triton does not load: {error}: first second"
    assert read(printed)[1]["triton"] == reason


@pytest.mark.parametrize("name", ["matplotlib", "PIL", "skimage", "torchvision", "transformers"])
def test_the_ops_need_no_other_package(tmp_path, name):
    (tmp_path / f"{name}.py").write_text("raise SystemError('broken')")
    read(python(USE + MAIN, tmp_path))


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("_C.py", "raise SystemError('broken')", "does not load: SystemError: broken"),
        ("_C.py", "", "does not load: AttributeError: module 'hivtp_kernels._C' has no attribute"),
        ("_C.py", "version = '0.0'", "is version 0.0, not "),
        ("_C.abi3.so", "\x7fELF", "does not load: ImportError: "),
        ("_C.cpython-27.so", "", "is built for another Python: _C.cpython-27.so"),
        (None, "", "is not built (HIVTP_BUILD=none, or a bare source tree)"),
    ],
)
def test_a_broken_extension_is_a_reason(tmp_path, name, content, reason):
    package = copy(tmp_path)
    if name is not None:
        (package / name).write_text(content)
    above, backends = read(python(USE + MAIN, tmp_path))
    assert above["build"] == "none"
    for backend in ("cpu", "cuda"):
        assert backends[backend].startswith(f"the C++ extension {reason}")


def test_broken_metadata_is_a_reason():
    break_it = (
        "import importlib.metadata\n"
        "def version(name): raise RuntimeError('no\\nmetadata')\n"
        "importlib.metadata.version = version\n"
    )
    above, _ = read(python(USE + break_it + MAIN))
    reason = "unknown: RuntimeError: no metadata"
    assert above["triton"] == above["transformers"] == reason
    assert above["hivtp_kernels"] == f"{hivtp_kernels.__version__} (installed as {reason})"


@pytest.mark.parametrize("available", [True, False])
def test_a_broken_driver_is_a_reason(tmp_path, available):
    """A driver that finds a device which does not answer, and one that fails from the start."""
    package = copy(tmp_path)
    (package / "_C.py").write_text(
        f"version, variant, cuda_target = {hivtp_kernels.__version__!r}, 'cuda', 'CUDA 12.8'"
    )
    break_it = (
        "import torch\n"
        "def broken(*_): raise RuntimeError('CUDA driver\\nis broken')\n"
        f"torch.cuda.is_available = (lambda: True) if {available} else broken\n"
        "torch.cuda.get_device_name = torch.cuda.get_device_capability = broken\n"
        "import hivtp_kernels\n"
        "assert hivtp_kernels.available_backends('cpu')['torch'] is None\n"
    )
    above, backends = read(python(break_it + MAIN, tmp_path))
    assert above["device"] == "unknown: RuntimeError: CUDA driver is broken"
    assert backends["cuda"] == "it fails with RuntimeError: CUDA driver is broken"
    assert backends["torch"] == "available"


PURGE = "for name in [n for n in sys.modules if n.startswith('hivtp_')]: del sys.modules[name]\n"
CHECK = """
def check(gather):
    x = torch.arange(24.0).view(1, 6, 4).requires_grad_()
    indices = torch.tensor([[1, 3, -1]], dtype=torch.int32)
    out = gather(x, indices, 1, "auto")
    expected = torch.zeros(1, 3, 4)
    expected[:, :2] = x.detach()[:, [2, 4]]
    assert torch.equal(out, expected)
    (grad,) = torch.autograd.grad(out.sum(), x)
    assert grad.sum() == 8 and (grad[:, [2, 4]] == 1).all()
    assert gather(x.to("meta"), indices.to("meta"), 1, "auto").shape == (1, 3, 4)
    with FakeTensorMode() as mode:
        fake = gather(mode.from_tensor(x), mode.from_tensor(indices), 1, "auto")
        assert fake.shape == (1, 3, 4)

def works():
    import hivtp_kernels as h
    check(torch.ops.hivtp.gather_tokens)
    for name, reason in h.available_backends("cpu").items():
        if reason is None:
            kept = h.select_tokens(torch.zeros(1, 576), h.PruneConfig(), backend=name)
            assert kept.counts.item() == 264, name
"""


@pytest.mark.parametrize(
    "again",
    [
        PURGE,
        "importlib.reload(sys.modules['hivtp_kernels._ops'])\n",
        "importlib.reload(sys.modules['hivtp_kernels'])\n",
    ],
    ids=["purge", "reload _ops", "reload"],
)
def test_a_second_import_works(again):
    code = (
        "import importlib, sys, torch\n"
        "from torch._subclasses import FakeTensorMode\n" + CHECK + "works()\n"
        "old = torch.ops.hivtp.gather_tokens.default  # what a compiled graph holds\n"
        f"for _ in range(3):\n    {again}    works()\n    check(old)\n"
    )
    python(code)


def test_a_second_import_runs_its_own_kernels():
    code = (
        "import sys, torch, hivtp_kernels\n" + PURGE + "import hivtp_kernels as h\n"
        "h.backends.load('torch').select_tokens = lambda scores, params: (scores.int(),) * 3\n"
        "scores = torch.full((1, 576), 7.0)\n"
        "kept = h.select_tokens(scores, h.PruneConfig(), backend='torch')\n"
        "assert (kept.counts == 7).all()"
    )
    python(code)


@pytest.mark.parametrize(
    ("change", "got"),
    [
        ("sys.path.insert(0, {second!r})", "{version} in {second}/hivtp_kernels: restart"),
        ("edit('version.py', {version!r}, '99.0')", "99.0 in {first}/hivtp_kernels: restart"),
        ("edit('_ops.py', 'SymInt total', 'int total')", "other schemas of the same ops: restart"),
    ],
    ids=["path", "version", "schemas"],
)
def test_another_copy_is_refused(tmp_path, change, got):
    first, second = tmp_path / "first", tmp_path / "second"
    copy(first), copy(second)
    names = {"first": str(first), "second": str(second), "version": hivtp_kernels.__version__}
    code = (
        "import pathlib, sys, torch, hivtp_kernels as h\n"
        "def edit(name, old, new):\n"
        f"    path = pathlib.Path({str(first)!r}, 'hivtp_kernels', name)\n"
        "    path.write_text(path.read_text().replace(old, new))\n"
        + PURGE
        + change.format(**names)
        + "\ntry: import hivtp_kernels\n"
        "except ImportError as error: print(error)\n"
        "assert h.select_tokens(torch.zeros(1, 576), h.PruneConfig()).counts.item() == 264\n"
    )
    printed = python(code, first)
    has = "hivtp_kernels must stay the same within a process, which has hivtp_kernels "
    assert printed.startswith(has + f"{hivtp_kernels.__version__} in {first}/hivtp_kernels, got ")
    assert got.format(**names) in printed
