"""`python -m hivtp_kernels`: print versions, the build variant, and why backends are missing."""

from __future__ import annotations

import platform
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version

import torch

from . import _extension, available_backends
from ._errors import one_line
from .version import __version__


def _ask(question: Callable[..., str | None], *arguments: str) -> str:
    """The answer, or why there is none: this command must work in a broken installation."""
    try:
        return question(*arguments) or "none"
    except PackageNotFoundError:
        return "not installed"
    except Exception as error:
        return f"unknown: {one_line(error)}"


def _device() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"


def main() -> None:
    rows = {
        "hivtp_kernels": f"{__version__} (installed as {_ask(version, 'hivtp_kernels')})",
        "build": _ask(_extension.variant),
        "CUDA kernels": _ask(_extension.cuda_target),
        "extension": _ask(_extension.file),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _ask(version, "triton"),
        "transformers": _ask(version, "transformers"),
        "device": _ask(_device),
    }
    for name, value in rows.items():
        print(f"{name:15}{value}")
    print("backends")
    for name, reason in available_backends().items():
        print(f"  {name:12}{'available' if reason is None else reason}")


if __name__ == "__main__":
    main()
