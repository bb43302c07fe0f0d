"""From images and a prompt to the features that are kept and the prompt that goes with them."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hivtp_kernels import attention_scores, score_and_select

from . import inputs as arguments
from . import prompt
from .families import Family
from .handover import hand_over
from .layout import Image, Layout
from .policy import Plan, Policy, Sources
from .policy.policy import by_unit
from .prompt import Prompts
from .towers import Encoded, Tower

PER_TOKEN = ("input_ids", "attention_mask", "labels")


@dataclass(frozen=True)
class Stats:
    """What pruning did in one call. Reading it never synchronises; reading its tensors may.

    Attributes
    ----------
    kept : list of int
        Visual positions kept of each image, newlines included.
    prompt_before, prompt_after : list of int
        Tokens of each prompt, visual ones included and padding excluded.
    milliseconds : dict of str to float
        With `profile=True`, the time of each stage: `encode`, `score_and_select`, `project` and
        `compact`.
    """

    kept: list[int]
    prompt_before: list[int]
    prompt_after: list[int]
    milliseconds: dict[str, float]
    _stage: Tensor = field(repr=False)
    _images: list[Image] = field(repr=False)

    @property
    def stages(self) -> list[list[Tensor]]:
        """For each image, for each of its grids, what kept each unit: int8 `[H, W]`.

        1 the global stage (or a method without stages, or nothing had to be dropped), 2 the local
        stage, 3 filled up to the budget, 0 dropped. On the model's device.
        """
        return by_grid(self._stage, self._images)


class Pruner:
    """The road from `pixel_values` to pre-encoded images and a shorter prompt."""

    def __init__(
        self,
        model: PreTrainedModel,
        family: Family,
        tower: Tower,
        policy: Policy,
        backend: str,
        profile: bool,
    ) -> None:
        self.family = family
        self.tower = tower
        self.policy = policy
        self.backend = backend
        self.profile = profile
        self._model = model

    @property
    def device(self) -> torch.device:
        """Where images are encoded and units selected."""
        device: torch.device = self._model.model.vision_tower.device
        return device

    def prune(self, inputs: dict[str, Any]) -> tuple[dict[str, Any], Stats]:
        """Replace `pixel_values` by kept features and shorten the prompt; the rest is passed on."""
        arguments.check(inputs, PER_TOKEN)
        family, device = self.family, self.device
        prompts = prompt.measure(
            inputs["input_ids"], inputs.get("attention_mask"), family.image_token
        )
        pixels, images = family.images(inputs, [run for row in prompts.runs for run in row])
        images_of_row = self._images_of_rows(prompts, images)
        plan = self.policy.plan(images, device)
        layout = Layout(images, device, self.policy.keeps_newlines)

        stopwatch = Stopwatch(device, self.profile)
        encoded = self.tower.encode(pixels)
        stopwatch.lap("encode")
        stage = self._select(plan, pixels, images, encoded)
        stopwatch.lap("score_and_select")
        # The one synchronisation between encoder and language model, unless the counts are known.
        kept = layout.keep(stage, plan.units)
        levels = family.features(self._model, encoded.hidden, images, kept.units)
        newline = family.newline(self._model)
        features = [kept.arrange(level, newline).split(kept.counts) for level in levels]
        stopwatch.lap("project")

        left = iter(kept.counts)
        kept_of_row = [sum(itertools.islice(left, count)) for count in images_of_row]
        lengths = [
            length - placeholders + kept
            for length, placeholders, kept in zip(
                prompts.lengths, prompts.placeholders, kept_of_row, strict=True
            )
        ]
        short = prompt.shorten(
            {name: inputs.get(name) for name in PER_TOKEN},
            prompts,
            kept.mask.to(inputs["input_ids"].device),
            max(lengths),
            family.pad_token,
        )
        # A mask of ones only would cost the model a look at it (or a mask in memory) for nothing.
        if inputs.get("attention_mask") is None and min(lengths) == max(lengths):
            del short["attention_mask"]
        stopwatch.lap("compact")

        used = (*family.image_inputs, *PER_TOKEN)
        outputs = {name: value for name, value in inputs.items() if name not in used}
        outputs |= short
        outputs |= hand_over(self._model, family, short["input_ids"], *map(list, features))
        stats = Stats(kept.counts, prompts.lengths, lengths, stopwatch.milliseconds, stage, images)
        return outputs, stats

    def scores(self, inputs: dict[str, Any], images: list[Image] | None = None) -> list[Tensor]:
        """The score of each unit of each image, fp32 `[units]`."""
        ids, runs = inputs.get("input_ids"), None
        if ids is not None:
            prompts = prompt.measure(ids, None, self.family.image_token)
            runs = [run for row in prompts.runs for run in row]
        pixels, found = self.family.images(inputs, runs)
        images = images or found
        plan = self.policy.plan(images, self.device)
        encoded = self.tower.encode(pixels) if plan.needs_encoder else None
        scores = plan.scores(self._sources(pixels, images, encoded))
        return list(scores.split([image.units for image in images]))

    def _select(self, plan: Plan, pixels: Tensor, images: list[Image], encoded: Encoded) -> Tensor:
        """The stage of each unit, int8 `[all units]`."""
        config = plan.single_config
        grid = self.family.tower_class.grid(self.family.config.vision_config)
        tiles = len(pixels)
        if config is not None and config.grid == grid and plan.total == tiles * math.prod(grid):
            # Units are the tower's patches, as they are: one fused op.
            selection = score_and_select(encoded.q, encoded.k, config, **self._scoring(encoded))
            return by_unit(selection).flatten()
        return plan.select(self._sources(pixels, images, encoded), self.backend)

    def _sources(self, pixels: Tensor, images: list[Image], encoded: Encoded | None) -> Sources:
        """What methods look at, computed when they do."""

        def attention() -> Tensor:
            assert encoded is not None
            scores = attention_scores(encoded.q, encoded.k, **self._scoring(encoded))
            return self.family.unit_scores(scores, images)

        def features() -> Tensor:
            assert encoded is not None
            return self.family.unit_features(self._model, encoded.hidden, images)

        return Sources(attention, lambda: pixels.to(self.device), features)

    def _scoring(self, encoded: Encoded) -> dict[str, Any]:
        return {
            "rows": self.tower.rows,
            "prefix": self.tower.prefix,
            "scale": encoded.scale,
            "backend": self.backend,
        }

    def _images_of_rows(self, prompts: Prompts, images: list[Image]) -> list[int]:
        """How many images each row has, whose placeholders must be theirs exactly."""
        sizes = [len(image.positions) for image in images]
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
                f"input_ids must hold {wanted} placeholders (token {self.family.image_token}) for "
                f"each of the {len(sizes)} images in pixel_values, got {prompts.placeholders} in "
                "its rows"
            )
        return counts


def by_grid(values: Tensor, images: Sequence[Image]) -> list[list[Tensor]]:
    """For each image, for each of its grids, the values of its units, `[H, W]`."""
    of_images = values.split([image.units for image in images])
    return [
        [own[grid.to(own.device)] for grid in image.grids]
        for own, image in zip(of_images, images, strict=True)
    ]


class Stopwatch:
    """Time between laps in milliseconds, waiting for the device at each; idle if not `running`."""

    def __init__(self, device: torch.device, running: bool) -> None:
        self.milliseconds: dict[str, float] = {}
        self._device = device
        self._running = running
        self._last = self._now() if running else 0.0

    def lap(self, stage: str) -> None:
        """Book the time since the last lap on `stage`."""
        if self._running:
            now = self._now()
            self.milliseconds[stage] = (now - self._last) * 1e3
            self._last = now

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()
