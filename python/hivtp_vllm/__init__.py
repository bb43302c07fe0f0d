"""HIVTP in vLLM: a plugin that is there once it is installed, and that models are switched to.

vLLM calls `register` in each of its processes. Nothing of vLLM is changed; `--hf-overrides` names
the architectures below instead of the stock ones and holds the settings, see `Pruning`.
"""

from __future__ import annotations

from hivtp_kernels.version import __version__

__all__ = ["ARCHITECTURES", "__version__", "register"]

# Lazy, so that registering imports no model.
ARCHITECTURES = {
    "HivtpLlavaForConditionalGeneration": "hivtp_vllm.models",
    "HivtpLlavaNextForConditionalGeneration": "hivtp_vllm.models",
}
_FIRST, _PAST = (0, 32), (0, 33)  # the plugin builds on names that vLLM may change


def register() -> None:
    """Make the architectures known. Raises an ImportError for a vLLM that was not tried."""
    import vllm

    release = tuple(int(part) for part in vllm.__version__.split(".")[:2])
    if not _FIRST <= release < _PAST:
        raise ImportError(f"hivtp_vllm needs vllm>=0.32,<0.33, got {vllm.__version__}")
    from vllm import ModelRegistry

    for name, module in ARCHITECTURES.items():
        ModelRegistry.register_model(name, f"{module}:{name}")
