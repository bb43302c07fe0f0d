"""Shorten a padded batch of prompts, and put the caller's own prompt back in front of an answer."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORED_LABEL = -100


class Layout(NamedTuple):
    """Where a padded batch of prompts has tokens and image placeholders.

    Attributes
    ----------
    content : Tensor
        bool `[B, L]`: from the first to the last token of a row; what lies outside is padding.
    image : Tensor
        bool `[B, L]`: image placeholders.
    lengths, placeholders : list of int
        Tokens and placeholders of each row.
    pads_right : bool
        Whether the padding stands on the right. Unpadded prompts count as padded on the left, so
        that the last column holds the last token of every row after pruning, too.
    """

    content: Tensor
    image: Tensor
    lengths: list[int]
    placeholders: list[int]
    pads_right: bool


def measure(input_ids: Tensor, attention_mask: Tensor | None, image_token: int) -> Layout:
    """The layout of `input_ids` `[B, L]`. **Synchronises** once, where they are on a device."""
    image = input_ids == image_token
    token = image | (attention_mask != 0) if attention_mask is not None else torch.ones_like(image)
    # A masked token between others is a hole that positions count; only the margins may go.
    from_first = token.cumsum(dim=1) > 0
    to_last = token.flip(1).cumsum(dim=1).flip(1) > 0
    content = from_first & to_last
    numbers = torch.cat([content.sum(1), image.sum(1), (~content[:, -1]).sum().view(1)]).tolist()
    rows = input_ids.shape[0]
    return Layout(content, image, numbers[:rows], numbers[rows:-1], numbers[-1] > 0)


def shorten(
    inputs: dict[str, Tensor | None], layout: Layout, kept: Tensor, length: int, pad_token: int
) -> dict[str, Tensor]:
    """Drop placeholders and superfluous padding from everything that goes by the token.

    Parameters
    ----------
    inputs : dict
        `input_ids` `[B, L]`; `attention_mask` and `labels` of that shape, or None.
    layout : Layout
        Of these inputs.
    kept : Tensor
        bool `[placeholders]`: which placeholders stay, in the order in which the rows hold them.
    length : int
        Tokens of the longest row that results.
    pad_token : int
        Fills the padding. Dropped placeholders end up there, and the model counts placeholders.

    Returns
    -------
    dict
        `input_ids` and `attention_mask` `[B, length]`, and `labels` where they came. Never
        synchronises.
    """
    keep = layout.content.masked_scatter(layout.image, kept)
    if layout.pads_right:
        order = (~keep).byte().argsort(dim=1, stable=True)[:, :length]
    else:
        order = keep.byte().argsort(dim=1, stable=True)[:, keep.shape[1] - length :]
    padding = ~keep.gather(1, order)

    def rearrange(values: Tensor, fill: int) -> Tensor:
        return values.gather(1, order).masked_fill(padding, fill)

    input_ids, mask, labels = (inputs.get(n) for n in ("input_ids", "attention_mask", "labels"))
    assert input_ids is not None
    mask = torch.ones_like(input_ids) if mask is None else mask
    short = {
        "input_ids": rearrange(input_ids, pad_token),
        "attention_mask": rearrange(mask, 0),
    }
    if labels is not None:
        # Nothing predicts the first column, which may come to lie behind padding that would.
        labels = F.pad(labels[:, 1:], (1, 0), value=IGNORED_LABEL)
        short["labels"] = rearrange(labels, IGNORED_LABEL)
    return short


def restore(sequences: Tensor, input_ids: Tensor, length: int) -> Tensor:
    """Replace the shortened prompt of `length` tokens in front of each answer by the caller's own.

    `sequences` holds equally many answers (beams, return sequences) for each row of `input_ids`.
    """
    answers = sequences.shape[0] // input_ids.shape[0]
    own = input_ids.repeat_interleave(answers, dim=0).to(sequences.device)
    return torch.cat([own, sequences[:, length:]], dim=1)
