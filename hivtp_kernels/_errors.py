"""One-line reasons for packages that are installed but broken."""

from __future__ import annotations

import textwrap
import traceback

_SKIPPED = ("hivtp_kernels", "hivtp_transformers", "hivtp_vllm", "hivtp_lmms_eval", "importlib")


def one_line(error: BaseException) -> str:
    """Type and message of `error`, in one line."""
    return f"{type(error).__name__}: {textwrap.shorten(str(error), 300)}".removesuffix(": ")


def why_not(error: BaseException) -> str:
    """Why an import failed, in one line that names the package at fault."""
    missing = getattr(error, "name", None) if isinstance(error, ImportError) else None
    if isinstance(error, ModuleNotFoundError) and missing and "." not in missing:
        return f"{missing} is not installed"
    # The first package outside this project in the traceback: its name is the one that the user
    # knows, whatever it imports in turn.
    frames = [
        frame.f_globals.get("__name__") for frame, _ in traceback.walk_tb(error.__traceback__)
    ]
    packages = [name.partition(".")[0] for name in (*frames, missing) if name]
    at_fault = next((name for name in packages if name not in (*_SKIPPED, "__main__")), None)
    return f"{at_fault or packages[0]} does not load: {one_line(error)}"
