"""Contestants of `bench.models.ttft`, and their times by stage."""

from __future__ import annotations

import ctypes
import re
import time
import traceback
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from hivtp_transformers import apply
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig

from ..ops import timing
from . import published
from .cases import (
    AFTER,
    ATTENTION,
    BEFORE,
    EAGER_TOWER,
    IMAGE,
    OURS,
    PAD,
    PUBLISHED,
    Case,
    depth_used,
)

Sample = dict[str, Any]


class Probe:
    """Times the stages of a LLaVA by hooks on its modules, up to the first token and after it."""

    def __init__(self, model: Any) -> None:
        self._device = model.device
        self._open: dict[str, tuple[float, float]] = {}
        tower, language = model.model.vision_tower, model.model.language_model
        tower = getattr(tower, "vision_model", tower)  # wrapped by older transformers
        projector = model.model.multi_modal_projector
        # The stage ends with the whole tower if that runs, else with the layer that is used.
        used = tower.encoder.layers[depth_used(model.config) - 1]
        starts = [(tower.embeddings, "vit"), (projector, "projector")]
        starts += [(language, "prefill"), (language.layers[0], "layers")]
        ends = [(used, "vit"), (tower, "vit"), (projector, "projector")]
        ends += [(language.layers[-1], "layers"), (model.lm_head, "prefill")]
        for module, stage in starts:
            module.register_forward_pre_hook(partial(self._start, stage))
        for module, stage in ends:
            module.register_forward_hook(partial(self._end, stage))

    def __call__(self, work: Callable[[], object], stages: bool = True) -> Sample:
        """Seconds per stage of `work`, which calls `generate`.

        `layers` is the share of the decoder layers in the prefill. Without `stages`, only the time
        to first token is measured: the device is synchronized at the start and at the first token,
        but not between stages, where that would delay a GPU.
        """
        self._stages = stages
        self._seconds: dict[str, float] = {}
        self._first: Sample = {}
        self._began = self.now()
        work()
        if not stages:
            return self._first
        decode = self.now() - self._began - self._first["ttft"]
        return self._first | {"decode": decode, "decode_layers": self._seconds["layers"]}

    def _start(self, stage: str, *_: object) -> None:
        if self._stages:
            self._open[stage] = self._seconds.get(stage, 0.0), self.now()

    def _end(self, stage: str, *_: object) -> None:
        if self._stages:
            before, start = self._open[stage]
            self._seconds[stage] = before + self.now() - start
        if stage == "prefill" and not self._first:
            self._first = self._seconds | {"ttft": self.now() - self._began}
            self._seconds = {}

    def now(self) -> float:
        """The clock, once the device has finished its work."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()


def contestants(model: Any, inputs: dict[str, Tensor]) -> dict[str, Callable[..., Sample]]:
    """For each method that can answer `inputs`, a function `run(decoded, stages=True)`.

    `decoded` is the number of tokens after the first. Without `stages`, nothing is profiled, and
    the sample contains only the time to first token.
    """
    probe, vision = Probe(model), model.config.vision_config
    batch, length = inputs["input_ids"].shape
    positions = length - BEFORE - AFTER
    tiles = inputs["pixel_values"].shape[:-3].numel() // batch
    depth = vision.num_hidden_layers
    middle = range(depth // 4, depth // 3 + 1)  # the default of `apply`

    def generate(given: dict[str, Any], decoded: int) -> None:
        # Given keywords instead, transformers 5.17 builds a default model config first: 7 ms.
        how = GenerationConfig(max_new_tokens=1 + decoded, do_sample=False)
        model.generate(**given, generation_config=how)

    def unpruned(attention: Any, decoded: int, stages: bool = True) -> Sample:
        model.set_attn_implementation(attention)
        sample = probe(lambda: generate(inputs, decoded), stages)
        return sample | {"kept": [positions] * batch, "vision_layers": depth}

    def ours(
        decoded: int, stages: bool = True, *, budget: int | None = None, **options: Any
    ) -> Sample:
        model.set_attn_implementation("sdpa")
        budget = None if budget is None else budget * tiles
        with apply(model, budget=budget, profile=stages, **options) as handle:
            sample = probe(lambda: generate(inputs, decoded), stages)
        if not stages:
            return sample
        laps = {lap: 1e-3 * ms for lap, ms in handle.stats.milliseconds.items()}
        return sample | {
            "kept": handle.stats.kept, "vision_layers": depth_used(model.config),
            "score_select": laps["score_and_select"],
            "gather": laps["project"] - sample["projector"],
            "compact": laps["compact"],
        }  # fmt: skip

    def as_published(decoded: int, stages: bool = True) -> Sample:
        """The published procedure; the language model uses SDPA, as for all other methods."""
        model.set_attn_implementation(EAGER_TOWER)
        kept: list[int] = []
        laps: list[float] = []

        def lap() -> None:
            if stages:
                laps.append(probe.now())

        @torch.no_grad()
        def answer() -> None:
            lap()
            tower, pixels = model.model.vision_tower, inputs["pixel_values"]
            grid = (vision.image_size // vision.patch_size,) * 2
            features = published.encode(tower, pixels, middle, grid, depth_used(model.config))
            lap()
            features = [model.model.multi_modal_projector(image) for image in features]
            lap()
            kept[:] = map(len, features)
            short = compact(inputs["input_ids"], kept)
            embeddings = model.get_input_embeddings()(short["input_ids"])
            places = (short["input_ids"] == IMAGE)[..., None]
            short["inputs_embeds"] = embeddings.masked_scatter(places, torch.cat(features))
            lap()
            generate(short, decoded)

        sample = probe(answer, stages)
        if not stages:
            return sample
        start, encoded, projected, compacted = laps
        return sample | {
            "kept": kept, "vision_layers": depth,
            "score_select": encoded - start - sample["vit"], "compact": compacted - projected,
        }  # fmt: skip

    runs: dict[str, Callable[..., Sample]] = {
        name: partial(unpruned, attention) for name, attention in ATTENTION.items()
    }
    if tiles == 1:
        runs[PUBLISHED] = as_published
    return runs | {name: partial(ours, **options) for name, options in OURS.items()}


def compact(input_ids: Tensor, kept: Sequence[int]) -> dict[str, Tensor]:
    """Shorten each prompt to `kept` placeholders, padding on the left."""
    rows = [
        torch.cat([ids[: BEFORE + count], ids[-AFTER:]])
        for ids, count in zip(input_ids, kept, strict=True)
    ]
    ids = pad_sequence(rows, batch_first=True, padding_value=PAD, padding_side="left")
    return {"input_ids": ids, "attention_mask": (ids != PAD).long()}


def with_peak(device: torch.device, work: Callable[[], Sample]) -> tuple[Sample, float | None]:
    """The result of `work` and the rise of peak memory in MiB, or None if that is unknown."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        result = work()
        return result, (torch.cuda.max_memory_allocated(device) - before) / 2**20
    try:
        ctypes.CDLL(None).malloc_trim(0)  # freed memory that is still held would hide a rise
        Path("/proc/self/clear_refs").write_text("5")  # reset the peak to current memory
        before = _peak_kib()
    except (AttributeError, OSError):
        return work(), None
    result = work()
    return result, (_peak_kib() - before) / 2**10


def _peak_kib() -> float:
    (line,) = re.findall(r"VmHWM:\s*(\d+)", Path("/proc/self/status").read_text())
    return float(line)


class Times(NamedTuple):
    """Measurements of one method: whole answers by stage, times to first token, peak memory."""

    samples: list[Sample]
    firsts: list[float]
    peak: float | None


def measure_case(
    model: Any, inputs: dict[str, Tensor], case: Case
) -> tuple[dict[str, Times], dict[str, str]]:
    """Time all methods in alternating rounds; returns their times, and why any of them failed.

    A method that fails is left out from then on. Each kind of round starts with a warm-up, and peak
    memory is measured in the warm-up of whole answers. If rounds to the first token have run
    before, that warm-up decodes a single token to save time.
    """
    runs = contestants(model, inputs)
    runs = {name: runs[name] for name in case.methods if name in runs}
    built = case.text["num_hidden_layers"]
    samples: dict[str, list[Sample]] = {name: [] for name in runs}
    firsts: dict[str, list[float]] = {name: [] for name in runs}
    peaks: dict[str, float | None] = {}
    failures: dict[str, str] = {}

    def answer(name: str) -> None:
        if name in peaks:
            sample = runs[name](case.decoded)
            samples[name].append(scaled(sample, built, case.layers or built))
        else:
            decoded = 1 if case.ttft_rounds else case.decoded
            _, peaks[name] = with_peak(model.device, partial(runs[name], decoded))

    def first(name: str) -> None:
        firsts[name].append(runs[name](0, stages=False)["ttft"])

    def attempt(work: Callable[[str], None], name: str) -> None:
        try:
            if name not in failures:
                work(name)
        except Exception as error:
            traceback.print_exc()
            failures[name] = reason(error)

    if case.ttft_rounds:  # first, so that peaks of whole answers exclude one-time allocations
        timing.rounds([partial(attempt, first, name) for name in runs], case.ttft_rounds)
    timing.rounds([partial(attempt, answer, name) for name in runs], case.rounds)
    if case.ttft_rounds:
        firsts = {name: seconds[1:] for name, seconds in firsts.items()}
    else:
        firsts = {name: [sample["ttft"] for sample in own] for name, own in samples.items()}
    times = {
        name: Times(samples[name], firsts[name], peaks[name])
        for name in runs
        if name not in failures
    }
    return times, failures


def reason(error: Exception) -> str:
    """A one-line note on a failure."""
    return " ".join(f"failed: {type(error).__name__}: {error}".split())[:200]


def scaled(sample: Sample, built: int, layers: int) -> Sample:
    """The sample of a language model with `layers` layers, computed from one with `built` layers.

    Every layer counts the same; everything else is as measured.
    """
    more = layers / built - 1
    return sample | {
        "ttft": sample["ttft"] + more * sample["layers"],
        "prefill": sample["prefill"] + more * sample["layers"],
        "decode": sample["decode"] + more * sample["decode_layers"],
    }
