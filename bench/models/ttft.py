"""Time to first token, stage by stage, of LLaVA unpruned and pruned: `python -m bench.models.ttft`.

CLIP-L/336 and a Llama with seeded weights. Every contestant answers by `generate`, 64 tokens of
text around an image; hooks on the modules, the same ones for all, tell the stages apart. First
token means the end of the first pass through the language model's head. With `--device cuda`:
LLaVA-1.5-7B and LLaVA-NeXT-7B, whole; `--rehearse` runs the same on the CPU with tiny models.
"""

from __future__ import annotations

import argparse
import copy
import csv
import ctypes
import datetime
import gc
import re
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from hivtp_transformers import apply, families
from hivtp_transformers.handover import hand_over
from hivtp_transformers.pruner import Stopwatch
from hivtp_transformers.towers import inner
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    CLIPVisionConfig,
    GenerationConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
)

from . import flops, published, timing
from .vision_tower import CLIP_L

IMAGE, PAD = 32000, 0  # tokens
BEFORE, AFTER = 35, 29  # tokens of text on either side of the image
STAGES = ("vit", "score_select", "gather", "compact", "projector", "prefill", "other")
FIELDS = (
    "case", "batch", "method", "visual_tokens", "prompt_tokens", "ttft_s", "ttft_low_s",
    "ttft_high_s", "of_unpruned", "predicted_ttft_s", *(f"{stage}_s" for stage in STAGES),
    "decode_tokens_per_s", "requests_per_s", "peak_mib", "pruning_share", "vision_ratio", "rounds",
    "note", "machine", "date",
)  # fmt: skip
UNPRUNED, PUBLISHED = "unpruned, SDPA", "published"
# Attention of the unpruned models. The published procedure needs eager attention in the tower.
EAGER_TOWER = {"vision_config": "eager", "text_config": "sdpa"}
ATTENTION: dict[str, Any] = {
    UNPRUNED: "sdpa",
    "unpruned, eager": "eager",
    "unpruned, eager tower": EAGER_TOWER,
}
OURS: dict[str, dict[str, Any]] = {
    "ours": {},
    **{f"ours {budget}": {"budget": budget} for budget in (288, 192, 128, 64)},
    **{f"{rule} 192": {"method": rule, "budget": 192} for rule in ("topk", "uniform", "random")},
}
METHODS = (UNPRUNED, "unpruned, eager", PUBLISHED, *OURS)
CARD_METHODS = (
    *ATTENTION,
    PUBLISHED,
    *(name for name, options in OURS.items() if "method" not in options),
)
LLAVA = LlavaConfig, LlavaForConditionalGeneration
NEXT = LlavaNextConfig, LlavaNextForConditionalGeneration

Sample = dict[str, Any]


class Case(NamedTuple):
    """A model, a batch and how often to measure them.

    Attributes
    ----------
    name : str
        Of the model.
    model : tuple of type
        Its config and itself.
    text : dict
        Config of the language model as it is built.
    batch, rounds : int
        Prompts of one image each; counted rounds of whole answers, or 0 where nothing is measured.
    layers : int, optional
        Of the language model whose times are computed from those of the one that is built.
    why_not : str
        What is said where nothing is measured.
    vision : dict
        Config of the vision tower.
    methods : tuple of str
        The contestants.
    decoded : int
        Tokens of an answer after the first.
    ttft_rounds : int
        Counted rounds of answers of one token, not divided into stages. The time to first token
        comes from them; with 0, from the whole answers.
    """

    name: str
    model: tuple[type, type]
    text: dict[str, int]
    batch: int
    rounds: int
    layers: int | None = None
    why_not: str = ""
    vision: dict[str, int] = CLIP_L
    methods: tuple[str, ...] = METHODS
    decoded: int = 8
    ttft_rounds: int = 0


def llama(width: int, ff: int, layers: int, heads: int) -> dict[str, int]:
    """Config of a Llama with the vocabulary of LLaVA's."""
    return {
        "vocab_size": 32064, "hidden_size": width, "intermediate_size": ff,
        "num_hidden_layers": layers, "num_attention_heads": heads, "max_position_embeddings": 4096,
    }  # fmt: skip


QUICK = [Case("LLaVA-1.5 0.2B", LLAVA, llama(1024, 2816, 12, 16), batch=1, rounds=3)]
WHOLE, WIDE = llama(2048, 5504, 16, 16), llama(4096, 11008, 2, 32)
TOO_LONG = "not measured: a round takes a quarter of an hour and more on two cores"
FULL = [
    Case("LLaVA-1.5 0.9B", LLAVA, WHOLE, batch=1, rounds=5),
    Case("LLaVA-1.5 0.9B", LLAVA, WHOLE, batch=8, rounds=1),
    Case("LLaVA-NeXT 0.9B", NEXT, WHOLE, batch=1, rounds=1),
    Case("LLaVA-NeXT 0.9B", NEXT, WHOLE, batch=8, rounds=0, why_not=TOO_LONG),
    Case("LLaVA-1.5 7B", LLAVA, WIDE, batch=1, rounds=5, layers=32),
    Case("LLaVA-1.5 7B", LLAVA, WIDE, batch=8, rounds=1, layers=32),
    Case("LLaVA-NeXT 7B", NEXT, WIDE, batch=1, rounds=1, layers=32),
    Case("LLaVA-NeXT 7B", NEXT, WIDE, batch=8, rounds=0, layers=32, why_not=TOO_LONG),
]

CARD = [
    Case(
        f"{name} 7B", model, llama(4096, 11008, 32, 32), batch, rounds=3,
        methods=CARD_METHODS, decoded=32, ttft_rounds=15 if batch == 1 else 5,
    )
    for name, model, batches in (("LLaVA-1.5", LLAVA, (1, 8)), ("LLaVA-NeXT", NEXT, (1, 4)))
    for batch in batches
]  # fmt: skip
CARD_QUICK = [CARD[0]._replace(ttft_rounds=3)]
TINY = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 10, "num_attention_heads": 2,
    "image_size": 336, "patch_size": 14,
}  # fmt: skip


def build(case: Case, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Any:
    """The model, made on its device, weights seeded. Nothing ends an answer early."""
    torch.manual_seed(0)
    config_class, model_class = case.model
    text = LlamaConfig(**case.text, pad_token_id=PAD, eos_token_id=None)
    vision = CLIPVisionConfig(**case.vision)
    config = config_class(vision_config=vision, text_config=text, image_token_index=IMAGE)
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            return model_class(config).eval()
    finally:
        torch.set_default_dtype(default)


def ask(case: Case, family: Any) -> dict[str, Tensor]:
    """Smooth random images, in LLaVA-NeXT of 2 x 2 tiles, each with a prompt of its own."""
    generator = torch.Generator().manual_seed(0)
    side = case.vision["image_size"]
    size = (2 * side, 2 * side)
    tiles = (family.tiles(size),) if family.newlines else ()
    coarse = torch.randn(case.batch * sum(tiles or (1,)), 3, 8, 8, generator=generator)
    pixels = torch.nn.functional.interpolate(coarse, size=(side, side), mode="bicubic")
    ids = torch.randint(3, IMAGE, (case.batch, BEFORE + AFTER), generator=generator)
    image = torch.full((case.batch, len(family.pack(size))), IMAGE)
    inputs = {
        "input_ids": torch.cat([ids[:, :BEFORE], image, ids[:, BEFORE:]], dim=1),
        "pixel_values": pixels.view(case.batch, *tiles, *pixels.shape[1:]),
    }
    return inputs | ({"image_sizes": torch.tensor([size] * case.batch)} if tiles else {})


class Probe:
    """Seconds between hooks on the modules of a LLaVA, up to the first token and behind it."""

    def __init__(self, model: Any) -> None:
        self._device = model.device
        self._open: dict[str, tuple[float, float]] = {}
        tower, language = inner(model.model.vision_tower), model.model.language_model
        projector = model.model.multi_modal_projector
        # The tower's own end comes last where all of it runs, else that of the layer that is used.
        used = tower.encoder.layers[families.adapt(model).depth - 1]
        starts = [(tower.embeddings, "vit"), (projector, "projector")]
        starts += [(language, "prefill"), (language.layers[0], "layers")]
        ends = [(used, "vit"), (tower, "vit"), (projector, "projector")]
        ends += [(language.layers[-1], "layers"), (model.lm_head, "prefill")]
        for module, stage in starts:
            module.register_forward_pre_hook(partial(self._start, stage))
        for module, stage in ends:
            module.register_forward_hook(partial(self._end, stage))

    def __call__(self, work: Callable[[], object], stages: bool = True) -> Sample:
        """Stages of `work`, which generates; `layers` is the part of the prefill that is theirs.

        Without `stages`, only its time to first token: it synchronizes with the device at the start
        and at the first token, but not between stages, where that would delay a GPU.
        """
        self._stages = stages
        self._seconds: dict[str, float] = {}
        self._first: Sample = {}
        self._began = self._now()
        work()
        if not stages:
            return self._first
        decode = self._now() - self._began - self._first["ttft"]
        return self._first | {"decode": decode, "decode_layers": self._seconds["layers"]}

    def _start(self, stage: str, *_: object) -> None:
        if self._stages:
            self._open[stage] = self._seconds.get(stage, 0.0), self._now()

    def _end(self, stage: str, *_: object) -> None:
        if self._stages:
            before, start = self._open[stage]
            self._seconds[stage] = before + self._now() - start
        if stage == "prefill" and not self._first:
            self._first = self._seconds | {"ttft": self._now() - self._began}
            self._seconds = {}

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()


def contestants(model: Any, inputs: dict[str, Tensor]) -> dict[str, Callable[..., Sample]]:
    """For each method that can answer `inputs`, `run(decoded, stages=True)`, which does so.

    `decoded` is the number of tokens after the first. Without `stages`, nothing is profiled, and
    the sample holds the time to first token alone.
    """
    probe, family = Probe(model), families.adapt(model)
    batch, length = inputs["input_ids"].shape
    positions = length - BEFORE - AFTER
    tiles = inputs["pixel_values"].shape[1] if family.newlines else 1

    def generate(given: dict[str, Any], decoded: int) -> None:
        # With keywords instead, transformers 5.17 first builds a default model config: 7 ms.
        how = GenerationConfig(max_new_tokens=1 + decoded, do_sample=False)
        model.generate(**given, generation_config=how)

    def unpruned(attention: Any, decoded: int, stages: bool = True) -> Sample:
        model.set_attn_implementation(attention)
        sample = probe(lambda: generate(inputs, decoded), stages)
        layers = model.config.vision_config.num_hidden_layers
        return sample | {"kept": [positions] * batch, "vision_layers": layers}

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
            "kept": handle.stats.kept, "vision_layers": family.depth,
            "score_select": laps["score_and_select"],
            "gather": laps["project"] - sample["projector"],
            "compact": laps["compact"],
        }  # fmt: skip

    def as_published(decoded: int, stages: bool = True) -> Sample:
        """The published procedure, in front of a language model with SDPA as in all others."""
        model.set_attn_implementation(EAGER_TOWER)
        kept: list[int] = []

        @torch.no_grad()
        def answer() -> None:
            tower, pixels = model.model.vision_tower, inputs["pixel_values"]
            features = published.encode(tower, pixels, grid=family.grid)
            watch.lap("encode")
            features = [model.model.multi_modal_projector(image) for image in features]
            watch.lap("project")
            kept[:] = map(len, features)
            short = compact(inputs["input_ids"], kept)
            short |= hand_over(model, short["input_ids"], features, IMAGE)
            watch.lap("compact")
            generate(short, decoded)

        watch = Stopwatch(model.device, stages)
        sample = probe(answer, stages)
        if not stages:
            return sample
        laps = {lap: 1e-3 * ms for lap, ms in watch.milliseconds.items()}
        return sample | {
            "kept": kept, "vision_layers": model.config.vision_config.num_hidden_layers,
            "score_select": laps["encode"] - sample["vit"], "compact": laps["compact"],
        }  # fmt: skip

    runs: dict[str, Callable[..., Sample]] = {
        name: partial(unpruned, attention) for name, attention in ATTENTION.items()
    }
    if not family.newlines:
        runs[PUBLISHED] = as_published
    return runs | {name: partial(ours, **options) for name, options in OURS.items()}


def compact(input_ids: Tensor, kept: Sequence[int]) -> dict[str, Tensor]:
    """Prompts with so many placeholders each, padded on the left."""
    rows = [
        torch.cat([ids[: BEFORE + count], ids[-AFTER:]])
        for ids, count in zip(input_ids, kept, strict=True)
    ]
    ids = pad_sequence(rows, batch_first=True, padding_value=PAD, padding_side="left")
    return {"input_ids": ids, "attention_mask": (ids != PAD).long()}


def with_peak(device: torch.device, work: Callable[[], Sample]) -> tuple[Sample, float | None]:
    """What `work` returns, and by how many MiB memory rose meanwhile; None where nothing tells."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        result = work()
        return result, (torch.cuda.max_memory_allocated(device) - before) / 2**20
    try:
        ctypes.CDLL(None).malloc_trim(0)  # what is freed but held would hide a rise
        Path("/proc/self/clear_refs").write_text("5")  # the peak is what there is now
        before = _peak_kib()
    except (AttributeError, OSError):
        return work(), None
    result = work()
    return result, (_peak_kib() - before) / 2**10


def _peak_kib() -> float:
    (line,) = re.findall(r"VmHWM:\s*(\d+)", Path("/proc/self/status").read_text())
    return float(line)


class Times(NamedTuple):
    """What one method took: whole answers by stage, seconds to the first token, peak memory."""

    samples: list[Sample]
    firsts: list[float]
    peak: float | None


def measure(
    model: Any, inputs: dict[str, Tensor], case: Case
) -> tuple[dict[str, Times], dict[str, str]]:
    """Times of each method, all in turn, and why any of them failed.

    A method that fails is left out from then on. A round of each kind that does not count comes
    first. Peak memory is measured in that of the whole answers; after rounds to the first token,
    which warm up all else, it decodes a single token to save time.
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

    if case.ttft_rounds:  # before whole answers, whose peaks then hold nothing allocated only once
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
    """A note on what failed, in one line."""
    return " ".join(f"failed: {type(error).__name__}: {error}".split())[:200]


def scaled(sample: Sample, built: int, layers: int) -> Sample:
    """The sample of a language model of so many layers, computed from that of a shorter one.

    Its layers take as long as one another; everything else stays as measured.
    """
    more = layers / built - 1
    return sample | {
        "ttft": sample["ttft"] + more * sample["layers"],
        "prefill": sample["prefill"] + more * sample["layers"],
        "decode": sample["decode"] + more * sample["decode_layers"],
    }


def flops_to_first_token(config: Any, tiles: int, sample: Sample) -> int:
    """Matrix products of vision tower, projector and prefill; newlines count as projected."""
    kept, text = sample["kept"], config.text_config
    vision = copy.copy(config.vision_config)
    vision.num_hidden_layers = sample["vision_layers"]
    return (
        flops.vision_tower(vision, tiles)
        + flops.projector(vision.hidden_size, text.hidden_size, sum(kept))
        + flops.prefill(text, BEFORE + max(kept) + AFTER, len(kept))
    )


def rows_of(
    case: Case, config: Any, tiles: int, times: dict[str, Times], failures: dict[str, str]
) -> list[dict[str, str]]:
    """The lines of the CSV, one a method. `config` is that of the model as a whole."""
    lines = []
    for name in case.methods:
        line = {"case": case.name, "batch": str(case.batch), "method": name}
        if name in times:
            own, base = times[name], times[UNPRUNED]
            line |= numbers(own, base, case.decoded)
            cost, whole = (flops_to_first_token(config, tiles, t.samples[0]) for t in (own, base))
            line["predicted_ttft_s"] = f"{cost / whole * statistics.median(base.firsts):.5f}"
            if case.layers is None and own.peak is not None:
                line["peak_mib"] = f"{own.peak:.0f}"
            if case.layers is not None:
                built = case.text["num_hidden_layers"]
                line["note"] = f"computed: {built} layers measured, scaled to {case.layers}"
        else:
            why_not = case.why_not or "cannot run: takes one tile an image"
            line["note"] = failures.get(name, why_not)
        lines.append(line)
    return lines


def numbers(own: Times, base: Times, decoded: int) -> dict[str, str]:
    """Medians of a method, and ratios within rounds to the unpruned model."""
    samples, firsts = [with_sums(sample) for sample in own.samples], own.firsts
    kept = samples[0]["kept"]
    whole = statistics.median(sample["ttft"] + sample["decode"] for sample in samples)
    line = {
        "visual_tokens": f"{statistics.mean(kept):g}",
        "prompt_tokens": str(BEFORE + max(kept) + AFTER),
        "ttft_s": f"{statistics.median(firsts):.5f}",
        "ttft_low_s": f"{min(firsts):.5f}",
        "ttft_high_s": f"{max(firsts):.5f}",
        "of_unpruned": f"{timing.paired_ratio(firsts, base.firsts):.3f}",
        "decode_tokens_per_s": f"{len(kept) * decoded / _median(samples, 'decode'):.2f}",
        "requests_per_s": f"{len(kept) / whole:.4g}",
        "rounds": str(len(firsts)),
    }
    line |= {
        f"{stage}_s": f"{_median(samples, stage):.5f}" for stage in STAGES if stage in samples[0]
    }
    if "score_select" in samples[0]:
        share = statistics.median(sample["pruning"] / sample["ttft"] for sample in samples)
        vision = [sample["vit"] + sample["pruning"] for sample in samples]
        line["pruning_share"] = f"{share:.5f}"
        unpruned = [sample["vit"] for sample in base.samples]
        line["vision_ratio"] = f"{timing.paired_ratio(vision, unpruned):.3f}"
    return line


def with_sums(sample: Sample) -> Sample:
    """The sample, what of its first token is of no stage, and what pruning adds to a model."""
    named = sum(sample.get(stage, 0.0) for stage in STAGES)
    pruning = sample.get("score_select", 0.0) + sample.get("gather", 0.0)
    return sample | {"other": sample["ttft"] - named, "pruning": pruning}


def _median(samples: list[Sample], key: str) -> float:
    return statistics.median(sample[key] for sample in samples)


def run(case: Case, device: str, dtype: torch.dtype) -> list[dict[str, str]]:
    """Measure one case."""
    if not case.rounds:
        return rows_of(case, None, 0, {}, {})
    model = build(case, device, dtype)
    inputs = {name: value.to(device) for name, value in ask(case, families.adapt(model)).items()}
    inputs["pixel_values"] = inputs["pixel_values"].to(dtype)
    times, failures = measure(model, inputs, case)
    if UNPRUNED in failures:  # what all others are compared with
        return rows_of(case._replace(why_not=failures[UNPRUNED]), None, 0, {}, failures)
    model.config.text_config.num_hidden_layers = case.layers or case.text["num_hidden_layers"]
    tiles = inputs["pixel_values"].shape[:-3].numel()
    return rows_of(case, model.config, tiles, times, failures)


def table(lines: list[dict[str, str]]) -> str:
    """The lines of one case, times in milliseconds."""
    first = lines[0]
    title = f"{first['case']}, batch {first['batch']}, {first.get('rounds', 0)} rounds"
    if all("ttft_s" not in line for line in lines):
        return f"\n{title}: {first['note']}"
    notes = {line["note"] for line in lines if "ttft_s" in line and "note" in line}
    heads = "tokens", "first token", "low", "high", "ratio", "by flops", *STAGES
    heads += "tokens/s", "requests/s", "MiB"
    text = [
        "\n" + "; ".join([title, *notes]),
        f"{'':22}" + "".join(f"{head:>13}" for head in heads),
    ]
    for line in lines:
        if "ttft_s" not in line:
            text.append(f"{line['method']:22}  {line['note']}")
            continue
        cells = [line["visual_tokens"]]
        cells += [_ms(line[key]) for key in ("ttft_s", "ttft_low_s", "ttft_high_s")]
        cells += [line["of_unpruned"], _ms(line["predicted_ttft_s"])]
        cells += [_ms(line.get(f"{stage}_s")) for stage in STAGES]
        cells += [line["decode_tokens_per_s"], line["requests_per_s"], line.get("peak_mib", "-")]
        text.append(f"{line['method']:22}" + "".join(f"{cell:>13}" for cell in cells))
    return "\n".join(text)


def _ms(seconds: str | None) -> str:
    return f"{1e3 * float(seconds):.2f}" if seconds else "-"


def verdict(lines: list[dict[str, str]]) -> str:
    """Whether the two goals are met by ours, at the worst of its lines."""
    ours = [line for line in lines if line["method"].startswith("ours") and "ttft_s" in line]
    if not ours:
        return "no line of ours was measured"
    goals = (
        ("pruning_share", 0.01, "score, select and gather / time to first token"),
        ("vision_ratio", 1.0, "vision tower with score, select and gather / unpruned SDPA's"),
    )
    text = []
    for field, limit, what in goals:
        worst = max(ours, key=lambda line: float(line[field]))
        met = "met" if float(worst[field]) <= limit else "missed"
        where = f"{worst['case']}, batch {worst['batch']}, {worst['method']}"
        text.append(f"{met}: {what} at most {worst[field]} ({where}), limit {limit:g}")
    return "\n".join(text)


def write(path: Path, lines: list[dict[str, str]]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, FIELDS)
        writer.writeheader()
        writer.writerows(lines)


def plot(path: Path, lines: list[dict[str, str]]) -> None:
    """Stages of each method, stacked; a tick where the flop count alone puts the first token."""
    from matplotlib.figure import Figure

    measured = [line for line in lines if "ttft_s" in line]
    groups = list(dict.fromkeys((line["case"], line["batch"]) for line in measured))
    figure = Figure(figsize=(9, 3 * len(groups)), dpi=120)
    for number, group in enumerate(groups):
        axes = figure.add_subplot(len(groups), 1, number + 1)
        mine = [line for line in measured if (line["case"], line["batch"]) == group]
        names, left = [line["method"] for line in mine], [0.0] * len(mine)
        for stage in STAGES:
            seconds = [float(line.get(f"{stage}_s", 0)) for line in mine]
            axes.barh(names, seconds, left=left, label=stage.replace("_", " + "))
            left = [a + b for a, b in zip(left, seconds, strict=True)]
        predicted = [float(line["predicted_ttft_s"]) for line in mine]
        axes.scatter(predicted, names, marker="|", color="black", zorder=3, label="by flops alone")
        computed = ", computed" if "note" in mine[0] else ""
        axes.set(title=f"{group[0]}, batch {group[1]}{computed}", xlabel="seconds to first token")
        axes.invert_yaxis()
        axes.spines[["top", "right"]].set_visible(False)
        if not number:
            axes.legend(frameon=False, fontsize=7)
    figure.tight_layout()
    figure.savefig(path)


def rehearsal(case: Case) -> Case:
    """The case with a tiny model and as few rounds as can be."""
    tiny = {"text": llama(32, 48, 2, 2), "vision": TINY}
    return case._replace(rounds=1, ttft_rounds=min(case.ttft_rounds, 1), **tiny)


def main(argv: Sequence[str] | None = None, cases: Sequence[Case] | None = None) -> int:
    """The command line; 1 if something failed."""
    parser = argparse.ArgumentParser(prog="python -m bench.models.ttft", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one model, batch 1")
    parser.add_argument("--out", type=Path, default=Path("bench_out"), help="folder of CSV, plot")
    parser.add_argument("--rounds", type=int, help="of each measured case, instead of its own")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="bfloat16 on a card")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument(
        "--rehearse", action="store_true", help="what --device cuda does, on the CPU, tiny models"
    )
    options = parser.parse_args(argv)
    if options.rounds is not None and options.rounds < 1:
        parser.error(f"--rounds must be at least 1, got {options.rounds}")
    if options.rehearse and options.device == "cuda":
        parser.error("--rehearse runs on the CPU, got --device cuda")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: there is no CUDA device")
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(options.threads)
    card = options.rehearse or options.device == "cuda"
    dtype = options.dtype or ("bfloat16" if card else "float32")
    device = torch.cuda.get_device_name() + ", " if options.device == "cuda" else ""
    machine = f"{device}{timing.machine()}, {options.threads} threads, {dtype}"
    if (busy := timing.load()) is not None:
        machine += f"; {busy}"
    if options.rehearse:
        machine = "rehearsal: no figure means anything"
    print(machine)
    options.out.mkdir(parents=True, exist_ok=True)
    about = {"machine": machine, "date": datetime.date.today().isoformat()}
    lines: list[dict[str, str]] = []
    if cases is None and card:
        cases = CARD_QUICK if options.quick else CARD
    elif cases is None:
        cases = QUICK if options.quick else FULL
    for case in cases:
        if options.rehearse:
            case = rehearsal(case)
        if options.rounds and case.rounds:
            ttft_rounds = case.ttft_rounds and options.rounds
            case = case._replace(rounds=options.rounds, ttft_rounds=ttft_rounds)
        try:
            own = run(case, options.device, getattr(torch, dtype))
        except Exception as error:
            traceback.print_exc()
            own = rows_of(case._replace(why_not=reason(error)), None, 0, {}, {})
        gc.collect()
        print(table(own), flush=True)
        lines += [line | about for line in own]
        write(options.out / "ttft.csv", lines)  # what is measured stays, whatever comes
    if any("ttft_s" in line for line in lines):
        plot(options.out / "ttft.png", lines)
        print("", verdict(lines), sep="\n")
    return int(any(line.get("note", "").startswith("failed") for line in lines))


if __name__ == "__main__":
    sys.exit(main())
