"""From images and a prompt to the features that are kept and the prompt that goes with them."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from hivtp_kernels import Selection

from . import prompt
from .families import Family, describe
from .handover import hand_over
from .rule import Rule, attention_of
from .towers import Encoded, VisionTower

PER_TOKEN = ("input_ids", "attention_mask", "labels")


@dataclass(frozen=True)
class Stats:
    """What pruning did in one call. Reading it never synchronises; reading its tensors may.

    Attributes
    ----------
    kept : list of int
        Visual positions kept of each image: patches and, in LLaVA-NeXT, newlines.
    prompt_before, prompt_after : list of int
        Tokens of each prompt, visual ones included and padding excluded.
    stage : Tensor
        int8 `[T, N]` on the model's device: what kept each patch of each tile, all images' tiles
        in a row: 1 the global stage (or nothing had to be dropped there), 2 the local stage,
        3 filled up to the budget, 0 dropped. LLaVA-NeXT cuts patches off that only show padding,
        kept or not.
    selection : Selection or None
        The same as indices; None where a budget was shared by several tiles.
    milliseconds : dict of str to float
        With `profile=True`, the time of each stage: `encode`, `score_and_select`, `project` and
        `compact`.
    """

    kept: list[int]
    prompt_before: list[int]
    prompt_after: list[int]
    stage: Tensor = field(repr=False)
    selection: Selection | None = field(repr=False)
    milliseconds: dict[str, float]


class View(NamedTuple):
    """What became of one grid of an image: stage and scores of its patches, each `[H, W]`."""

    stage: np.ndarray
    scores: np.ndarray


class Pruner:
    """The road from `pixel_values` to pre-encoded images and a shorter prompt."""

    def __init__(
        self,
        model: PreTrainedModel,
        family: Family,
        tower: VisionTower,
        rule: Rule,
        keeps_newlines: bool,
        backend: str,
        profile: bool,
    ) -> None:
        self.family = family
        self.tower = tower
        self.rule = rule
        self.keeps_newlines = keeps_newlines
        self.backend = backend
        self.profile = profile
        self._model = model

    def prune(self, inputs: dict[str, Any]) -> tuple[dict[str, Any], Stats]:
        """Replace `pixel_values` by kept features and shorten the prompt; the rest rides along."""
        _refuse(inputs)
        input_ids = inputs["input_ids"]
        images = self.family.images(*(inputs.get(name) for name in self.family.image_inputs))
        packed = images.packed
        layout = prompt.measure(input_ids, inputs.get("attention_mask"), self.family.image_token)
        images_per_row = self._images_per_row(layout.placeholders, [len(p) for p in packed])
        device = self._model.model.vision_tower.device
        select = self.rule.plan(images, device)
        positions = torch.cat(packed)
        patches = [self.rule.most(p) for p in packed] if self.rule.exact else None
        newlines = [int((p < 0).sum()) if self.keeps_newlines else 0 for p in packed]
        # Handed over before the tower runs: a copy from the host waits for the device.
        patch = positions.to(device)

        stopwatch = Stopwatch(device, self.profile)
        encoded = self.tower.encode(images.tiles)
        stopwatch.lap("encode")
        stage, selection = select(encoded, images.tiles, **self._scoring(encoded))
        stopwatch.lap("score_and_select")
        kept_patch = (stage.flatten()[patch.clamp(min=0)] > 0) & (patch >= 0)
        # The one synchronisation between encoder and language model, and only where it must be.
        if patches is None:
            of_image = kept_patch.split([len(p) for p in packed])
            patches = torch.stack([kept.sum() for kept in of_image]).tolist()
        counts = [p + n for p, n in zip(patches, newlines, strict=True)]
        kept = kept_patch | (patch < 0) if self.keeps_newlines else kept_patch
        hidden = self.family.merge_patches(self._model, encoded.hidden)
        features = self._features(hidden, patch, kept, sum(patches), sum(newlines), images.resample)
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
            kept.to(input_ids.device),
            max(lengths),
            self.family.pad_token,
        )
        # A mask of ones only would cost the model a look at it (or a mask in memory) for nothing.
        if inputs.get("attention_mask") is None and min(lengths) == max(lengths):
            del short["attention_mask"]
        stopwatch.lap("compact")

        used = (*self.family.image_inputs, *PER_TOKEN)
        outputs = {name: value for name, value in inputs.items() if name not in used}
        kept_images = list(features.split(counts))
        outputs |= short
        family = self.family
        outputs |= hand_over(
            self._model, short["input_ids"], kept_images, family.image_token, family.joins_images
        )
        stats = Stats(counts, layout.lengths, lengths, stage, selection, stopwatch.milliseconds)
        return outputs, stats

    def scores(self, *image_inputs: Any) -> Tensor:
        """The importance of each patch, fp32 `[T, N]`."""
        tiles = self.family.images(*image_inputs).tiles
        own_scores = self.rule.own_scores(tiles.to(self._model.model.vision_tower.device))
        if own_scores is not None:
            return own_scores
        encoded = self.tower.encode(tiles)
        return attention_of(self.family, encoded, **self._scoring(encoded))

    def grids(self, image_inputs: Sequence[Any], stage: Tensor, index: int) -> list[View]:
        """Stages and scores of an image's grids, from the inputs of the call that `stage` is of."""
        images = self.family.images(*image_inputs)
        if not -len(images.packed) <= index < len(images.packed):
            raise IndexError(
                f"index must be one of the {len(images.packed)} images of the last call, "
                f"got {index}"
            )
        scores = self.scores(*image_inputs)
        if images.resample is not None:
            scores = images.resample(scores[..., None])
        of_patch = stage.flatten().cpu(), scores.flatten().cpu()
        return [
            View(*(values[grid].numpy() for values in of_patch))
            for grid in self.family.grids(images.packed[index])
        ]

    def _scoring(self, encoded: Encoded) -> dict[str, Any]:
        return {
            "rows": self.tower.rows,
            "prefix": self.family.prefix,
            "scale": encoded.scale,
            "backend": self.backend,
        }

    def _images_per_row(self, placeholders: list[int], sizes: list[int]) -> list[int]:
        """How many images stand in each row, whose placeholders must be theirs exactly."""
        counts, first = [], 0
        for room in placeholders:
            count, room_left = 0, room
            while room_left > 0 and first + count < len(sizes):
                room_left -= sizes[first + count]
                count += 1
            if room_left:
                break
            counts.append(count)
            first += count
        if len(counts) < len(placeholders) or first < len(sizes):
            wanted = sizes[0] if len(set(sizes)) == 1 else ", ".join(map(str, sizes))
            raise ValueError(
                f"input_ids must hold {wanted} placeholders (token {self.family.image_token}) for "
                f"each of the {len(sizes)} images in pixel_values, got {placeholders} in its rows"
            )
        return counts

    def _features(
        self,
        hidden: Tensor,
        patch: Tensor,
        kept: Tensor,
        patches: int,
        newlines: int,
        resample: Callable[[Tensor], Tensor] | None,
    ) -> Tensor:
        """What stands at the kept positions, `[patches + newlines, C]`; projects nothing else.

        But where images are resized: features are projected before that.

        `patch` is the number of the patch at each position, `kept` whether it stays. That their
        numbers are known beforehand saves the synchronisation of `nonzero`.
        """
        order = (~kept).byte().argsort(stable=True)[: patches + newlines]
        patch = patch[order]
        ends_row = patch < 0
        if newlines:
            patch = patch[ends_row.byte().argsort(stable=True)[:patches]]
        patches_of_tile = math.prod(self.family.grid)
        prefix = hidden.shape[1] - patches_of_tile
        project = self._model.model.multi_modal_projector
        if resample is not None:
            projected = resample(project(hidden[:, prefix:])).index_select(0, patch)
        else:
            tile = patch // patches_of_tile
            row = patch + (tile + 1) * prefix
            projected = project(hidden.flatten(0, 1).index_select(0, row))
        if not newlines:
            return projected
        newline = self._model.model.image_newline.to(projected)
        place = ((~ends_row).cumsum(0) - 1).masked_fill(ends_row, patches)
        return torch.cat([projected, newline[None]]).index_select(0, place)


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


def _refuse(inputs: dict[str, Any]) -> None:
    """Raise for what cannot be pruned, before any work: a wrong token would go unnoticed."""
    input_ids = inputs.get("input_ids")
    if not isinstance(input_ids, Tensor) or input_ids.dim() != 2:
        raise ValueError(
            "input_ids must be a tensor [batch, tokens] beside pixel_values, got "
            f"{describe(input_ids)}"
        )
    for name in ("attention_mask", "labels"):
        value = inputs.get(name)
        if value is None:
            continue
        if not isinstance(value, Tensor) or value.shape != input_ids.shape:
            raise ValueError(
                f"{name} must be a tensor of the shape of input_ids {tuple(input_ids.shape)}, "
                f"got {describe(value)}"
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
        "vision_aspect_ratio",
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
