"""The one registry of backends, and the choice between them.

A backend is a module of this package with the functions of `Backend`. It is imported when first
asked for, so that `import hivtp_kernels` needs neither triton nor a compiler. Importing one
binds its name here, so this file must not use `torch` as the name of the library.
"""

from __future__ import annotations

import importlib
import os
from functools import cache
from typing import Protocol, cast

from torch import Tensor
from torch import device as torch_device
from torch.cuda import is_available as cuda_is_available

from .._errors import one_line
from ..config import Rule

NAMES = ("torch", "cpu", "triton", "cuda")
_MODULES = {"torch": "reference"}
_PREFERENCE = {"cpu": ("cpu", "torch"), "cuda": ("cuda", "triton", "torch")}


class Backend(Protocol):
    """What a backend module defines. Arguments arrive checked; batches may be empty."""

    def unavailable(self, device: torch_device, rows: str | None = None) -> str | None:
        """Why it cannot run on that device (or cannot score those rows there), or None."""

    def attention_scores(
        self,
        q: list[Tensor],
        k: list[Tensor],
        lse: list[Tensor],
        rows: str,
        prefix: int,
        scale: float,
    ) -> Tensor: ...

    def select_tokens(self, scores: Tensor, rule: Rule) -> tuple[Tensor, Tensor, Tensor]: ...

    def score_and_select(
        self,
        q: list[Tensor],
        k: list[Tensor],
        lse: list[Tensor],
        rows: str,
        prefix: int,
        scale: float,
        rule: Rule,
    ) -> tuple[Tensor, Tensor, Tensor]: ...

    def gather_tokens(self, x: Tensor, indices: Tensor, prefix: int) -> Tensor: ...

    def pack_tokens(
        self, x: Tensor, indices: Tensor, cu_seqlens: Tensor, total: int, prefix: int
    ) -> Tensor: ...


@cache
def load(name: str) -> Backend:
    return cast(Backend, importlib.import_module(f"{__name__}.{_MODULES.get(name, name)}"))


def check_name(name: str, argument: str = "backend") -> None:
    if name != "auto" and name not in NAMES:
        raise ValueError(f"{argument} must be 'auto' or one of {sorted(NAMES)}, got {name!r}")


def resolve(name: str, device: torch_device, rows: str | None = None) -> Backend:
    """The named backend, or its reason as a RuntimeError; for "auto" the first that can run."""
    if name == "auto":
        name = os.environ.get("HIVTP_BACKEND") or "auto"
        check_name(name, "HIVTP_BACKEND")
    if name == "auto":
        names = _PREFERENCE[device.type]
        return load(next(n for n in names if _unavailable(n, device, rows) is None))
    reason = _unavailable(name, device, rows)
    if reason is not None:
        raise RuntimeError(f"backend {name!r} cannot run on {device}: {reason}")
    return load(name)


def _unavailable(name: str, device: torch_device, rows: str | None = None) -> str | None:
    """Why the named backend cannot run there, or None; an error that it raises is such a reason."""
    try:
        return load(name).unavailable(device, rows)
    except Exception as error:
        return f"it fails with {one_line(error)}"


def _has_cuda() -> bool:
    try:
        return cuda_is_available()
    except Exception:
        # Whatever is wrong with the driver, each backend is then asked and says so.
        return True


def available_backends(device: torch_device | str | None = None) -> dict[str, str | None]:
    """Every backend, and why it is unavailable.

    Parameters
    ----------
    device : torch.device or str, optional
        Where the tensors will be; by default any device that this machine has.

    Returns
    -------
    dict of str to (str or None)
        None where the backend can run, else the reason in one line. Nothing synchronises.
    """
    if device is not None:
        devices = [torch_device(device)]
    else:
        devices = [torch_device("cpu")]
        if _has_cuda():
            devices.append(torch_device("cuda"))
    result: dict[str, str | None] = {}
    for name in NAMES:
        reasons = [_unavailable(name, d) for d in devices]
        result[name] = None if None in reasons else reasons[-1]
    return result
