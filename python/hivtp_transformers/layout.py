"""Where the units of an image are in the prompt: the image model that all families share."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

NEWLINE = -1


class Image(NamedTuple):
    """An image as the language model gets it.

    A unit is what is kept or dropped: a ViT patch, or a merged patch where the model merges patches
    before the language model. Units are numbered from 0 within their image.

    Attributes
    ----------
    positions : Tensor
        int64 `[n]` on the CPU: the unit at each position of the prompt that belongs to the image,
        or -1 for a learned newline.
    grids : tuple of Tensor
        int64 `[H, W]` on the CPU: the units, as the grids that share the image's budget.
    units : int
        How many units the encoder makes of the image, shown in `positions` or not.
    tiles : int
        How many rows of the encoder's input it takes.
    size : (int, int)
        Height and width in pixels, where the family needs them; else `(0, 0)`.
    """

    positions: Tensor
    grids: tuple[Tensor, ...]
    units: int
    tiles: int = 1
    size: tuple[int, int] = (0, 0)

    @property
    def newlines(self) -> int:
        """How many positions are newlines."""
        return int((self.positions == NEWLINE).sum())

    def shown(self, grid: Tensor) -> Tensor:
        """Which units of `grid` have a position, bool of its shape."""
        has_position = torch.zeros(self.units + 1, dtype=torch.bool)
        has_position[self.positions] = True  # a newline lands in the last element
        has_position[-1] = False
        return has_position[grid]


def tiled_image(height: int, width: int, tiles: int = 1) -> Image:
    """An image of equal tiles, each a grid, with a position for every unit in raster order."""
    area = height * width
    numbers = torch.arange(tiles * area)
    return Image(numbers, numbers.view(tiles, height, width).unbind(), tiles * area, tiles)


class Kept(NamedTuple):
    """Which positions of the images of a call stay.

    Attributes
    ----------
    mask : Tensor
        bool `[n]`: of all images' positions, in order, those that stay.
    units : Tensor
        int64 `[U]`: the units at these positions, counted through the images of the call.
    order : Tensor or None
        int64 `[K]`: for each position that stays the index of its unit in `units`, or `U` for a
        newline. None if no newline stays, and the two are the same.
    counts : list of int
        How many positions of each image stay; adds up to `K`.
    """

    mask: Tensor
    units: Tensor
    order: Tensor | None
    counts: list[int]

    def arrange(self, features: Tensor, newline: Tensor | None = None) -> Tensor:
        """Return features in the order of the prompt, `[K, C]`, from those of `units`, `[U, C]`."""
        if self.order is None:
            return features
        assert newline is not None
        return torch.cat([features, newline.to(features)[None]]).index_select(0, self.order)


class Layout:
    """Where the units of the images of one call are in the prompts.

    Make it before the encoder runs: a copy from the host waits for the device.

    Parameters
    ----------
    images : sequence of Image
        The images of the call.
    device : torch.device
        Where the units are selected.
    keeps_newlines : bool or sequence of bool
        Whether newlines stay, for all images or for each.
    """

    def __init__(
        self,
        images: Sequence[Image],
        device: torch.device,
        keeps_newlines: bool | Sequence[bool] = True,
    ) -> None:
        if isinstance(keeps_newlines, bool):
            keeps_newlines = [keeps_newlines] * len(images)
        first = first_units(images)
        numbered = [
            torch.where(image.positions < 0, NEWLINE, image.positions + start)
            for image, start in zip(images, first, strict=True)
        ]
        self.sizes = [len(image.positions) for image in images]
        self.newlines = [
            image.newlines if keeps else 0
            for image, keeps in zip(images, keeps_newlines, strict=True)
        ]
        positions = torch.cat(numbered)
        self.positions = positions.to(device)
        stays = [torch.full((n,), k) for n, k in zip(self.sizes, keeps_newlines, strict=True)]
        self._newline_stays = (torch.cat(stays) & (positions < 0)).to(device)

    def keep(self, stage: Tensor, units: list[int] | None) -> Kept:
        """Which positions stay, from the stage of each unit, int8 `[all units]`; 0 is dropped.

        `units` is how many units of each image stay. Where it is None, **synchronises** to count.
        """
        kept_unit = (stage[self.positions.clamp(min=0)] > 0) & (self.positions >= 0)
        if units is None:
            of_image = kept_unit.split(self.sizes)
            units = torch.stack([kept.sum() for kept in of_image]).tolist()
        counts = [u + n for u, n in zip(units, self.newlines, strict=True)]
        mask = kept_unit | self._newline_stays
        # Known counts save the synchronisation of `nonzero`.
        at = self.positions[_true_first(mask)[: sum(counts)]]
        if not any(self.newlines):
            return Kept(mask, at, None, counts)
        is_unit = at >= 0
        order = (is_unit.cumsum(0) - 1).masked_fill(~is_unit, sum(units))
        return Kept(mask, at[_true_first(is_unit)[: sum(units)]], order, counts)


def first_units(images: Sequence[Image]) -> list[int]:
    """For each image the number of its first unit, counted through the images of a call."""
    return list(itertools.accumulate((image.units for image in images), initial=0))[:-1]


def tower_rows(units: Tensor, tile: int, prefix: int) -> Tensor:
    """Rows of a tower's output `[T * (prefix + tile), C]` that hold `units` of unmerged patches."""
    return units + (units // tile + 1) * prefix


def by_grid(values: Tensor, images: Sequence[Image]) -> list[list[Tensor]]:
    """For each image, for each of its grids, the values of its units, `[H, W]`.

    Zero for units without a position.
    """
    of_images = values.split([image.units for image in images])
    return [
        [own[grid.to(own.device)] * image.shown(grid).to(own.device) for grid in image.grids]
        for own, image in zip(of_images, images, strict=True)
    ]


def _true_first(mask: Tensor) -> Tensor:
    return (~mask).byte().argsort(stable=True)
