"""Throughput and latency of vLLM, stock and pruned: `python -m bench.models.serving OUT.csv`.

A closed loop: each client sends its next request when it has the answer to the last. Engines run
one after another, and in each the rounds of all concurrencies alternate. Needs idle cores and the
Python environment of `tests/plugins/serving/run`.
"""

import argparse
import asyncio
import csv
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CHECKPOINTS = str(ROOT / "tests" / "plugins" / "serving")  # folder of checkpoints.py
CONCURRENCIES = (1, 4, 16)
BUDGETS = (None, 288, 192, 64)
TEXT_TOKENS, NEW_TOKENS = 12, 16


def build(folder: Path) -> None:
    """Write a small model: a 24-layer vision tower of width 256, a 12-layer Llama of width 1024."""
    sys.path.insert(0, CHECKPOINTS)
    import checkpoints
    from transformers import CLIPVisionConfig, LlamaConfig

    vision = CLIPVisionConfig(
        hidden_size=256, intermediate_size=1024, num_hidden_layers=24, num_attention_heads=4,
        image_size=336, patch_size=14,
    )  # fmt: skip
    text = LlamaConfig(
        vocab_size=512, hidden_size=1024, intermediate_size=2816, num_hidden_layers=12,
        num_attention_heads=16, num_key_value_heads=16, max_position_embeddings=4096,
        pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    checkpoints.build("llava", folder, vision, text)


async def measure(model: Path, budget: int | None, requests: int, rounds: int) -> list[dict]:
    """Measure one engine; returns one row per round and concurrency."""
    sys.path.insert(0, CHECKPOINTS)
    from checkpoints import picture
    from vllm import AsyncEngineArgs, SamplingParams
    from vllm.v1.engine.async_llm import AsyncLLM

    overrides = {}
    if budget is not None:
        architecture = "HivtpLlavaForConditionalGeneration"
        overrides = {"architectures": [architecture], "hivtp_budget": budget}
    engine = AsyncLLM.from_engine_args(
        AsyncEngineArgs(
            model=str(model), dtype="bfloat16", enforce_eager=True, max_model_len=1024,
            max_num_seqs=16, enable_prefix_caching=False, hf_overrides=overrides,
            limit_mm_per_prompt={"image": 1}, mm_processor_cache_gb=0,
        )
    )  # fmt: skip
    text = " ".join(["<image>", *(f"w{20 + n}" for n in range(TEXT_TOKENS))])
    images = [picture(seed) for seed in range(16)]

    async def ask(number: int) -> tuple[float, float, int]:
        """Seconds to the first and to the last token, and the length of the prompt."""
        sampling = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True)
        data = {"image": images[number % len(images)]}
        prompt = {"prompt": text, "multi_modal_data": data}
        start, outputs = time.perf_counter(), []
        async for out in engine.generate(prompt, sampling, request_id=f"{time.time_ns()}"):
            outputs.append((time.perf_counter() - start, out))
        (first, _), (last, whole) = outputs[0], outputs[-1]
        assert len(whole.outputs[0].token_ids) == NEW_TOKENS
        return first, last, len(whole.prompt_token_ids)

    rows = []
    await ask(0)
    for turn in range(rounds):
        for clients in CONCURRENCIES:
            left = iter(range(max(requests, clients)))
            done: list[tuple[float, float, int]] = []

            async def client(left=left, done=done) -> None:
                for number in left:
                    done.append(await ask(number))

            start = time.perf_counter()
            await asyncio.gather(*(client() for _ in range(clients)))
            seconds = time.perf_counter() - start
            firsts, wholes, lengths = zip(*done, strict=True)
            rows.append({
                "budget": budget or "stock", "round": turn, "clients": clients,
                "prompt_tokens": max(lengths), "requests": len(done),
                "requests_per_s": round(len(done) / seconds, 4),
                "first_token_s": round(statistics.median(firsts), 4),
                "latency_s": round(statistics.median(wholes), 4),
            })  # fmt: skip
            print(rows[-1], file=sys.stderr, flush=True)
    engine.shutdown()
    return rows


def plot(rows: list[dict], path: Path) -> None:
    """Plot requests per second over concurrency, one line per engine."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), dpi=120)
    axes = figure.add_subplot()
    for budget in dict.fromkeys(row["budget"] for row in rows):
        values = [
            statistics.median(
                row["requests_per_s"]
                for row in rows
                if (row["budget"], row["clients"]) == (budget, clients)
            )
            for clients in CONCURRENCIES
        ]
        name = "stock, 576" if budget == "stock" else str(budget)
        axes.plot(CONCURRENCIES, values, marker="o", label=f"{name} tokens per image")
    axes.set(xlabel="concurrent requests", ylabel="requests per second", ylim=(0, None))
    axes.set_xscale("log", base=2)
    axes.set_xticks(CONCURRENCIES, [str(n) for n in CONCURRENCIES])
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path)


def main() -> None:
    """Parse the command line; runs each engine in a subprocess of its own."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--requests", type=int, default=16, help="per concurrency and round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--engine", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.engine:
        model, budget = json.loads(arguments.engine)
        rows = asyncio.run(measure(Path(model), budget, arguments.requests, arguments.rounds))
        arguments.out.write_text(json.dumps(rows))
        return
    settings = {"HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "2"}
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        model, part = Path(scratch, "model"), Path(scratch, "rows.json")
        build(model)
        for budget in BUDGETS:
            command = [
                sys.executable, "-m", "bench.models.serving", str(part),
                "--requests", str(arguments.requests), "--rounds", str(arguments.rounds),
                "--engine", json.dumps([str(model), budget]),
            ]  # fmt: skip
            subprocess.run(command, check=True, env={**os.environ, **settings}, cwd=ROOT)
            rows += json.loads(part.read_text())
    with arguments.out.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    plot(rows, arguments.out.with_suffix(".png"))
    print(arguments.out.read_text())


if __name__ == "__main__":
    main()
