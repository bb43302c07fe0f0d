"""The C++ extension `hivtp_kernels._C`, loaded on first use. A build may lack it."""

from __future__ import annotations

import importlib
from functools import cache
from importlib.machinery import PathFinder
from pathlib import Path
from types import ModuleType

from ._errors import one_line
from .version import __version__

_NAME, _FOLDER = f"{__package__}._C", Path(__file__).parent


@cache
def _load() -> ModuleType | str:
    """Load the extension, or return the reason in one line if that fails."""
    if file() is None:
        if others := sorted(path.name for path in _FOLDER.glob("_C.*")):
            return f"the C++ extension is built for another Python: {', '.join(others)}"
        return "the C++ extension is not built (HIVTP_BUILD=none, or a bare source tree)"
    try:
        loaded = importlib.import_module(_NAME)
        version = loaded.version
    except Exception as error:
        return f"the C++ extension does not load: {one_line(error)}"
    if version != __version__:
        return f"the C++ extension is version {version}, not {__version__}: reinstall"
    return loaded


def file() -> str | None:
    """Path of the extension that belongs to this copy of the package, or None."""
    # Not `find_spec`, which also finds the extension of another, editable copy.
    spec = PathFinder.find_spec(_NAME, [str(_FOLDER)])
    return spec.origin if spec else None


def unavailable() -> str | None:
    """Why there is no extension, or None."""
    loaded = _load()
    return loaded if isinstance(loaded, str) else None


def extension() -> ModuleType:
    loaded = _load()
    if isinstance(loaded, str):
        raise RuntimeError(loaded)
    return loaded


def variant() -> str:
    """The variant that was built: "cpu", "cuda" or "none"."""
    loaded = _load()
    return "none" if isinstance(loaded, str) else str(loaded.variant)


def cuda_target() -> str | None:
    """CUDA version and architectures of the CUDA kernels, or None if the build has none."""
    return getattr(_load(), "cuda_target", None)
