"""LLaVA-OneVision: up to 36 tiles, whose stitched features are resized if they get too many."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlavaOnevisionForConditionalGeneration, PreTrainedModel
from transformers.models.llava_onevision.modeling_llava_onevision import LlavaOnevisionModel

from ..arguments import pixel_sizes
from ..layout import Image
from .family import Images, Known
from .llava_next import LlavaNext, real_tiles

_NEVER_RESIZE = "anyres_max_1000000"


class LlavaOnevision(LlavaNext):
    """A `LlavaOnevisionForConditionalGeneration`, its images.

    The units of an image that is resized are the patches of its base tile and the cells of the
    resized grid; their features and scores are those of the patches, resized alike.
    """

    model_class: ClassVar[type[PreTrainedModel]] = LlavaOnevisionForConditionalGeneration
    image_inputs = ("pixel_values", "image_sizes", "batch_num_images")

    def images_of_sizes(self, sizes: Sequence[tuple[int, int]], known: Known) -> list[Image]:
        """Return the images; of several in a sample each is one tile."""
        together = _images_in_sample(known.batch_num_images, len(sizes))
        return [
            self.image(size) if images == 1 else self._image(size, 1)
            for size, images in zip(sizes, together, strict=True)
        ]

    def images(self, inputs: Mapping[str, Any], runs: Sequence[int] | None) -> Images:
        """Return the images, without tiles that only pad. **Synchronises** as in LLaVA-NeXT."""
        sizes = pixel_sizes(inputs.get("image_sizes"))
        images = self.images_of_sizes(sizes, Known(batch_num_images=inputs.get("batch_num_images")))
        return Images(real_tiles(inputs["pixel_values"], [i.tiles for i in images]), images)

    def ratio_grids(self, image: Image) -> tuple[Tensor, ...]:
        """Return the base tile and the stitched grid, as they are in the prompt."""
        return image.grids

    def units_are_patches(self, images: Sequence[Image]) -> bool:
        """Return whether no image is resized."""
        return not any(map(self._is_resized, images))

    def unit_scores(self, scores: Tensor, images: Sequence[Image]) -> Tensor:
        """Return the scores, resized with the images that are."""
        return self._resized(scores[..., None], images).squeeze(1)

    def unit_features(self, model: Any, hidden: Tensor, images: Sequence[Image]) -> Tensor:
        """Return the output for each unit, resized with the images that are."""
        return self._resized(hidden[:, self.tower_class.prefix :], images)

    def features(
        self, model: Any, hidden: Tensor, images: Sequence[Image], units: Tensor
    ) -> tuple[Tensor, ...]:
        """Return the projected features of `units`; all are projected if any image is resized."""
        if self.units_are_patches(images):
            return super().features(model, hidden, images, units)
        projected = model.model.multi_modal_projector(hidden[:, self.tower_class.prefix :])
        return (self._resized(projected, images).index_select(0, units),)

    def _image(self, size: tuple[int, int], tiles: int) -> Image:
        # In fp64, which holds the numbers, since integers cannot be resized.
        numbers = torch.arange(tiles * self.tile, dtype=torch.float64).view(tiles, -1, 1)
        whole = self._pack(numbers, size, newline=-1, aspect_ratio=_NEVER_RESIZE)
        packed = self._pack(numbers, size, newline=-1)
        if len(packed) == len(whole):
            positions = whole.long()
            return Image(positions, self._grids(positions), numbers.numel(), tiles, size)
        units = len(self._pack(numbers, size))
        rows = len(packed) - units
        cells = torch.arange(self.tile, units).view(rows, -1)
        positions = torch.cat([torch.arange(self.tile), F.pad(cells, (0, 1), value=-1).flatten()])
        return Image(positions, self._grids(positions), units, tiles, size)

    def _is_resized(self, image: Image) -> bool:
        return image.units != image.tiles * self.tile

    def _pack(
        self,
        values: Tensor,
        size: tuple[int, int],
        newline: int | None = None,
        aspect_ratio: str | None = None,
    ) -> Tensor:
        """Values `[tiles, N, C]` of an image, packed by the model: `[positions, C]`, or without C
        where that is 1.
        """
        (packed,), _ = LlavaOnevisionModel.pack_image_features(
            SimpleNamespace(config=self.config),  # type: ignore[arg-type]
            [values],
            [size],
            image_newline=None if newline is None else values.new_tensor([newline]),
            vision_aspect_ratio=aspect_ratio or self.config.vision_aspect_ratio,
        )
        return packed.squeeze(1)

    def _resized(self, values: Tensor, images: Sequence[Image]) -> Tensor:
        """`[all units, C]` of `[T, N, C]`."""
        if self.units_are_patches(images):
            return values.flatten(0, 1)
        of_images = values.split([image.tiles for image in images])
        return torch.cat([
            self._pack(own, image.size).view(-1, values.shape[2])
            if self._is_resized(image)
            else own.flatten(0, 1)
            for own, image in zip(of_images, images, strict=True)
        ])  # fmt: skip


def _images_in_sample(batch_num_images: Any, images: int) -> list[int]:
    """For each image how many there are in its sample; one, where nothing is said."""
    if batch_num_images is None:
        return [1] * images
    try:
        counts = [int(count) for count in batch_num_images]
    except (TypeError, ValueError):
        counts = [-1]
    if sum(counts) != images or min(counts, default=0) < 0:
        raise ValueError(
            f"batch_num_images must be integers that add up to the {images} images of image_sizes, "
            f"got {batch_num_images!r}"
        )
    return list(itertools.chain.from_iterable([count] * count for count in counts))
