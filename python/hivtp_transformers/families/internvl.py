"""InternVL: tiles of 448 pixels, whose patches a pixel shuffle merges two by two."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor
from transformers import InternVLForConditionalGeneration, PreTrainedModel

from .family import Images, describe
from .llava import Llava, feature_depth, spare_token

_SHUFFLE = 0.5  # what is shuffled into channels leaves half of the rows and columns


class InternVL(Llava):
    """The facts of an `InternVLForConditionalGeneration`; see `Family`.

    The processor cuts an image into tiles, each of which the prompt has room for by itself: here a
    tile is an image.
    """

    model_class: ClassVar[type[PreTrainedModel]] = InternVLForConditionalGeneration
    joins_images: ClassVar[bool] = True
    merge: ClassVar[int] = 2
    prefix = 1

    def __init__(self, config: Any) -> None:
        self.config = config
        vision = config.vision_config
        for name, legal in (
            ("vision_feature_select_strategy", "default"),
            ("downsample_ratio", _SHUFFLE),
        ):
            if (value := getattr(config, name)) != legal:
                raise ValueError(f"model.config.{name} must be {legal!r}, got {value!r}")
        height, width = (
            size // patch for size, patch in zip(vision.image_size, vision.patch_size, strict=True)
        )
        if height != width or height % self.merge:
            raise ValueError(
                "model.config.vision_config must have a square grid of an even number of patches "
                f"a side, got {height} x {width}"
            )
        self.grid = (height // self.merge, width // self.merge)
        self.depth = feature_depth(config.vision_feature_layer, vision.num_hidden_layers)
        self.normed = config.vision_feature_layer == -1
        self.image_token = config.image_token_id
        self.pad_token = spare_token(config)

    def images(self, pixel_values: Any, image_sizes: Any) -> Images:
        """Every tile is an image."""
        side = self.config.vision_config.image_size[0]
        if not isinstance(pixel_values, Tensor) or pixel_values.shape[-2:] != (side, side):
            raise ValueError(
                f"pixel_values must be a tensor [tiles, channels, {side}, {side}], got "
                f"{describe(pixel_values)}"
            )
        return super().images(pixel_values, image_sizes)

    def views(self, width: int, height: int) -> list[tuple[float, float, float, float]]:
        """All of a tile."""
        return [(0, 0, width, height)]

    def merge_patches(self, model: Any, hidden: Tensor) -> Tensor:
        """By the model's own shuffle."""
        side = self.merge * self.grid[0]
        square = hidden[:, self.prefix :].unflatten(1, (side, side))
        return model.model.pixel_shuffle(square, scale_factor=_SHUFFLE).flatten(1, 2)

    def merge_scores(self, scores: Tensor) -> Tensor:
        """The attention that four patches receive is what their token receives."""
        (rows, columns), merge = self.grid, self.merge
        return scores.view(-1, rows, merge, columns, merge).sum((2, 4)).flatten(1)
