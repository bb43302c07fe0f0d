"""The C++ extension `hivtp_kernels._C`, loaded when first asked for. A build may be without it."""

from __future__ import annotations

import importlib
import importlib.util
from functools import cache
from types import ModuleType

from .version import __version__


@cache
def _load() -> ModuleType | str:
    """Load the extension; where that fails, say why in one line."""
    name = f"{__package__}._C"
    if importlib.util.find_spec(name) is None:
        return "the C++ extension is not built (HIVTP_BUILD=none, or a bare source tree)"
    try:
        loaded = importlib.import_module(name)
    except ImportError as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        return f"the C++ extension does not load: {reason}"
    if loaded.version != __version__:
        return f"the C++ extension is of version {loaded.version}, not {__version__}: install anew"
    return loaded


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
    """What was built: "cpu", "cuda", or "none"."""
    loaded = _load()
    return "none" if isinstance(loaded, str) else str(loaded.variant)


def cuda_target() -> str | None:
    """CUDA version and architectures of the CUDA kernels, or None where the build has none."""
    return getattr(_load(), "cuda_target", None)
