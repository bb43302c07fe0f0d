"""HIVTP as a vLLM plugin: installing it makes it available, and a model opts in.

vLLM calls `register` in each of its processes; nothing in vLLM is changed. To prune, pass
`--hf-overrides` with one of the architectures below in place of the stock one, and the settings of
`hivtp_transformers.serving.Serving`.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from typing import Any

__all__ = ["ARCHITECTURES", "register"]

# As strings, so that registering imports no model.
ARCHITECTURES = {
    "HivtpLlavaForConditionalGeneration": "hivtp_vllm.models",
    "HivtpLlavaNextForConditionalGeneration": "hivtp_vllm.models",
}
_NEEDED = "0.32"  # the plugin uses names that vLLM may change
_warned = False
_lock = threading.Lock()


def register() -> None:
    """Register the architectures with vLLM 0.32; with any other version, only warn, once.

    Never raises. vLLM calls it outside any `try`, in every process, and for users who installed
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
    # Logged, because `warnings.warn` raises under `-W error` and is silent under `-W ignore`. Not
    # with vLLM's logger, which may be what is broken: without a handler, Python prints to stderr.
    # Other people's handlers may raise.
    with contextlib.suppress(Exception):
        logging.getLogger(__name__).warning(
            "hivtp_vllm needs vllm %s, got %r%s: no model of hivtp_vllm is registered; all others "
            "are unaffected.",
            _NEEDED,
            version,
            f", which fails with {type(error).__name__}: {error}" if error else "",
        )
