"""InternVL: images of square tiles, whose patches a pixel shuffle merges two by two."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor
from transformers import InternVLForConditionalGeneration

from ..arguments import describe
from ..layout import Image, tiled_image
from ..towers import InternViT, Tower
from .family import Box, Family, Images, Known, joined, square, square_tiles


class InternVL(Family):
    """An `InternVLForConditionalGeneration`.

    An image is a run of placeholders: the tiles that the processor cut it into, followed by a
    thumbnail if there is more than one. Each tile is a grid.
    """

    model_class = InternVLForConditionalGeneration
    one_grid = False
    merge = 2
    towers: ClassVar[Mapping[str, type[Tower]]] = {"internvl_vision": InternViT}

    def check(self) -> None:
        """Refuse other shuffles, several feature layers, and grids that do not merge."""
        layer = self.config.vision_feature_layer
        if not isinstance(layer, int) or layer == self.config.vision_config.num_hidden_layers:
            raise ValueError(
                "model.config.vision_feature_layer must be one integer: -1 for the last layer and "
                f"its norm, or an earlier layer, got {layer!r}"
            )
        if (ratio := self.config.downsample_ratio) != 1 / self.merge:
            raise ValueError(
                f"model.config.downsample_ratio must be {1 / self.merge}, got {ratio!r}"
            )
        height, width = self.tower_class.grid(self.config.vision_config)
        if height != width or height % self.merge:
            raise ValueError(
                "model.config.vision_config must have a square grid of an even number of patches "
                f"per side, got {height} x {width}"
            )

    def image(self, size: tuple[int, int] = (1, 1)) -> Image:
        """Raise: a size does not tell how many tiles an image has."""
        raise ValueError(
            "processor must be given for internvl: its settings decide how many tiles an image has"
        )

    def images_of_sizes(self, sizes: Sequence[tuple[int, int]], known: Known) -> list[Image]:
        """Return the images, with as many tiles as the processor cuts them into."""
        self._refuse_samples(known)
        if not sizes:
            return []
        if known.processor is None:
            return [self.image(size) for size in sizes]
        count = getattr(known.processor, "_get_num_multimodal_tokens", None)
        if count is None:
            raise ValueError(
                "processor must be the model's InternVLProcessor, "
                f"got a {type(known.processor).__name__}"
            )
        tiles = count(image_sizes=[list(size) for size in sizes])["num_image_patches"]
        return [tiled_image(*self.grid, int(n)) for n in tiles]

    def images(self, inputs: Mapping[str, Any], runs: Sequence[int] | None) -> Images:
        """Return an image per run of placeholders; without prompts, an image per tile."""
        pixels = inputs["pixel_values"]
        side = self.config.vision_config.image_size[0]
        if not isinstance(pixels, Tensor) or pixels.shape[-2:] != (side, side):
            raise ValueError(
                f"pixel_values must be a tensor [tiles, channels, {side}, {side}], got "
                f"{describe(pixels)}"
            )
        pixels = square_tiles(inputs)
        if runs is None:
            runs = [self.tile] * len(pixels)
        if sum(runs) != len(pixels) * self.tile or any(run % self.tile for run in runs):
            raise ValueError(
                f"input_ids must hold {self.tile} placeholders (token {self.image_token}) for each "
                f"of the {len(pixels)} tiles in pixel_values, got runs of {list(runs)}"
            )
        of_tiles = {run: tiled_image(*self.grid, run // self.tile) for run in set(runs)}
        return Images(pixels, [of_tiles[run] for run in runs])

    def unit_features(self, model: Any, hidden: Tensor, images: Sequence[Image]) -> Tensor:
        """Return the model's own shuffle of the tower's output."""
        side = self.merge * self.grid[0]
        patches = hidden[:, self.tower_class.prefix :].unflatten(1, (side, side))
        return model.model.pixel_shuffle(patches, scale_factor=1 / self.merge).flatten(0, 2)

    def encoder_output(self, features: list[Tensor], *deeper: list[Tensor]) -> Any:
        """Return the features of all images as one tensor."""
        return joined(features)

    def views(self, image: Image, photo: tuple[int, int], fit: str) -> list[Box]:
        """Return the tiles, in the rows and columns nearest to the photo's shape, and the photo."""
        height, width = photo
        whole = square(photo, "squeeze")
        tiles = len(image.grids) - 1
        if not tiles:
            return [whole]
        shapes = [(n, tiles // n) for n in range(1, tiles + 1) if tiles % n == 0]
        rows, columns = min(shapes, key=lambda s: abs(s[1] / s[0] - width / height))
        across, down = width / columns, height / rows
        return [
            *(
                (column * across, row * down, (column + 1) * across, (row + 1) * down)
                for row in range(rows)
                for column in range(columns)
            ),
            whole,
        ]
