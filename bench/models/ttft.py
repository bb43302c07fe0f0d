"""Time to first token by stage, LLaVA unpruned and pruned: `python -m bench.models.ttft`.

CLIP-L/336 and a Llama with seeded weights. Every contestant runs `generate` on 64 tokens of text
around an image. The same hooks on the modules separate the stages of all contestants; the first
token is there at the end of the first pass through the language model's head. `--device cuda` runs
the whole LLaVA-1.5-7B and LLaVA-NeXT-7B; `--rehearse` runs that code on the CPU with tiny models.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

import torch
import transformers

from ..ops import timing
from . import cases, measure, report
from .cases import UNPRUNED, Case


def run(case: Case, device: str, dtype: torch.dtype) -> list[dict[str, str]]:
    """Measure one case."""
    if not case.rounds:
        return report.rows_of(case, None, 0, {}, {})
    model = cases.build(case, device, dtype)
    inputs = {name: value.to(device) for name, value in cases.ask(case).items()}
    inputs["pixel_values"] = inputs["pixel_values"].to(dtype)
    times, failures = measure.measure_case(model, inputs, case)
    if UNPRUNED in failures:  # the baseline of all others
        return report.rows_of(case._replace(why_not=failures[UNPRUNED]), None, 0, {}, failures)
    model.config.text_config.num_hidden_layers = case.layers or case.text["num_hidden_layers"]
    tiles = inputs["pixel_values"].shape[:-3].numel()
    return report.rows_of(case, model.config, tiles, times, failures)


def main(argv: Sequence[str] | None = None, chosen: Sequence[Case] | None = None) -> int:
    """Parse the command line and run; returns 1 if something failed."""
    parser = argparse.ArgumentParser(prog="python -m bench.models.ttft", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one model, batch 1")
    parser.add_argument("--out", type=Path, default=Path("bench_out"), help="output folder")
    parser.add_argument("--rounds", type=int, help="rounds of every measured case")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), help="default: float32, on a GPU bfloat16"
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument(
        "--rehearse",
        action="store_true",
        help="the GPU cases with tiny models on the CPU",
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
    on_gpu = options.rehearse or options.device == "cuda"
    dtype = options.dtype or ("bfloat16" if on_gpu else "float32")
    device = torch.cuda.get_device_name() + ", " if options.device == "cuda" else ""
    machine = f"{device}{timing.machine()}, {options.threads} threads, {dtype}"
    if (busy := timing.load()) is not None:
        machine += f"; {busy}"
    if options.rehearse:
        machine = "rehearsal: the figures mean nothing"
    print(machine)
    options.out.mkdir(parents=True, exist_ok=True)
    about = {"machine": machine, "date": datetime.date.today().isoformat()}
    lines: list[dict[str, str]] = []
    if chosen is None and on_gpu:
        chosen = cases.GPU_QUICK if options.quick else cases.GPU
    elif chosen is None:
        chosen = cases.CPU_QUICK if options.quick else cases.CPU
    for case in chosen:
        if options.rehearse:
            case = cases.rehearsal(case)
        if options.rounds and case.rounds:
            ttft_rounds = case.ttft_rounds and options.rounds
            case = case._replace(rounds=options.rounds, ttft_rounds=ttft_rounds)
        try:
            own = run(case, options.device, getattr(torch, dtype))
        except Exception as error:
            traceback.print_exc()
            own = report.rows_of(case._replace(why_not=measure.reason(error)), None, 0, {}, {})
        gc.collect()
        print(report.table(own), flush=True)
        lines += [line | about for line in own]
        report.write(options.out / "ttft.csv", lines)  # after each case, in case a later one fails
    if any("ttft_s" in line for line in lines):
        report.plot(options.out / "ttft.png", lines)
        print("", report.verdict(lines), sep="\n")
    return int(any(line.get("note", "").startswith("failed") for line in lines))


if __name__ == "__main__":
    sys.exit(main())
