"""What the ops take and return, and the limits and codes that they share with the C interface."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

# These are also in csrc/include/hivtp/api.h; tests/native/test_limits.py compares the two.
MAX_LAYERS = 8
MAX_TOKENS = 4101
MAX_HEAD_DIM = 128
MAX_PATCHES = 4096
DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
ROWS = {"cls": 0, "all": 1}
PADDING, GLOBAL, LOCAL, FILLED = 0, 1, 2, 3

Kept = tuple[Tensor, Tensor, Tensor]  # indices, counts and stage of a Selection


class Attention(NamedTuple):
    """The checked inputs of `attention_scores`, as every backend takes them.

    Attributes
    ----------
    q, k : list of Tensor
        `[batch, num_heads, tokens, head_dim]`, one tensor per layer. With `rows="cls"`, `q` may be
        `[batch, num_heads, 1, head_dim]`.
    lse : list of Tensor
        fp32 `[batch, num_heads, queries]`, one tensor per layer, or empty.
    rows : {"cls", "all"}
        Query rows to average over.
    prefix : int
        Tokens in front of the patches.
    scale : float
        Factor on `q k^T`.
    """

    q: list[Tensor]
    k: list[Tensor]
    lse: list[Tensor]
    rows: str
    prefix: int
    scale: float

    @property
    def layers(self) -> int:
        """Number of layers."""
        return len(self.k)

    @property
    def batch(self) -> int:
        """Number of images."""
        return self.k[0].shape[0]

    @property
    def num_heads(self) -> int:
        """Heads per layer."""
        return self.k[0].shape[1]

    @property
    def tokens(self) -> int:
        """Keys per image: the prefix and the patches."""
        return self.k[0].shape[2]

    @property
    def head_dim(self) -> int:
        """Channels per head."""
        return self.k[0].shape[3]

    @property
    def patches(self) -> int:
        """Patches per image."""
        return self.tokens - self.prefix

    @property
    def dtype(self) -> torch.dtype:
        """Element type of `q` and `k`."""
        return self.k[0].dtype

    @property
    def device(self) -> torch.device:
        """Device of all tensors."""
        return self.k[0].device


class SelectParams(NamedTuple):
    """What to keep, as the integers that every backend takes; `PruneConfig.params` computes them.

    Attributes
    ----------
    grid, regions, window : (int, int)
        Rows and columns of patches in the grid, of regions in the grid, of patches in a window.
    quotas : tuple of int
        Patches that the global stage keeps per region, in raster order of the regions.
    capacity : int
        The most patches that an image can keep.
    fill : bool
        Whether to fill up to `capacity` after the local stage.
    """

    grid: tuple[int, int]
    regions: tuple[int, int]
    window: tuple[int, int]
    quotas: tuple[int, ...]
    capacity: int
    fill: bool


class Selection(NamedTuple):
    """The kept patches of a batch of images, padded to one width.

    Attributes
    ----------
    indices : Tensor
        int32 `[B, capacity]`: raster indices of the kept patches, ascending; -1 past `counts`.
    counts : Tensor
        int32 `[B]`: the number of patches that each image keeps.
    stage : Tensor
        int8 `[B, capacity]`, parallel to `indices`: 1 kept by the global stage, 2 by the local
        stage, 3 filled up to the budget, 0 padding.
    grid : (int, int)
        Rows and columns of patches, `(H, W)`.
    """

    indices: Tensor
    counts: Tensor
    stage: Tensor
    grid: tuple[int, int]
