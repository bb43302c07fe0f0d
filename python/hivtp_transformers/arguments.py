"""Arguments of a call: by name, and refused before any work if they cannot be pruned."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

CACHES = ("past_key_values", "cache")  # the latter from transformers 5.24 on


def describe(value: Any) -> str:
    """What an error says of an input: the shape of a tensor, else the type."""
    return str(tuple(value.shape)) if isinstance(value, Tensor) else type(value).__name__


def by_name(
    function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[str, Any]:
    """The arguments of a call of `function` as keywords."""
    bound = inspect.signature(function).bind_partial(*args, **kwargs)
    named = dict(bound.arguments)
    for parameter in bound.signature.parameters.values():
        if parameter.kind is parameter.VAR_KEYWORD:
            named |= named.pop(parameter.name, {})
    return named


def pixel_sizes(image_sizes: Any) -> list[tuple[int, int]]:
    """`(height, width)` of each image; raises a ValueError for anything else."""
    sizes = image_sizes.tolist() if isinstance(image_sizes, Tensor) else image_sizes
    try:
        pairs = [(int(height), int(width)) for height, width in sizes]
    except (TypeError, ValueError):
        pairs = [(0, 0)]
    if any(min(pair) < 1 for pair in pairs):
        raise ValueError(
            "image_sizes must hold (height, width) of each image, positive integers, "
            f"got {image_sizes!r}"
        )
    return pairs


def refuse_videos(inputs: dict[str, Any]) -> None:
    """Raise a ValueError if the inputs hold videos."""
    if (videos := inputs.get("pixel_values_videos")) is not None:
        raise ValueError(
            "pixel_values_videos must be None while pruning is applied, which is for images, got a "
            f"{type(videos).__name__}: call remove() on the handle first"
        )


def check(inputs: dict[str, Any], per_token: Sequence[str]) -> None:
    """Raise a ValueError for what cannot be pruned: a wrong token would go unnoticed.

    `per_token` names the arguments that have an element per token and are shortened.
    """
    input_ids = inputs.get("input_ids")
    if not isinstance(input_ids, Tensor) or input_ids.dim() != 2:
        raise ValueError(
            "input_ids must be a tensor [batch, tokens] alongside pixel_values, got "
            f"{describe(input_ids)}"
        )
    shape = input_ids.shape
    for name in per_token:
        value = inputs.get(name)
        if value is not None and not (isinstance(value, Tensor) and value.shape == shape):
            raise ValueError(
                f"{name} must be a tensor of the shape of input_ids {tuple(shape)}, "
                f"got {describe(value)}"
            )
    for name in CACHES:
        cache = inputs.get(name)
        if cache is not None and not hasattr(cache, "get_seq_length"):
            raise TypeError(f"{name} must be a transformers Cache, got a {type(cache).__name__}")
        if cache is not None and cache.get_seq_length():
            raise ValueError(
                f"{name} must be empty alongside pixel_values, got a cache of "
                f"{cache.get_seq_length()} tokens: continue from Handle.compact(...) without images"
            )
    for name in (
        "inputs_embeds",
        "position_ids",
        "mm_encoder_outputs",
        "vision_feature_layer",
        "vision_feature_layers",
        "vision_feature_select_strategy",
        "vision_aspect_ratio",
    ):
        if inputs.get(name) is not None:
            raise ValueError(
                f"{name} must be None alongside pixel_values while pruning is applied, "
                f"got a {type(inputs[name]).__name__}"
            )
    for name, value in inputs.items():
        if name not in per_token and isinstance(value, Tensor) and value.shape == shape:
            raise ValueError(
                f"{name} has the shape of input_ids {tuple(shape)}, but only "
                f"{', '.join(per_token)} can be shortened with it while pruning is applied"
            )
    if isinstance(inputs.get("logits_to_keep"), Tensor):
        raise ValueError(
            "logits_to_keep must be an integer alongside pixel_values while pruning is applied, "
            "got a tensor of positions, which change"
        )
