"""One file a model family: what is particular to it, found by `config.model_type`."""

from __future__ import annotations

from typing import Protocol

from torch import nn
from transformers import PreTrainedModel

from . import llava


class Family(Protocol):
    """What the pruner has to know of a model; made from it, or refusing it by name."""

    vision_tower: PreTrainedModel
    projector: nn.Module
    depth: int  # vision layers that run: the language model uses the output of the last of them
    grid: tuple[int, int]  # patches of an image, rows and columns: one placeholder token for each
    prefix: int  # tokens in front of the patches
    image_token: int
    pad_token: int  # for the room that dropped placeholders leave; never the image token


_FAMILIES = {"llava": llava.Llava}
SUPPORTED = tuple(sorted(_FAMILIES))


def adapt(model: PreTrainedModel) -> Family:
    """The family of `model`; raises a TypeError or ValueError that says what is supported."""
    supported = ", ".join(SUPPORTED)
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    if model_type is None:
        raise TypeError(
            f"model must be a transformers model of type {supported}, got {type(model).__name__}"
        )
    if model_type not in _FAMILIES:
        raise ValueError(
            f"model must be of a type with an adapter ({supported}), got {model_type!r} "
            f"({type(model).__name__})"
        )
    return _FAMILIES[model_type](model)
