"""HIVTP in vLLM: a plugin that is present once installed, and that models are switched to.

vLLM calls `register` in each of its processes. Nothing of vLLM is changed; `--hf-overrides` names
the architectures below instead of the stock ones and holds the settings, see
`hivtp_transformers.serving.Serving`.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from typing import Any

__all__ = ["ARCHITECTURES", "register"]

# Lazy, so that registering imports no model.
ARCHITECTURES = {
    "HivtpLlavaForConditionalGeneration": "hivtp_vllm.models",
    "HivtpLlavaNextForConditionalGeneration": "hivtp_vllm.models",
}
_NEEDED = "0.32"  # the plugin builds on names that vLLM may change
_warned = False
_lock = threading.Lock()


def register() -> None:
    """Make the architectures known to vLLM 0.32; with any other, warn once and register nothing.

    Never raises. vLLM calls it outside any `try`, in every process and also for users who installed
    this package only for its ops: an error here would end even `vllm serve --help`.
    """
    version = None
    try:
        import vllm

        version = getattr(vllm, "__version__", None)
        if not f"{version}.".startswith(f"{_NEEDED}."):
            return _warn(version)
        from vllm import ModelRegistry

        for name, module in ARCHITECTURES.items():
            ModelRegistry.register_model(name, f"{module}:{name}")
    except Exception as error:
        _warn(version, error)


def _warn(version: Any, error: Exception | None = None) -> None:
    global _warned
    with _lock:
        first, _warned = not _warned, True
    if not first:
        return
    # Logged, not `warnings.warn`, which raises under `-W error` and is silent under `-W ignore`.
    # Not by a logger of vLLM's, which may be what is broken: without a handler Python prints it on
    # stderr. Handlers of others may raise.
    with contextlib.suppress(Exception):
        logging.getLogger(__name__).warning(
            "hivtp_vllm needs vllm %s, got %r%s: no model of hivtp_vllm is registered, all others "
            "work as without it.",
            _NEEDED,
            version,
            f", which fails with {type(error).__name__}: {error}" if error else "",
        )
