"""The registry of backends, and the choice between them.

A backend is a module of this package with the functions of `Backend`. It is imported when first
needed, so `import hivtp_kernels` requires neither triton nor a compiler.
"""

from __future__ import annotations

import importlib
import os
from functools import cache
from typing import Protocol, cast

import torch
from torch import Tensor

from .._errors import one_line
from ..types import Attention, Kept, SelectParams

# Each backend's module, in the order in which backends are listed.
_MODULES = {"torch": "reference", "cpu": "cpu", "triton": "triton", "cuda": "cuda"}
NAMES = tuple(_MODULES)
# What "auto" tries, by type of device.
_PREFERENCE = {"cpu": ("cpu", "torch"), "cuda": ("cuda", "triton", "torch")}


class Backend(Protocol):
    """The functions of a backend module. Arguments are checked already; batches may be empty.

    A module may lack ops, all but `reference`: "auto" then takes the next backend.
    """

    def unavailable(self, device: torch.device, rows: str | None = None) -> str | None:
        """Why it cannot run on that device (or cannot score those rows there), or None."""

    def attention_scores(self, attention: Attention) -> Tensor: ...

    def select_tokens(self, scores: Tensor, params: SelectParams) -> Kept: ...

    def score_and_select(self, attention: Attention, params: SelectParams) -> Kept: ...

    def gather_tokens(self, x: Tensor, indices: Tensor, prefix: int) -> Tensor: ...

    def pack_tokens(
        self, x: Tensor, indices: Tensor, cu_seqlens: Tensor, total: int, prefix: int
    ) -> Tensor: ...


@cache
def load(name: str) -> Backend:
    """The module of a backend."""
    return cast(Backend, importlib.import_module(f"{__name__}.{_MODULES[name]}"))


def check_name(name: str, argument: str = "backend") -> None:
    """Raise a ValueError unless `name` is "auto" or a backend."""
    if name != "auto" and name not in NAMES:
        raise ValueError(f"{argument} must be 'auto' or one of {sorted(NAMES)}, got {name!r}")


def unavailable(
    name: str, device: torch.device, op: str | None = None, rows: str | None = None
) -> str | None:
    """Why a backend cannot run on a device (or cannot run that op, with those rows), or None."""
    try:
        backend = load(name)
        reason = backend.unavailable(device, rows)
    except Exception as error:
        return f"it fails with {one_line(error)}"
    if reason is None and op is not None and not hasattr(backend, op):
        return f"it has no {op}"
    return reason


def resolve(name: str, device: torch.device, op: str, rows: str | None = None) -> Backend:
    """The backend that runs `op` on `device`: the named one, or for "auto" the first that can.

    Raises
    ------
    RuntimeError
        If the named backend, or every backend that "auto" may take, cannot run; with the reasons.
    """
    if name == "auto":
        name = os.environ.get("HIVTP_BACKEND") or "auto"
        check_name(name, "HIVTP_BACKEND")
    reasons = {}
    for candidate in _PREFERENCE[device.type] if name == "auto" else (name,):
        reason = unavailable(candidate, device, op, rows)
        if reason is None:
            return load(candidate)
        reasons[candidate] = reason
    if name == "auto":
        reason = "; ".join(f"{candidate}: {reason}" for candidate, reason in reasons.items())
        raise RuntimeError(f"no backend can run {op} on {device}: {reason}")
    raise RuntimeError(f"backend {name!r} cannot run on {device}: {reasons[name]}")


def _has_cuda() -> bool:
    try:
        return torch.cuda.is_available()
    except Exception:
        # Something is wrong with the driver: ask each backend, which gives that as its reason.
        return True


def available_backends(device: torch.device | str | None = None) -> dict[str, str | None]:
    """List the backends and why any of them is unavailable.

    Parameters
    ----------
    device : torch.device or str, optional
        The device of the tensors; by default any device of this machine.

    Returns
    -------
    dict of str to (str or None)
        None if the backend can run, else the reason in one line. Never synchronises.
    """
    if device is not None:
        devices = [torch.device(device)]
    else:
        devices = [torch.device("cpu")]
        if _has_cuda():
            devices.append(torch.device("cuda"))
    result: dict[str, str | None] = {}
    for name in NAMES:
        reasons = [unavailable(name, d) for d in devices]
        result[name] = None if None in reasons else reasons[-1]
    return result
