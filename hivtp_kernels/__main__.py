"""`python -m hivtp_kernels`: versions, build variant, backends and why any is missing."""

from __future__ import annotations

import importlib.util
import platform
from importlib.metadata import PackageNotFoundError, version

import torch

from . import _extension, available_backends
from .version import __version__


def _version(distribution: str) -> str:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return "not installed"


def main() -> None:
    spec = importlib.util.find_spec(f"{__package__}._C")
    rows = {
        "hivtp_kernels": f"{__version__} (installed as {_version('hivtp_kernels')})",
        "build": _extension.variant(),
        "CUDA kernels": _extension.cuda_target() or "none",
        "extension": spec.origin if spec and spec.origin else "none",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "transformers": _version("transformers"),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
    }
    for name, value in rows.items():
        print(f"{name:15}{value}")
    print("backends")
    for name, reason in available_backends().items():
        print(f"  {name:12}{'available' if reason is None else reason}")


if __name__ == "__main__":
    main()
