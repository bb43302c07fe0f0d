"""From images and a prompt to the features that are kept and the prompt that goes with them."""

from __future__ import annotations

import itertools
import math
import time
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hivtp_kernels import (
    PruneConfig,
    Selection,
    attention_scores,
    gather_tokens,
    score_and_select,
    select_tokens,
)
from hivtp_kernels.types import GLOBAL

from . import prompt
from .families import Family
from .handover import hand_over
from .methods import METHODS
from .vision import Encoded, VisionTower

PER_TOKEN = ("input_ids", "attention_mask", "labels")


@dataclass(frozen=True)
class Stats:
    """What pruning did in one call. Reading it never synchronises; reading `selection` may.

    Attributes
    ----------
    kept : list of int
        Patches kept of each image.
    prompt_before, prompt_after : list of int
        Tokens of each prompt, visual ones included and padding excluded.
    selection : Selection
        The kept patches of each image, on the model's device.
    milliseconds : dict of str to float
        With `profile=True`, the time of each stage: `encode`, `score_and_select`, `project` and
        `compact`.
    """

    kept: list[int]
    prompt_before: list[int]
    prompt_after: list[int]
    selection: Selection = field(repr=False)
    milliseconds: dict[str, float]


class Pruner:
    """The road from `pixel_values` to pre-encoded images and a shorter prompt."""

    def __init__(
        self,
        family: Family,
        tower: VisionTower,
        config: PruneConfig,
        method: str,
        backend: str,
        profile: bool,
    ) -> None:
        self.family = family
        self.tower = tower
        self.config = config
        self.method = method
        self.backend = backend
        self.profile = profile

    def prune(self, model: PreTrainedModel, inputs: dict[str, Any]) -> tuple[dict[str, Any], Stats]:
        """Replace `pixel_values` by kept features and shorten the prompt; the rest rides along."""
        _refuse(inputs)
        input_ids, pixel_values = inputs["input_ids"], inputs["pixel_values"]
        layout = prompt.measure(input_ids, inputs.get("attention_mask"), self.family.image_token)
        images_per_row = self._images_per_row(layout.placeholders, len(pixel_values))

        stopwatch = Stopwatch(self.family.vision_tower.device, self.profile)
        encoded = self.tower.encode(pixel_values)
        stopwatch.lap("encode")
        selection = self._select(encoded, pixel_values)
        stopwatch.lap("score_and_select")
        # The one synchronisation between encoder and language model, and only where it must be.
        exact = self.config.budget is not None
        counts = [self.config.capacity] * len(pixel_values) if exact else selection.counts.tolist()
        features = self._project(encoded.hidden, selection, counts, exact)
        stopwatch.lap("project")

        left = iter(counts)
        kept_of_row = [sum(itertools.islice(left, images)) for images in images_per_row]
        lengths = [
            length - placeholders + kept
            for length, placeholders, kept in zip(
                layout.lengths, layout.placeholders, kept_of_row, strict=True
            )
        ]
        short = prompt.shorten(
            {name: inputs.get(name) for name in PER_TOKEN},
            layout,
            _kept_patches(selection).flatten().to(input_ids.device),
            max(lengths),
            self.family.pad_token,
        )
        # A mask of ones only would cost the model a look at it (or a mask in memory) for nothing.
        if inputs.get("attention_mask") is None and min(lengths) == max(lengths):
            del short["attention_mask"]
        stopwatch.lap("compact")

        outputs = {n: v for n, v in inputs.items() if n != "pixel_values" and n not in PER_TOKEN}
        outputs |= short
        outputs |= hand_over(model, short["input_ids"], features, self.family.image_token)
        stats = Stats(counts, layout.lengths, lengths, selection, stopwatch.milliseconds)
        return outputs, stats

    def scores(self, pixel_values: Tensor) -> Tensor:
        """The importance of each patch, fp32 `[images, N]`."""
        own_scores = METHODS[self.method]
        if own_scores is not None:
            return own_scores(pixel_values.to(self.family.vision_tower.device), self.config)
        encoded = self.tower.encode(pixel_values)
        return attention_scores(encoded.q, encoded.k, **self._scoring(encoded))

    def _select(self, encoded: Encoded, pixel_values: Tensor) -> Selection:
        if METHODS[self.method] is None:
            selection = score_and_select(
                encoded.q, encoded.k, self.config, **self._scoring(encoded)
            )
        else:
            scores = self.scores(pixel_values).to(encoded.hidden.device)
            selection = select_tokens(scores, self.config, backend=self.backend)
        if self.method == "hivtp":
            return selection
        return selection._replace(stage=selection.stage.clamp(max=GLOBAL))

    def _scoring(self, encoded: Encoded) -> dict[str, Any]:
        return {
            "rows": self.tower.rows,
            "prefix": self.family.prefix,
            "scale": encoded.scale,
            "backend": self.backend,
        }

    def _images_per_row(self, placeholders: list[int], images: int) -> list[int]:
        patches = math.prod(self.family.grid)
        if sum(placeholders) != images * patches or any(p % patches for p in placeholders):
            raise ValueError(
                f"input_ids must hold {patches} placeholders (token {self.family.image_token}) for "
                f"each of the {images} images in pixel_values, got {placeholders} in its rows"
            )
        return [p // patches for p in placeholders]

    def _project(
        self, hidden: Tensor, selection: Selection, counts: list[int], exact: bool
    ) -> list[Tensor]:
        """Project kept rows only: as a batch where they are equally many, else as one long row."""
        kept = gather_tokens(hidden, selection, backend=self.backend)
        if exact:
            return list(self.family.projector(kept))
        rows = torch.cat([image[:count] for image, count in zip(kept, counts, strict=True)])
        return list(self.family.projector(rows).split(counts))


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


def _kept_patches(selection: Selection) -> Tensor:
    """Which patches are kept, bool `[B, N]`."""
    images = selection.indices.shape[0]
    patches = math.prod(selection.grid)
    # Padding lands in a column behind the last patch, which is cut off.
    column = torch.where(selection.indices < 0, patches, selection.indices).long()
    kept = torch.zeros(images, patches + 1, dtype=torch.bool, device=column.device)
    return kept.scatter_(1, column, True)[:, :patches]


def _refuse(inputs: dict[str, Any]) -> None:
    """Raise for what cannot be pruned, before any work: a wrong token would go unnoticed."""
    input_ids, pixel_values = inputs.get("input_ids"), inputs["pixel_values"]
    if not isinstance(input_ids, Tensor) or input_ids.dim() != 2:
        raise ValueError(
            "input_ids must be a tensor [batch, tokens] beside pixel_values, got "
            f"{tuple(input_ids.shape) if isinstance(input_ids, Tensor) else input_ids!r}"
        )
    if not isinstance(pixel_values, Tensor) or pixel_values.dim() != 4 or not len(pixel_values):
        raise ValueError(
            "pixel_values must be a tensor [images, channels, height, width] of at least one, got "
            f"{tuple(pixel_values.shape) if isinstance(pixel_values, Tensor) else pixel_values!r}"
        )
    for name in ("attention_mask", "labels"):
        value = inputs.get(name)
        if value is not None and value.shape != input_ids.shape:
            raise ValueError(
                f"{name} must have the shape of input_ids {tuple(input_ids.shape)}, "
                f"got {tuple(value.shape)}"
            )
    cache = inputs.get("past_key_values")
    if cache is not None and cache.get_seq_length():
        raise ValueError(
            "past_key_values must be empty beside pixel_values, got a cache of "
            f"{cache.get_seq_length()} tokens: continue from Handle.compact(...) without images"
        )
    for name in (
        "inputs_embeds",
        "position_ids",
        "mm_encoder_outputs",
        "vision_feature_layer",
        "vision_feature_select_strategy",
        "image_sizes",
    ):
        if inputs.get(name) is not None:
            raise ValueError(
                f"{name} must be None beside pixel_values while pruning is applied, "
                f"got a {type(inputs[name]).__name__}"
            )
    for name, value in inputs.items():
        if name not in PER_TOKEN and isinstance(value, Tensor) and value.shape == input_ids.shape:
            raise ValueError(
                f"{name} has the shape of input_ids {tuple(value.shape)}, but only "
                f"{', '.join(PER_TOKEN)} can go by the token while pruning is applied"
            )
    if isinstance(inputs.get("logits_to_keep"), Tensor):
        raise ValueError(
            "logits_to_keep must be an integer beside pixel_values while pruning is applied, got a "
            "tensor of positions, which change"
        )
