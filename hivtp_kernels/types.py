"""What a selection returns."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

GLOBAL, LOCAL, FILLED, PADDING = 1, 2, 3, 0


class Selection(NamedTuple):
    """The kept patches of a batch of images, padded to one width.

    Attributes
    ----------
    indices : Tensor
        int32 `[B, capacity]`: raster indices of the kept patches, ascending; -1 past `counts`.
    counts : Tensor
        int32 `[B]`: how many patches each image keeps.
    stage : Tensor
        int8 `[B, capacity]`, beside `indices`: 1 kept by the global stage, 2 by the local stage,
        3 filled up to the budget, 0 padding.
    grid : (int, int)
        Rows and columns of patches, `(H, W)`.
    """

    indices: Tensor
    counts: Tensor
    stage: Tensor
    grid: tuple[int, int]
