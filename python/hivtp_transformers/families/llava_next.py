"""LLaVA-NeXT: a small copy of the image and tiles of the large one, without its padding."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, lru_cache
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import LlavaNextForConditionalGeneration, PreTrainedModel
from transformers.models.llava_next.modeling_llava_next import (
    LlavaNextModel,
    image_size_to_num_patches,
)

from ..arguments import describe, pixel_sizes
from ..layout import Image, tiled_image
from .family import Box, Family, Images


class LlavaNext(Family):
    """A `LlavaNextForConditionalGeneration` with a CLIP or SigLIP tower, Granite Vision among them.

    The grids of an image are its base tile and what its other tiles show, stitched, without
    padding. Ratio mode prunes each tile by itself, as in the paper.
    """

    model_class: ClassVar[type[PreTrainedModel]] = LlavaNextForConditionalGeneration
    has_newlines = True
    one_grid = False

    def check(self) -> None:
        """Refuse a feature selection that drops patches: rows of tiles would not fit any more."""
        if self.unshown:
            raise ValueError(
                "model.config.vision_feature_select_strategy must be 'full' with a "
                f"{self.config.vision_config.model_type}, got "
                f"{self.config.vision_feature_select_strategy!r}"
            )

    def image(self, size: tuple[int, int] = (1, 1)) -> Image:
        """Return the base tile, then the rows of the stitched tiles, a newline after each.

        The model's own packing decides, in whichever version: it is given numbers for features. It
        reads nothing of the model but its config, so that counts are known without weights.
        """
        return self._images(size)

    def images(self, inputs: Mapping[str, Any], runs: Sequence[int] | None) -> Images:
        """Return the images, without the tiles that only pad one to the most tiles of the batch.

        **Synchronises** once if `image_sizes` are on a device.
        """
        images = [self.image(size) for size in pixel_sizes(inputs.get("image_sizes"))]
        pixels = real_tiles(inputs["pixel_values"], [image.tiles for image in images])
        return Images(pixels, images)

    def ratio_grids(self, image: Image) -> tuple[Tensor, ...]:
        """Return the tiles, padding included."""
        return tiled_image(*self.grid, image.tiles).grids

    def views(self, image: Image, photo: tuple[int, int], fit: str) -> list[Box]:
        """Return all of the photo, small and large."""
        height, width = photo
        return [(0, 0, width, height)] * len(image.grids)

    def tiles(self, size: tuple[int, int]) -> int:
        """How many tiles the processor makes of an image of `(height, width)` pixels."""
        return int(
            image_size_to_num_patches(
                size, self.config.image_grid_pinpoints, self.config.vision_config.image_size
            )
        )

    @cached_property
    def _images(self) -> Callable[[tuple[int, int]], Image]:
        # Sizes come again, and packing takes milliseconds.
        return lru_cache(maxsize=256)(lambda size: self._image(size, self.tiles(size)))

    def _image(self, size: tuple[int, int], tiles: int) -> Image:
        units = tiles * self.tile
        numbers = torch.arange(units).view(tiles, -1, 1)
        (packed,), _ = LlavaNextModel.pack_image_features(
            SimpleNamespace(config=self.config),  # type: ignore[arg-type]
            [numbers],
            [size],
            vision_feature_select_strategy="default",  # no token but patches is in there
            image_newline=torch.tensor([-1]),
        )
        return Image(packed.squeeze(1), self._grids(packed.squeeze(1)), units, tiles, size)

    def _grids(self, positions: Tensor) -> tuple[Tensor, ...]:
        """The base tile and, unless nothing is left of it, the stitched and unpadded grid."""
        base, rest = positions[: self.tile], positions[self.tile :]
        rows = int((rest < 0).sum())
        # An image of one tile is packed with a newline after it, which ends no row.
        stitched = rest.view(rows, -1)[:, :-1] if rows else rest.view(0, 0)
        return (base.view(self.grid), *([stitched] if stitched.numel() else []))


def real_tiles(pixel_values: Any, tiles: list[int]) -> Tensor:
    """The tiles of all images in a row, `[T, channels, height, width]`, so many of each.

    Cuts off those that only pad an image to the most tiles of the batch; raises a ValueError for
    anything else.
    """
    if not isinstance(pixel_values, Tensor) or pixel_values.dim() not in (4, 5):
        raise ValueError(
            "pixel_values must be a tensor [images, tiles, channels, height, width] or "
            f"[all tiles, channels, height, width], got {describe(pixel_values)}"
        )
    if pixel_values.dim() == 4:
        fits = len(pixel_values) == sum(tiles) > 0
    else:
        fits = len(pixel_values) == len(tiles) > 0 and pixel_values.shape[1] >= max(tiles)
    if not fits:
        raise ValueError(
            f"pixel_values must hold {tiles} tiles for the {len(tiles)} images of image_sizes, "
            f"got {describe(pixel_values)}"
        )
    if pixel_values.dim() == 4:
        return pixel_values
    of_images = zip(pixel_values, tiles, strict=True)
    return torch.cat([image[:count] for image, count in of_images])
