"""From images and a prompt to the features that are kept and the prompt that goes with them."""

from __future__ import annotations

import itertools
import time
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hivtp_kernels import attention_scores, score_and_select

from . import arguments, prompt
from .families import Family
from .handover import hand_over
from .layout import Image, Layout, by_grid
from .policy import Policy, Sources, by_unit
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
    """Turns `pixel_values` into kept features and a shorter prompt."""

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
        sizes = [len(image.positions) for image in images]
        images_of_row = prompt.images_of_rows(prompts, sizes, family.image_token)
        plan = self.policy.plan(images)
        fused = plan.single_config if family.units_are_patches(images) else None
        if fused is None:
            plan.prepare(device)
        stays = [self.policy.keeps_newlines_of(image) for image in images]
        layout, pixels = Layout(images, device, stays), pixels.to(device)

        stopwatch = Stopwatch(device, self.profile)
        encoded = self.tower.encode(pixels)
        stopwatch.lap("encode")
        if fused is None:
            stage = plan.select(self._sources(pixels, images, encoded), self.backend)
        else:
            selection = score_and_select(encoded.q, encoded.k, fused, **self._scoring(encoded))
            stage = by_unit(selection).flatten()
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
        # An all-ones mask only makes the model inspect or materialise it.
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
        images, pixels = images or found, pixels.to(self.device)
        needs, method = self.policy.method.needs, self.policy.method
        plan = self.policy.plan(images).prepare(self.device) if method.own_scores else None
        encoded = self.tower.encode(pixels) if {"attention", "features"} & needs else None
        sources = self._sources(pixels, images, encoded)
        scores = sources.attention() if plan is None else plan.scores(sources)
        return list(scores.split([image.units for image in images]))

    def _sources(self, pixels: Tensor, images: list[Image], encoded: Encoded | None) -> Sources:
        """What methods look at, computed when they do."""

        def attention() -> Tensor:
            assert encoded is not None
            scores = attention_scores(encoded.q, encoded.k, **self._scoring(encoded))
            return self.family.unit_scores(scores, images)

        def features() -> Tensor:
            assert encoded is not None
            return self.family.unit_features(self._model, encoded.hidden, images)

        return Sources(attention, lambda: pixels, features)

    def _scoring(self, encoded: Encoded) -> dict[str, Any]:
        return {
            "rows": self.tower.rows,
            "prefix": self.tower.prefix,
            "scale": encoded.scale,
            "backend": self.backend,
        }


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
