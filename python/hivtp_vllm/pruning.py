"""How an engine prunes: its settings, an image's exact count, and the positions that stay.

Nothing here knows of vLLM; rules, packing and counts are those of `hivtp_transformers`.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from hivtp_transformers import families
from hivtp_transformers.apply import check_layers, choose_rows
from hivtp_transformers.rule import kept_positions, make_rule
from torch import Tensor

MODEL_TYPES = ("llava", "llava_next")
BUDGET = "hivtp_budget"


class Pruning:
    """The settings of an engine, from its model's config, where `--hf-overrides` puts them.

    Parameters
    ----------
    config : PreTrainedConfig
        Of LLaVA-1.5 or LLaVA-NeXT, with, where the defaults of `hivtp_transformers.apply` shall not do:
        `hivtp_budget`, a count or a share of the visual positions of each image (without it only
        requests that ask for it are pruned); `hivtp_layers`, `hivtp_rows`, `hivtp_newline`.

    Raises
    ------
    TypeError, ValueError
        As `hivtp_transformers.apply` raises them.
    """

    def __init__(self, config: Any) -> None:
        if (model_type := getattr(config, "model_type", None)) not in MODEL_TYPES:
            raise ValueError(
                f"model must be of type {' or '.join(MODEL_TYPES)}, got {model_type!r}"
            )
        self.family = families.of_config(config)
        self._packed = lru_cache(maxsize=256)(self.family.pack)
        self.budget = getattr(config, BUDGET, None)
        self.layers = check_layers(getattr(config, "hivtp_layers", (6, 7, 8)), self.family.depth)
        self.rows = choose_rows(getattr(config, "hivtp_rows", None), self.family)
        self.newline = getattr(config, "hivtp_newline", "keep")
        make_rule(self.family, None, self.budget, self.newline)  # refuses what no image could have

    @property
    def key(self) -> str:
        """The settings as text: what is cached for an image belongs to them, too."""
        return f"hivtp-{self.budget}-{self.layers}-{self.rows}-{self.newline}"

    def positions(self, image_size: tuple[int, int]) -> int:
        """The visual positions of an image of `(height, width)` pixels, unpruned."""
        return len(self._packed(image_size))

    def count(self, image_size: tuple[int, int], budget: Any = None) -> int:
        """How many of them stay.

        `budget` is a request's own. All positions or more means no pruning. Raises a ValueError,
        which ends the request and nothing else.
        """
        positions = self.positions(image_size)
        budget = self.budget if budget is None else budget
        if budget is None:
            return positions
        try:
            rule = make_rule(self.family, None, budget, self.newline)
            if isinstance(budget, int) and budget >= positions:
                return positions
            return rule.most(self._packed(image_size)) + self._newlines(image_size)
        except TypeError as error:
            raise ValueError(str(error)) from error

    def keep(self, scores: Tensor, image_size: tuple[int, int], count: int) -> Tensor:
        """What stands at each position that stays: int64 `[count]` on the device of `scores`.

        Numbers of patches, counted through the image's tiles as in `scores`, fp32 `[tiles, N]`, and
        -1 for a newline. The same for equal scores on every rank.
        """
        packed = self._packed(image_size)
        on_device = packed.to(scores.device)
        if count == len(packed):
            return on_device
        rule = make_rule(self.family, None, count, self.newline)
        stage = rule.select(scores, [packed], backend="auto")
        return on_device[kept_positions(stage, on_device, self.newline == "keep", count)]

    def _newlines(self, image_size: tuple[int, int]) -> int:
        if self.newline == "drop":
            return 0
        return int((self._packed(image_size) < 0).sum())
