"""What a serving engine needs: counts from sizes alone, and kept units from scores alone.

Nothing here knows an engine.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import families
from .layout import Image, Kept, Layout
from .policy import Plan, Policy, Sources

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
        self.budget = getattr(config, BUDGET, None)
        self.layers = self.family.scored_layers(getattr(config, "hivtp_layers", None))
        self.rows = self.family.scored_rows(getattr(config, "hivtp_rows", None))
        self.newline = getattr(config, "hivtp_newline", "keep")
        self._policy(self.budget)  # refuses what no image could have

    def image(self, size: tuple[int, int]) -> Image:
        """The image of `(height, width)` pixels, as `Family.image` returns it."""
        return self.family.image(size)

    @property
    def key(self) -> str:
        """The settings as text: what is cached for an image belongs to them, too."""
        return f"hivtp-{self.budget}-{self.layers}-{self.rows}-{self.newline}"

    def positions(self, size: tuple[int, int]) -> int:
        """The visual positions of an image of `(height, width)` pixels, unpruned."""
        return len(self.image(size).positions)

    def count(self, size: tuple[int, int], budget: Any = None) -> int:
        """How many of them stay, by a request's own budget or the engine's.

        Raises a ValueError, which ends the request and nothing else.
        """
        budget = self.budget if budget is None else budget
        if budget is None:
            return self.positions(size)
        try:
            return self._policy(budget).count(self.image(size))
        except TypeError as error:
            raise ValueError(str(error)) from error

    def select(
        self, sizes: Sequence[tuple[int, int]], counts: Sequence[int], device: torch.device
    ) -> Callable[[Tensor], Kept]:
        """Return a function that selects units of images of such sizes from their scores.

        Call this before the encoder runs: a copy from the host waits for the device. `counts` come
        from `count`. The function takes fp32 `[all units]`, image after image, and synchronises
        nowhere; units are numbered consecutively over all images. Equal scores give the same result
        on every rank.
        """
        images = [self.image(size) for size in sizes]
        policies = [self._policy(count) for count in counts]
        pairs = list(zip(policies, images, strict=True))
        shares = [policy.shares(image) for policy, image in pairs]
        plan = Plan(policies[0].method, images, shares, exact=True).prepare(device)
        layout = Layout(images, device, [p.keeps_newlines_of(image) for p, image in pairs])

        def keep(scores: Tensor) -> Kept:
            stage = plan.select(Sources(lambda: scores, _nothing, _nothing), backend="auto")
            return layout.keep(stage, plan.units)

        return keep

    def _policy(self, budget: Any) -> Policy:
        return Policy(self.family, None, budget, self.newline)


def _nothing() -> Tensor:
    raise NotImplementedError("an engine has scores alone")
