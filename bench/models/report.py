"""What `bench.models.ttft` reports: lines of the CSV, tables, the plot and the verdict."""

from __future__ import annotations

import copy
import csv
import statistics
from pathlib import Path
from typing import Any

from ..ops import timing
from . import flops
from .cases import AFTER, BEFORE, UNPRUNED, Case
from .measure import Sample, Times

STAGES = ("vit", "score_select", "gather", "compact", "projector", "prefill", "other")
FIELDS = (
    "case", "batch", "method", "visual_tokens", "prompt_tokens", "ttft_s", "ttft_low_s",
    "ttft_high_s", "of_unpruned", "predicted_ttft_s", *(f"{stage}_s" for stage in STAGES),
    "decode_tokens_per_s", "requests_per_s", "peak_mib", "pruning_share", "vision_ratio", "rounds",
    "note", "machine", "date",
)  # fmt: skip


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
    """The lines of the CSV, one per method. `config` is the config of the full-depth model."""
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
            why_not = case.why_not or "cannot run: takes one tile per image"
            line["note"] = failures.get(name, why_not)
        lines.append(line)
    return lines


def numbers(own: Times, base: Times, decoded: int) -> dict[str, str]:
    """Medians of a method, and its ratios to the unpruned model, paired within rounds."""
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
    """The sample with `other`, the time outside all stages, and `pruning`, the work it adds."""
    named = sum(sample.get(stage, 0.0) for stage in STAGES)
    pruning = sample.get("score_select", 0.0) + sample.get("gather", 0.0)
    return sample | {"other": sample["ttft"] - named, "pruning": pruning}


def _median(samples: list[Sample], key: str) -> float:
    return statistics.median(sample[key] for sample in samples)


def table(lines: list[dict[str, str]]) -> str:
    """Format the lines of one case, with times in milliseconds."""
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
    """Whether our worst line meets each of the two goals."""
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
    """Plot the stages of each method, stacked, with a tick at the time predicted from flops."""
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
