"""How many tokens images take, before there are any images."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from hivtp_kernels import PruneConfig

from . import families
from .rule import make_rule


def token_count(
    model: Any,
    image_sizes: Iterable[tuple[int, int]],
    config: PruneConfig | None = None,
    *,
    budget: int | float | None = None,
    newline: str = "keep",
) -> list[int]:
    """How many visual positions of each image the language model gets under pruning.

    From sizes alone: for those who must make room before an image is encoded.

    Parameters
    ----------
    model : PreTrainedModel or PreTrainedConfig
        The model, or its config: no weights are needed.
    image_sizes : iterable of (int, int), or Tensor
        Height and width in pixels of each image as it came, before the processor resized it:
        `[images, 2]`, the processor's `image_sizes`. LLaVA-1.5 only counts them.
    config, budget, newline
        As for `apply`. A budget of all positions counts an image that is not pruned.

    Returns
    -------
    list of int
        One number an image, newlines included where they are kept: exact with a budget, and
        otherwise, as the scores decide, an upper bound.

    Raises
    ------
    TypeError, ValueError
        As `apply` raises them; and for a budget too small for one of the images.

    Notes
    -----
    Runs on the CPU; synchronises only to read `image_sizes` from a device.

    >>> hivtp_transformers.token_count(model, [(480, 640)], budget=640)  # doctest: +SKIP
    [640]
    """
    family = families.of_config(getattr(model, "config", model))
    rule = make_rule(family, config, budget, newline)
    counts = []
    for size in families.pixel_sizes(image_sizes):
        packed = family.pack(size)
        newlines = int((packed < 0).sum()) if newline == "keep" else 0
        counts.append(rule.most(packed) + newlines)
    return counts
