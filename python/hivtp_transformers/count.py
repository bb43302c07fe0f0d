"""How many tokens images take, before there are any images."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from hivtp_kernels import PruneConfig

from . import families
from .arguments import pixel_sizes
from .policy import Policy


def token_count(
    model: Any,
    image_sizes: Iterable[tuple[int, int]],
    config: PruneConfig | None = None,
    *,
    budget: int | float | None = None,
    newline: str = "keep",
    method: str = "hivtp",
    processor: Any = None,
    batch_num_images: Sequence[int] | None = None,
) -> list[int]:
    """Return how many visual positions of each image the language model gets under pruning.

    From sizes alone, to reserve space before an image is encoded.

    Parameters
    ----------
    model : PreTrainedModel or PreTrainedConfig
        The model, or its config: no weights are needed.
    image_sizes : iterable of (int, int), or Tensor
        Height and width in pixels of each image before the processor resizes it: `[images, 2]`, the
        processor's `image_sizes`.
    config, budget, newline, method
        As for `apply`. A budget of all positions or more counts an image that is not pruned.
    processor : ProcessorMixin, optional
        The model's processor. InternVL needs it: its settings decide how many tiles an image has.
    batch_num_images : sequence of int, optional
        LLaVA-OneVision: how many images each sample holds; of several in a sample each is one tile.
        By default every image is alone.

    Returns
    -------
    list of int
        One number per image, newlines included where they stay: exact with a budget, and otherwise,
        as the scores decide, an upper bound.

    Raises
    ------
    TypeError, ValueError
        As `apply` raises them; if `budget` is a count too small for one of the images; if an
        argument is missing without which the count cannot be known.

    Notes
    -----
    Runs on the CPU; synchronises only to read `image_sizes` from a device.

    Examples
    --------
    >>> hivtp_transformers.token_count(model, [(480, 640)], budget=640)  # doctest: +SKIP
    [640]
    """
    family = families.of_config(getattr(model, "config", model))
    policy = Policy(family, config, budget, newline, method)
    sizes = pixel_sizes(image_sizes)
    images = family.images_of_sizes(sizes, families.Known(processor, batch_num_images))
    return [policy.count(image, f"image {n}") for n, image in enumerate(images)]
