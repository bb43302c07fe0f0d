"""Shorten a padded batch of prompts, and restore the caller's own prompt in front of an answer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

# What fills the padding of each argument that has an element per token. The padding of `input_ids`
# is a token of the model.
FILL = {"input_ids": 0, "attention_mask": 0, "labels": -100}


class Prompts(NamedTuple):
    """Where a padded batch of prompts has tokens and image placeholders.

    Attributes
    ----------
    content : Tensor
        bool `[B, L]`: from the first to the last token of a prompt; outside of it is padding.
    image : Tensor
        bool `[B, L]`: image placeholders.
    lengths, placeholders : list of int
        Tokens and placeholders of each prompt.
    runs : list of list of int
        For each prompt the lengths of its runs of consecutive placeholders.
    pads_right : bool
        Whether the padding is on the right. Unpadded prompts count as padded on the left, so that
        the last column holds the last token of every prompt after pruning, too.
    """

    content: Tensor
    image: Tensor
    lengths: list[int]
    placeholders: list[int]
    runs: list[list[int]]
    pads_right: bool


def measure(input_ids: Tensor, attention_mask: Tensor | None, image_token: int) -> Prompts:
    """Read the layout of `input_ids` `[B, L]`. **Synchronises** once if they are on a device."""
    image = input_ids == image_token
    token = image | (attention_mask != 0) if attention_mask is not None else torch.ones_like(image)
    # A masked token between others is a hole that positions count; only the margins may go.
    from_first = token.cumsum(dim=1) > 0
    to_last = token.flip(1).cumsum(dim=1).flip(1) > 0
    content = from_first & to_last
    content_here, image_here = torch.stack([content, image]).cpu().numpy()
    edges = np.diff(np.pad(image_here.astype(np.int8), ((0, 0), (1, 1))))
    runs = [(np.flatnonzero(row == -1) - np.flatnonzero(row == 1)).tolist() for row in edges]
    return Prompts(
        content,
        image,
        content_here.sum(1).tolist(),
        image_here.sum(1).tolist(),
        runs,
        not content_here[:, -1].all(),
    )


def images_of_rows(prompts: Prompts, sizes: list[int], image_token: int) -> list[int]:
    """How many images each row has, whose placeholders must be theirs exactly.

    `sizes` are the positions of each image. Raises a ValueError if they do not match.
    """
    counts, first = [], 0
    for room in prompts.placeholders:
        count, room_left = 0, room
        while room_left > 0 and first + count < len(sizes):
            room_left -= sizes[first + count]
            count += 1
        if room_left:
            break
        counts.append(count)
        first += count
    if len(counts) < len(prompts.placeholders) or first < len(sizes):
        wanted = sizes[0] if len(set(sizes)) == 1 else ", ".join(map(str, sizes))
        raise ValueError(
            f"input_ids must hold {wanted} placeholders (token {image_token}) for each of the "
            f"{len(sizes)} images in pixel_values, got {prompts.placeholders} in its rows"
        )
    return counts


def shorten(
    inputs: Mapping[str, Tensor | None],
    prompts: Prompts,
    kept: Tensor,
    length: int,
    pad_token: int,
) -> dict[str, Tensor]:
    """Drop placeholders, and padding that is no longer needed, from everything per token.

    Parameters
    ----------
    inputs : dict
        `input_ids` `[B, L]`, and what else has an element per token in its last dimension,
        `[..., B, L]`; or None.
    prompts : Prompts
        The layout of these inputs.
    kept : Tensor
        bool `[placeholders]`: which placeholders stay, in the order in which the prompts hold them.
    length : int
        Tokens of the longest prompt that results.
    pad_token : int
        Fills the padding of `input_ids`. Dropped placeholders end up there, and the model counts
        placeholders.

    Returns
    -------
    dict
        `input_ids`, `attention_mask` and what else was given, `[..., B, length]`. Never
        synchronises.
    """
    keep = prompts.content.masked_scatter(prompts.image, kept)
    if prompts.pads_right:
        order = (~keep).byte().argsort(dim=1, stable=True)[:, :length]
    else:
        order = keep.byte().argsort(dim=1, stable=True)[:, keep.shape[1] - length :]
    padding = ~keep.gather(1, order)

    given = {name: value for name, value in inputs.items() if value is not None}
    given.setdefault("attention_mask", torch.ones_like(given["input_ids"]))
    if "labels" in given:
        # The first column has no predecessor; after shortening, padding could take its place.
        given["labels"] = F.pad(given["labels"][:, 1:], (1, 0), value=FILL["labels"])
    fill = FILL | {"input_ids": pad_token}
    return {
        name: values.gather(-1, order.expand(*values.shape[:-1], -1)).masked_fill(
            padding, fill.get(name, 0)
        )
        for name, values in given.items()
    }


def restore(sequences: Tensor, input_ids: Tensor, length: int) -> Tensor:
    """Replace the shortened prompt of `length` tokens in front of each answer by the caller's own.

    `sequences` holds equally many answers (beams, return sequences) for each row of `input_ids`.
    """
    answers = sequences.shape[0] // input_ids.shape[0]
    own = input_ids.repeat_interleave(answers, dim=0).to(sequences.device)
    return torch.cat([own, sequences[:, length:]], dim=1)
