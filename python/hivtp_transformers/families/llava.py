"""LLaVA-1.5: one square image, one placeholder a patch, an MLP projector."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import LlavaForConditionalGeneration, PreTrainedModel

from .family import Images, describe

# Tokens in front of the patches, and the feature selection that hands over exactly the patches.
_TOWERS = {"clip_vision_model": (1, "default"), "siglip_vision_model": (0, "full")}


class Llava:
    """The facts of a `LlavaForConditionalGeneration`; see `Family`."""

    model_class: ClassVar[type[PreTrainedModel]] = LlavaForConditionalGeneration
    newlines: ClassVar[bool] = False
    by_grid: ClassVar[bool] = False
    joins_images: ClassVar[bool] = False
    image_inputs: ClassVar[tuple[str, ...]] = ("pixel_values", "image_sizes")
    merge: ClassVar[int] = 1
    normed = False

    def __init__(self, config: Any) -> None:
        self.config = config
        vision = config.vision_config
        if vision.model_type not in _TOWERS:
            raise ValueError(
                f"model must have a vision tower of type {' or '.join(_TOWERS)}, "
                f"got {vision.model_type!r}"
            )
        self.prefix, strategy = _TOWERS[vision.model_type]
        if config.vision_feature_select_strategy != strategy:
            raise ValueError(
                f"model.config.vision_feature_select_strategy must be {strategy!r} with a "
                f"{vision.model_type}, got {config.vision_feature_select_strategy!r}"
            )
        self.depth = feature_depth(config.vision_feature_layer, vision.num_hidden_layers)
        side = vision.image_size // vision.patch_size
        self.grid = (side, side)

        self.image_token: int = config.image_token_id
        self.pad_token = spare_token(config)

    def tiles(self, image_size: tuple[int, int]) -> int:
        """One."""
        return 1

    def pack(self, image_size: tuple[int, int], first: int = 0) -> Tensor:
        """Patch after patch: whatever its size, an image is resized to one tile."""
        return torch.arange(first, first + math.prod(self.grid))

    def grids(self, packed: Tensor) -> list[Tensor]:
        """The one tile."""
        return [packed.view(self.grid)]

    def views(self, width: int, height: int) -> list[tuple[float, float, float, float]]:
        """The square in the middle, where the processors of the checkpoints cut."""
        side = min(width, height)
        left, top = (width - side) / 2, (height - side) / 2
        return [(left, top, left + side, top + side)]

    def merge_patches(self, model: Any, hidden: Tensor) -> Tensor:
        """They stay as they are."""
        return hidden

    def merge_scores(self, scores: Tensor) -> Tensor:
        """They stay as they are."""
        return scores

    def images(self, pixel_values: Any, image_sizes: Any) -> Images:
        """Every image is a tile."""
        if not isinstance(pixel_values, Tensor) or pixel_values.dim() != 4 or not len(pixel_values):
            raise ValueError(
                "pixel_values must be a tensor [images, channels, height, width] of at least one, "
                f"got {describe(pixel_values)}"
            )
        if image_sizes is not None:
            raise ValueError(
                "image_sizes must be None beside pixel_values while pruning is applied, "
                f"got a {type(image_sizes).__name__}"
            )
        patches = math.prod(self.grid)
        packed = torch.arange(len(pixel_values) * patches).split(patches)
        return Images(pixel_values, list(packed))


def spare_token(config: Any) -> int:
    """The padding token, or another that no image is made of."""
    configured = (getattr(c, "pad_token_id", None) for c in (config, config.text_config))
    return next(
        token
        for token in (*configured, 0, 1)
        if token is not None and token >= 0 and token != config.image_token_id
    )


def feature_depth(feature_layer: int | list[int], layers: int) -> int:
    """How many layers make the hidden state that is used; number 0 is the embedding."""
    if not isinstance(feature_layer, int):
        raise ValueError(
            f"model.config.vision_feature_layer must be one integer, got {feature_layer!r}"
        )
    depth = feature_layer if feature_layer >= 0 else layers + 1 + feature_layer
    if not 1 <= depth <= layers:
        raise ValueError(
            f"model.config.vision_feature_layer must name one of the tower's {layers} layers, "
            f"got {feature_layer}"
        )
    return depth
