"""What a family of models has to say."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple, Protocol

from torch import Tensor
from transformers import PreTrainedModel


class Images(NamedTuple):
    """The images of one call.

    Attributes
    ----------
    tiles : Tensor
        `[T, channels, height, width]`: what the vision tower encodes, image after image.
    packed : list of Tensor
        Each image as `Family.pack` gives it, its patches counted on from those of the image before.
    resample : callable or None
        Makes `[S, C]`, a row a number in `packed`, of `[T, N, C]`, a row a patch, where images are
        resized behind the tower. None: a number is that of a patch.
    """

    tiles: Tensor
    packed: list[Tensor]
    resample: Callable[[Tensor], Tensor] | None = None


class Family(Protocol):
    """What pruning has to know of a model; made from its config, or refusing it by name.

    The modules have the same names everywhere: `model.model.vision_tower`, its neighbour
    `multi_modal_projector` and, where there are newlines, `image_newline`.
    """

    model_class: ClassVar[type[PreTrainedModel]]
    newlines: ClassVar[bool]  # whether a learned newline ends the rows of an image
    by_grid: ClassVar[bool]  # whether tiles are pruned stitched together, in ratio mode, too
    image_inputs: ClassVar[tuple[str, ...]]  # the arguments that `images` takes
    joins_images: ClassVar[bool]  # whether `forward` takes the features of all images as one tensor
    merge: ClassVar[int]  # side of the square of the tower's patches that makes one patch here
    config: Any
    depth: int  # vision layers that run: the language model uses the output of the last of them
    normed: bool  # whether it uses it behind the tower's last norm
    grid: tuple[int, int]  # patches of a tile, rows and columns
    prefix: int  # tokens of the tower in front of the patches
    image_token: int
    pad_token: int  # for the room that dropped placeholders leave; never the image token

    def __init__(self, config: Any) -> None: ...

    def tiles(self, image_size: tuple[int, int]) -> int:
        """How many tiles the processor makes of an image of `(height, width)` pixels."""

    def pack(self, image_size: tuple[int, int], first: int = 0) -> Tensor:
        """An image of `(height, width)` pixels as the prompt has room for it.

        int64 `[positions]` on the CPU: the number of the patch at each visual position, counted
        from `first` through the image's tiles in raster order, and -1 where a newline stands.
        """

    def grids(self, packed: Tensor) -> list[Tensor]:
        """The grids that share an image's budget: the numbers of their patches, int64 `[H, W]`."""

    def merge_patches(self, model: Any, hidden: Tensor) -> Tensor:
        """What the projector takes, a row a patch: `[T, N, C]`, or with the prefix in front."""

    def merge_scores(self, scores: Tensor) -> Tensor:
        """Scores `[T, N]` from those of the tower's patches."""

    def views(self, width: int, height: int) -> list[tuple[float, float, float, float]]:
        """What each of an image's `grids` shows of a photo of so many pixels.

        Left, top, right and bottom of it, in pixels of the photo.
        """

    def images(self, *image_inputs: Any) -> Images:
        """The images of a call from its `image_inputs`; a ValueError for what cannot be them."""


def describe(value: Any) -> str:
    """What an error says of an input: the shape of a tensor, else the type."""
    return str(tuple(value.shape)) if isinstance(value, Tensor) else type(value).__name__


def pixel_sizes(image_sizes: Any) -> list[tuple[int, int]]:
    """`(height, width)` of each image; raises a ValueError for what cannot be that."""
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
