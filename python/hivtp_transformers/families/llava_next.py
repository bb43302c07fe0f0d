"""LLaVA-NeXT: a small copy of the image and tiles of the large one, its padding cut off again."""

from __future__ import annotations

import itertools
import math
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import LlavaNextForConditionalGeneration, PreTrainedModel
from transformers.models.llava_next.modeling_llava_next import (
    LlavaNextModel,
    image_size_to_num_patches,
)

from .family import Images, describe, pixel_sizes
from .llava import Llava


class LlavaNext(Llava):
    """The facts of a `LlavaNextForConditionalGeneration`; see `Family`."""

    model_class: ClassVar[type[PreTrainedModel]] = LlavaNextForConditionalGeneration
    newlines: ClassVar[bool] = True

    def pack(self, image_size: tuple[int, int], first: int = 0) -> Tensor:
        """The base tile, then the rows of the stitched tiles without padding, a newline each.

        The model's own packing decides, in whichever version: it gets numbers for features. It
        reads nothing of the model but its config, so that counts are known without weights.
        """
        tiles, patches = self.tiles(image_size), math.prod(self.grid)
        numbers = torch.arange(first, first + tiles * patches).view(tiles, patches, 1)
        (packed,), _ = LlavaNextModel.pack_image_features(
            SimpleNamespace(config=self.config),  # type: ignore[arg-type]
            [numbers],
            [image_size],
            vision_feature_select_strategy=self.config.vision_feature_select_strategy,
            image_newline=torch.tensor([-1]),
        )
        return packed.squeeze(1)

    def grids(self, packed: Tensor) -> list[Tensor]:
        """The base tile and, unless nothing is left of it, the stitched and unpadded grid."""
        base, rest = packed[: math.prod(self.grid)], packed[math.prod(self.grid) :]
        rows = int((rest < 0).sum())
        # An image of one tile is packed with a newline behind it, which ends no row.
        stitched = rest.view(rows, -1)[:, :-1] if rows else rest.view(0, 0)
        return [base.view(self.grid), *([stitched] if stitched.numel() else [])]

    def views(self, width: int, height: int) -> list[tuple[float, float, float, float]]:
        """All of it, small and large."""
        return [(0, 0, width, height)] * 2

    def images(self, pixel_values: Any, image_sizes: Any) -> Images:
        """Cut off the tiles that only pad an image to the most tiles of the batch.

        **Synchronises** once, where `image_sizes` are on a device.
        """
        sizes = pixel_sizes(image_sizes)
        tiles = [self.tiles(size) for size in sizes]
        pixel_values = check_tiles(pixel_values, tiles)
        first = itertools.accumulate(tiles, initial=0)
        patches = math.prod(self.grid)
        packed = [self.pack(size, tile * patches) for size, tile in zip(sizes, first, strict=False)]
        return Images(pixel_values, packed)

    def tiles(self, image_size: tuple[int, int]) -> int:
        """The base tile and those of the resolution that fits the image best."""
        return image_size_to_num_patches(
            image_size, self.config.image_grid_pinpoints, self.config.vision_config.image_size
        )


def check_tiles(pixel_values: Any, tiles: list[int]) -> Tensor:
    """The tiles of all images in a row, `[T, channels, height, width]`, of so many in each.

    Cuts off those that only pad an image to the most tiles of the batch; raises a ValueError for
    what cannot be them.
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
    if pixel_values.dim() == 5:
        images = zip(pixel_values, tiles, strict=True)
        pixel_values = torch.cat([image[:count] for image, count in images])
    return pixel_values
