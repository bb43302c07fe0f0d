"""What pruning knows of a model type: the base class of all families."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling

from ..arguments import describe
from ..layout import Image, tiled_image, tower_rows
from ..towers import TOWERS, Tower, choose_layers, choose_rows, feature_layers

Box = tuple[float, float, float, float]


class Images(NamedTuple):
    """The images of one call.

    Attributes
    ----------
    pixels : Tensor
        `[T, channels, height, width]`: what the vision tower encodes, image after image.
    images : list of Image
        The images, in the order in which the prompts hold them.
    """

    pixels: Tensor
    images: list[Image]


class Known(NamedTuple):
    """What decides the layout of images besides their sizes, if a caller knows it.

    Attributes
    ----------
    processor : ProcessorMixin or None
        The model's processor.
    batch_num_images : sequence of int or None
        How many images each sample holds.
    """

    processor: Any = None
    batch_num_images: Sequence[int] | None = None


class Family:
    """What pruning knows of a model type, from its config alone; refuses configs it cannot prune.

    By itself this is a model whose images are one tile each, encoded by `vision_tower` and
    projected, patch by patch, by `multi_modal_projector`, both attributes of `model.model`. A
    subclass sets `model_class` and overrides only what differs:

    ==================  ============================================================================
    `model_class`       the class in transformers
    `image_inputs`      the arguments of `forward` that describe images
    `has_newlines`      whether rows of units end in a learned newline
    `merge`             patches per side of a unit; more than 1 also needs `unit_features`
    `towers`            classes of vision towers, by `vision_config.model_type`
    `one_grid`          whether every image is one grid of the tower's size
    `check`             refuse configs that cannot be pruned
    `image`             an image, as the prompt has room for it, from its size
    `images_of_sizes`   images from sizes and what else decides their layout
    `images`            the images of a call, from its arguments
    `ratio_grids`       what ratio mode prunes, if not the grids of a budget
    `units_are_patches` whether units are the tower's patches, as they are
    `unit_scores`       a score per unit, from one per patch of the tower
    `unit_features`     features per unit, from the tower's output
    `features`          projected features of the units that stay
    `newline`           the embedding of a newline
    `encoder_output`    features in the form in which the model takes them: a list of images, or
                        `joined` if its `pooler_output` must be one tensor
    `views`             what each grid shows of a photo
    ==================  ============================================================================

    Attributes
    ----------
    config : PreTrainedConfig
        The model's.
    tower_class : type of Tower
        The vision tower's class in `towers.py`.
    features_of : tuple of int
        The tower's hidden states that the projector takes; 1 is the output of the first layer.
    grid : (int, int)
        Rows and columns of units of a tile.
    unshown : int
        Leading patches of a tile that the model does not show to the language model.
    image_token, pad_token : int
        The placeholder of an image, and any other token.
    """

    model_class: ClassVar[type[PreTrainedModel]]
    image_inputs: ClassVar[tuple[str, ...]] = ("pixel_values", "image_sizes")
    has_newlines: ClassVar[bool] = False
    one_grid: ClassVar[bool] = True
    merge: ClassVar[int] = 1
    towers: ClassVar[Mapping[str, type[Tower]]] = TOWERS

    def __init__(self, config: Any) -> None:
        self.config = config
        vision = config.vision_config
        if vision.model_type not in self.towers:
            raise ValueError(
                f"model must have a vision tower of type {' or '.join(self.towers)}, "
                f"got {vision.model_type!r}"
            )
        self.tower_class: type[Tower] = self.towers[vision.model_type]
        self.features_of = feature_layers(self._feature_layer(), vision.num_hidden_layers)
        height, width = self.tower_class.grid(vision)
        self.grid = (height // self.merge, width // self.merge)
        self.unshown = self._leading() - self.tower_class.prefix
        self.image_token: int = config.image_token_id
        self.pad_token = _spare_token(config)
        self.check()

    @property
    def depth(self) -> int:
        """How many layers of the tower run."""
        return max(self.features_of)

    @property
    def tile(self) -> int:
        """Units of a tile."""
        return math.prod(self.grid)

    def scored_layers(self, layers: Sequence[int] | None) -> tuple[int, ...]:
        """Return the layers whose attention scores units; raise if the tower has none such."""
        return choose_layers(layers, self.depth, self.config.vision_config.num_hidden_layers)

    def scored_rows(self, rows: str | None) -> str:
        """Return the query rows to average over; raise if the tower has none such."""
        return choose_rows(rows, self.tower_class, self.config.vision_config.model_type)

    def check(self) -> None:
        """Raise a ValueError if the config is one that cannot be pruned."""

    def image(self, size: tuple[int, int] = (1, 1)) -> Image:
        """Return an image of `(height, width)` pixels, as the prompt has room for it."""
        return self._whole_image

    @cached_property
    def _whole_image(self) -> Image:
        image = tiled_image(*self.grid)
        return image._replace(positions=image.positions[self.unshown :])

    def images_of_sizes(self, sizes: Sequence[tuple[int, int]], known: Known) -> list[Image]:
        """Return images of such sizes; raise a ValueError that names a missing argument."""
        self._refuse_samples(known)
        return [self.image(size) for size in sizes]

    def images(self, inputs: Mapping[str, Any], runs: Sequence[int] | None) -> Images:
        """Return the images of a call; raise a ValueError if the inputs do not go together.

        `inputs` has the arguments of `forward`, `runs` the lengths of the runs of placeholders in
        the prompts, if there are prompts.
        """
        pixels = square_tiles(inputs)
        return Images(pixels, [self.image()] * len(pixels))

    def ratio_grids(self, image: Image) -> tuple[Tensor, ...]:
        """Return the grids that ratio mode prunes, each by itself."""
        return image.grids

    def units_are_patches(self, images: Sequence[Image]) -> bool:
        """Return whether the units of these images are the tower's patches, tile by tile."""
        return self.merge == 1

    def unit_scores(self, scores: Tensor, images: Sequence[Image]) -> Tensor:
        """Return fp32 `[all units]` from the scores of the tower's patches, fp32 `[T, N]`.

        The mean of a unit's patches.
        """
        (height, width), merge = self.grid, self.merge
        return scores.view(-1, height, merge, width, merge).mean((2, 4)).flatten()

    def unit_features(self, model: Any, hidden: Tensor, images: Sequence[Image]) -> Tensor:
        """Return `[all units, C]` from the tower's output, `[T, prefix + N, C]`."""
        return hidden[:, self.tower_class.prefix :].flatten(0, 1)

    def features(
        self, model: Any, hidden: Tensor, images: Sequence[Image], units: Tensor
    ) -> tuple[Tensor, ...]:
        """Return the projected features of `units`, `[U, C]`, and deeper levels if there are any.

        Projects nothing else.
        """
        if self.units_are_patches(images):
            rows = tower_rows(units, self.tile, self.tower_class.prefix)
            kept = hidden.flatten(0, 1).index_select(0, rows)
        else:
            kept = self.unit_features(model, hidden, images).index_select(0, units)
        return (model.model.multi_modal_projector(kept),)

    def newline(self, model: Any) -> Tensor | None:
        """Return the embedding of a newline, `[C]`, or None."""
        return model.model.image_newline if self.has_newlines else None

    def encoder_output(self, features: list[Tensor], *deeper: list[Tensor]) -> Any:
        """Return what `forward` takes for encoded images, from the features of each, `[n, C]`."""
        assert not deeper, "a family whose units have features of several levels overrides this"
        return BaseModelOutputWithPooling(pooler_output=features)  # type: ignore[arg-type]

    def views(self, image: Image, photo: tuple[int, int], fit: str) -> list[Box]:
        """Return what each grid shows of a photo of `(height, width)` pixels.

        Left, top, right and bottom in the photo's pixels; outside of it is padding. `fit` is how
        the processor fits a photo to a square: "crop", "squeeze" or "pad".
        """
        return [square(photo, fit)]

    def _refuse_samples(self, known: Known) -> None:
        if known.batch_num_images is not None:
            raise ValueError(
                f"batch_num_images must be None for {self.config.model_type}, whose images do not "
                f"depend on each other, got {known.batch_num_images!r}"
            )

    def _feature_layer(self) -> Any:
        return self.config.vision_feature_layer

    def _leading(self) -> int:
        """Leading tokens of the tower that the model's feature selection drops."""
        strategy, prefix = self.config.vision_feature_select_strategy, self.tower_class.prefix
        leading = {"default": 1, "full": 0}.get(strategy, -1)
        if leading < prefix:
            raise ValueError(
                "model.config.vision_feature_select_strategy must be "
                f"{'default' if prefix else 'default or full'!r} with a "
                f"{self.config.vision_config.model_type}, got {strategy!r}"
            )
        return leading


def square_tiles(inputs: Mapping[str, Any]) -> Tensor:
    """The `pixel_values` of a model whose tiles are `[T, channels, height, width]`."""
    pixels = inputs["pixel_values"]
    if not isinstance(pixels, Tensor) or pixels.dim() != 4 or not len(pixels):
        raise ValueError(
            "pixel_values must be a tensor [images, channels, height, width] of at least one, "
            f"got {describe(pixels)}"
        )
    if (sizes := inputs.get("image_sizes")) is not None:
        raise ValueError(
            "image_sizes must be None alongside pixel_values while pruning is applied, "
            f"got a {type(sizes).__name__}"
        )
    return pixels


def joined(features: list[Tensor]) -> Any:
    """`encoder_output` of a model that takes the features of all images as one tensor.

    Images would have to be of one length there, so one token counts as an image. That makes no
    difference to the model, and `generate` finds out how many belong to a row.
    """
    return BaseModelOutputWithPooling(pooler_output=torch.cat(features)[:, None])


def square(photo: tuple[int, int], fit: str) -> Box:
    """What a square view shows of a photo of `(height, width)` pixels, as `Family.views` says."""
    height, width = photo
    if fit == "squeeze":
        return 0, 0, width, height
    side = min(photo) if fit == "crop" else max(photo)
    left, top = (width - side) / 2, (height - side) / 2
    return left, top, left + side, top + side


def _spare_token(config: Any) -> int:
    """The padding token, or any token other than the image token."""
    configured = (getattr(c, "pad_token_id", None) for c in (config, config.text_config))
    return next(
        token
        for token in (*configured, 0, 1)
        if token is not None and token >= 0 and token != config.image_token_id
    )
