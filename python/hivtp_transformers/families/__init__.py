"""One file per model type, found by `config.model_type`."""

from __future__ import annotations

from typing import Any

from .family import Family, Images, Known
from .internvl import InternVL
from .llava import Llava
from .llava_next import LlavaNext
from .llava_onevision import LlavaOnevision
from .vipllava import VipLlava

__all__ = ["FAMILIES", "Family", "Images", "Known", "of_config", "of_model"]

FAMILIES: dict[str, type[Family]] = {
    "internvl": InternVL,
    "llava": Llava,
    "llava_next": LlavaNext,
    "llava_onevision": LlavaOnevision,
    "vipllava": VipLlava,
}


def of_model(model: Any) -> Family:
    """The family of `model`; raises a TypeError or ValueError that says what is supported."""
    name = type(model).__name__
    family = _find(getattr(model, "config", None), name)
    if not isinstance(model, family.model_class):
        raise TypeError(f"model must be a {family.model_class.__name__}, got {name}")
    return family(model.config)


def of_config(config: Any) -> Family:
    """The family of a model's `config`; raises a TypeError or ValueError as `of_model` does."""
    return _find(config, type(config).__name__)(config)


def _find(config: Any, name: str) -> type[Family]:
    supported = ", ".join(FAMILIES)
    model_type = getattr(config, "model_type", None)
    if model_type is None:
        raise TypeError(f"model must be a transformers model of type {supported}, got {name}")
    if model_type not in FAMILIES:
        raise ValueError(
            f"model must be of a supported type ({supported}), got {model_type!r} ({name})"
        )
    return FAMILIES[model_type]
