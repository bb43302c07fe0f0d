"""One file a model family: what is particular to it, found by `config.model_type`."""

from __future__ import annotations

from typing import Any

from . import internvl, llava, llava_next, llava_onevision
from .family import Family, Images, describe, pixel_sizes

__all__ = ["SUPPORTED", "Family", "Images", "adapt", "describe", "of_config", "pixel_sizes"]

_FAMILIES: dict[str, type[Family]] = {
    "internvl": internvl.InternVL,
    "llava": llava.Llava,
    "llava_next": llava_next.LlavaNext,
    "llava_onevision": llava_onevision.LlavaOnevision,
}
SUPPORTED = tuple(sorted(_FAMILIES))


def adapt(model: Any) -> Family:
    """The family of `model`; raises a TypeError or ValueError that says what is supported."""
    name = type(model).__name__
    family = _find(getattr(model, "config", None), name)
    if not isinstance(model, family.model_class):
        raise TypeError(f"model must be a {family.model_class.__name__}, got {name}")
    return family(model.config)


def of_config(config: Any) -> Family:
    """The family of a model's `config`; raises a TypeError or ValueError as `adapt` does."""
    return _find(config, type(config).__name__)(config)


def _find(config: Any, name: str) -> type[Family]:
    supported = ", ".join(SUPPORTED)
    model_type = getattr(config, "model_type", None)
    if model_type is None:
        raise TypeError(f"model must be a transformers model of type {supported}, got {name}")
    if model_type not in _FAMILIES:
        raise ValueError(
            f"model must be of a type with an adapter ({supported}), got {model_type!r} ({name})"
        )
    return _FAMILIES[model_type]
