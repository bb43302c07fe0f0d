"""LLaVA-OneVision: up to 36 tiles, whose stitched features are resized where they get too many."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlavaOnevisionForConditionalGeneration, PreTrainedModel
from transformers.models.llava_onevision.modeling_llava_onevision import LlavaOnevisionModel

from .family import Images, pixel_sizes
from .llava_next import LlavaNext, check_tiles

_NEVER_RESIZE = "anyres_max_1000000"


class LlavaOnevision(LlavaNext):
    """The facts of a `LlavaOnevisionForConditionalGeneration`; see `Family`.

    What can be kept of an image that is resized are the patches of its base tile and the cells of
    the resized grid; their features and scores are those of the patches, resized alike.
    """

    model_class: ClassVar[type[PreTrainedModel]] = LlavaOnevisionForConditionalGeneration
    by_grid: ClassVar[bool] = True
    image_inputs: ClassVar[tuple[str, ...]] = ("pixel_values", "image_sizes", "batch_num_images")

    def pack(self, image_size: tuple[int, int], first: int = 0) -> Tensor:
        """The base tile, then the rows of the stitched tiles or of what they are resized to."""
        return self._pack(image_size, self.tiles(image_size), first)

    def images(self, pixel_values: Any, image_sizes: Any, batch_num_images: Any = None) -> Images:
        """As in LLaVA-NeXT; of several images in a sample each is one tile."""
        sizes = pixel_sizes(image_sizes)
        together = _images_in_sample(batch_num_images, len(sizes))
        counts = [
            self.tiles(size) if images == 1 else 1
            for size, images in zip(sizes, together, strict=True)
        ]
        tiles = check_tiles(pixel_values, counts)
        packed, resized, first = [], [], 0
        for size, count in zip(sizes, counts, strict=True):
            packed.append(self._pack(size, count, first))
            resized.append(self._is_resized(size, count))
            first = int(packed[-1].max()) + 1 if resized[-1] else first + count * self._patches
        if not any(resized):
            return Images(tiles, packed)
        return Images(tiles, packed, self._resampling(sizes, counts, resized))

    @property
    def _patches(self) -> int:
        return math.prod(self.grid)

    def _pack(self, image_size: tuple[int, int], tiles: int, first: int) -> Tensor:
        end = first + tiles * self._patches
        # In fp64, which holds the numbers, since integers cannot be resized.
        numbers = torch.arange(first, end, dtype=torch.float64).view(tiles, -1, 1)
        if not self._is_resized(image_size, tiles):
            return self._packed(numbers, image_size, newline=-1).long()
        cells = len(self._packed(numbers, image_size)) - self._patches
        rows = len(self._packed(numbers, image_size, newline=-1)) - self._patches - cells
        numbered = torch.arange(first, first + self._patches + cells)
        grid = F.pad(numbered[self._patches :].view(rows, -1), (0, 1), value=-1)
        return torch.cat([numbered[: self._patches], grid.flatten()])

    def _is_resized(self, image_size: tuple[int, int], tiles: int) -> bool:
        """Whether the model's own packing changes the number of positions."""
        nothing = torch.empty(tiles, self._patches, 1)
        whole = self._packed(nothing, image_size, aspect_ratio=_NEVER_RESIZE)
        return len(self._packed(nothing, image_size)) != len(whole)

    def _packed(
        self,
        values: Tensor,
        image_size: tuple[int, int],
        newline: int | None = None,
        aspect_ratio: str | None = None,
    ) -> Tensor:
        """Values `[tiles, N, C]` of an image, packed by the model: `[positions, C]`, or without C
        where that is 1.
        """
        (packed,), _ = LlavaOnevisionModel.pack_image_features(
            SimpleNamespace(config=self.config),  # type: ignore[arg-type]
            [values],
            [image_size],
            image_newline=None if newline is None else values.new_tensor([newline]),
            vision_aspect_ratio=aspect_ratio or self.config.vision_aspect_ratio,
        )
        return packed.squeeze(1)

    def _resampling(
        self, sizes: list[tuple[int, int]], counts: list[int], resized: list[bool]
    ) -> Callable[[Tensor], Tensor]:
        def resample(values: Tensor) -> Tensor:
            images = zip(values.split(counts), sizes, resized, strict=True)
            return torch.cat(
                [
                    self._packed(image, size).view(-1, values.shape[2])
                    if change
                    else image.flatten(0, 1)
                    for image, size, change in images
                ]
            )

        return resample


def _images_in_sample(batch_num_images: Any, images: int) -> list[int]:
    """For each image how many there are in its sample; one, where nothing is said."""
    if batch_num_images is None:
        return [1] * images
    counts = [int(count) for count in batch_num_images]
    if sum(counts) != images or min(counts, default=0) < 0:
        raise ValueError(
            f"batch_num_images must add up to the {images} images of image_sizes, got {counts}"
        )
    return list(itertools.chain.from_iterable([count] * count for count in counts))
