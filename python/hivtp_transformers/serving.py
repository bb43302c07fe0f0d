"""What a serving engine needs: counts from sizes alone, and kept units from scores alone.

Nothing here knows an engine.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from . import families
from .apply import check_layers, choose_rows
from .layout import Image, Kept, Layout
from .policy import Policy, Sources

BUDGET = "hivtp_budget"


class Serving:
    """How an engine prunes, from its model's config, into which engines let users put settings.

    Parameters
    ----------
    config : PreTrainedConfig
        The model's. `hivtp_budget` is a count or a share of the visual positions of each image
        (without it only requests that ask for it are pruned); `hivtp_layers`, `hivtp_rows` and
        `hivtp_newline` replace the defaults of `hivtp_transformers.apply`.
    model_types : sequence of str
        The model types that the engine's plugin serves.

    Raises
    ------
    TypeError, ValueError
        As `hivtp_transformers.apply` raises them, and if the model is of another type.
    """

    def __init__(self, config: Any, model_types: Sequence[str]) -> None:
        if (model_type := getattr(config, "model_type", None)) not in model_types:
            raise ValueError(
                f"model must be of type {' or '.join(model_types)}, got {model_type!r}"
            )
        self.family = families.of_config(config)
        self.image = lru_cache(maxsize=256)(self.family.image)
        self.budget = getattr(config, BUDGET, None)
        self.layers = check_layers(getattr(config, "hivtp_layers", None), self.family)
        self.rows = choose_rows(getattr(config, "hivtp_rows", None), self.family)
        self.newline = getattr(config, "hivtp_newline", "keep")
        self._policy(self.budget)  # refuses what no image could have

    @property
    def key(self) -> str:
        """The settings as text: what is cached for an image belongs to them, too."""
        return f"hivtp-{self.budget}-{self.layers}-{self.rows}-{self.newline}"

    def positions(self, size: tuple[int, int]) -> int:
        """The visual positions of an image of `(height, width)` pixels, unpruned."""
        return len(self.image(size).positions)

    def count(self, size: tuple[int, int], budget: Any = None) -> int:
        """How many of them stay, by a request's own budget or the engine's.

        All positions or more means no pruning, and newlines stay too. Raises a ValueError, which
        ends the request and nothing else.
        """
        positions = self.positions(size)
        budget = self.budget if budget is None else budget
        if budget is None:
            return positions
        try:
            policy = self._policy(budget)
            if isinstance(budget, int) and budget >= positions:
                return positions
            return policy.count(self.image(size))
        except TypeError as error:
            raise ValueError(str(error)) from error

    def keep(
        self, scores: Sequence[Tensor], sizes: Sequence[tuple[int, int]], counts: Sequence[int]
    ) -> Kept:
        """Which positions stay of images of such sizes, from the scores of each, fp32 `[units]`.

        `counts` are those of `count`. Units are counted through the images. The same for equal
        scores on every rank. Synchronises nowhere.
        """
        images = [self.image(size) for size in sizes]
        device = scores[0].device
        full = [count == len(i.positions) for count, i in zip(counts, images, strict=True)]
        layout = Layout(images, device, [self.newline == "keep" or whole for whole in full])
        stages = [
            torch.ones_like(own, dtype=torch.int8) if whole else self._stage(own, image, count)
            for own, image, count, whole in zip(scores, images, counts, full, strict=True)
        ]
        units = [c - n for c, n in zip(counts, layout.newlines, strict=True)]
        return layout.keep(torch.cat(stages), units)

    def _stage(self, scores: Tensor, image: Image, count: int) -> Tensor:
        plan = self._policy(count).plan([image], scores.device)
        nothing = scores[:0]
        sources = Sources(lambda: scores, lambda: nothing, lambda: nothing)
        return plan.select(sources, backend="auto")

    def _policy(self, budget: Any) -> Policy:
        return Policy(self.family, None, budget, self.newline)
