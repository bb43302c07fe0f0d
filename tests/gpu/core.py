"""The program for sanitizers and profiler: runs every kernel on small inputs, and checks results.

`core.py profile` launches each kernel at the sizes of CLIP-L/336 instead, at batch 1, 8 and 64.
Before each case it prints a line of JSON with the number of kernels that follow and the minimum
bytes that they move.
"""

import json
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[2])]

import torch
from rehearsal import DEVICE, REHEARSE, attention, pick, same

from hivtp_kernels import (
    PruneConfig,
    attention_scores,
    gather_tokens,
    pack_tokens,
    score_and_select,
    select_tokens,
)
from hivtp_kernels.backends import load
from hivtp_kernels.testing import TOLERANCE

# The emulator of the CUDA kernels needs pytest, so the cpu backend stands in for them here.
BACKENDS = pick(("cuda", "triton"), ("cpu", "triton"))
CASES = []


def check(backend):
    """Run every kernel on 70 patches, a multiple of no tile, vector or warp.

    Everything else runs on the CPU, so that a sanitizer sees only these kernels, and copies.
    """
    ratio, budget = PruneConfig((7, 10)), PruneConfig((7, 10), (2, 3), window=(3, 3), budget=31)
    for dtype, tolerance in TOLERANCE.items():
        for rows in ("cls", "all"):
            if load(backend).unavailable(torch.device(DEVICE), rows):
                continue
            q, k = attention(2, 2, 71, 40, 2, dtype)
            on_cpu = [[t.cpu() for t in tensors] for tensors in (q, k)]
            expected = attention_scores(*on_cpu, rows=rows, backend="torch")
            maps = [a.double() @ b.double().mT * 40**-0.5 for a, b in zip(*on_cpu, strict=True)]
            for lse in (None, [m.logsumexp(-1).float().to(DEVICE) for m in maps]):
                scores = attention_scores(q, k, rows=rows, lse=lse, backend=backend)
                torch.testing.assert_close(scores.cpu(), expected, rtol=tolerance, atol=0)
                for config in (ratio, budget):
                    kept = score_and_select(q, k, config, rows=rows, lse=lse, backend=backend)
                    wanted = select_tokens(scores.cpu(), config, backend="torch")
                    assert same(kept[:3], wanted[:3])
                    assert same(select_tokens(scores, config, backend=backend)[:3], wanted[:3])
        for channels in (3, 64):
            x = torch.randn(2, 71, channels).to(dtype)
            gathered = gather_tokens(x.to(DEVICE), kept, backend=backend)
            assert same([gathered], [gather_tokens(x, wanted, backend="torch")])
            packed = pack_tokens(x.to(DEVICE), kept, backend=backend)
            assert same(packed, pack_tokens(x, wanted, backend="torch"))


def profile(backend):
    """Launch each kernel once, in fp16, with no other profiled kernels between the cases."""
    heads, layers, side = pick((16, 3, 24), (2, 1, 6))
    tokens, config = side * side + 1, PruneConfig((side, side), budget=side * side // 3)
    for batch in pick((1, 8, 64), (1,)):
        q, k = attention(batch, heads, tokens, 64, layers, torch.float16)
        x = torch.randn(batch, tokens, 1024, device=DEVICE, dtype=torch.float16)
        scores = torch.rand(batch, tokens - 1, device=DEVICE)
        kept = select_tokens(scores, config, backend="torch")
        out = batch * (config.capacity * 5 + 4)
        keys = sum(t.nbytes for t in k)

        def case(name, kernels, least, run, batch=batch):
            name = f"{name}, batch {batch}, {backend}"
            CASES.append({"case": name, "kernels": kernels, "least_bytes": least})
            print(json.dumps(CASES[-1]), flush=True)
            run()

        for rows, kernels, queries in (("cls", 1, keys // tokens), ("all", 2, keys)):
            if load(backend).unavailable(torch.device(DEVICE), rows):
                continue
            case(
                f"score_and_select {rows}", kernels, keys + queries + out,
                lambda q=q, k=k, rows=rows: score_and_select(
                    q, k, config, rows=rows, backend=backend
                ),
            )  # fmt: skip
        case(
            "select_tokens", 1, scores.nbytes + out,
            lambda scores=scores: select_tokens(scores, config, backend=backend),
        )  # fmt: skip
        moved = 2 * batch * config.capacity * x[0, 0].nbytes + kept.indices.nbytes
        case(
            "gather_tokens", 1, moved,
            lambda x=x, kept=kept: gather_tokens(x, kept, backend=backend),
        )  # fmt: skip


def pretend_table():
    """Print a table like ncu's, for a rehearsal to read."""
    names = ["ID", "Kernel Name", "gpu__time_duration.sum", "dram__bytes_read.sum"]
    names += ["dram__bytes_write.sum", "launch__registers_per_thread"]
    names += ["sm__warps_active.avg.pct_of_peak_sustained_active"]
    print(",".join(f'"{name}"' for name in names))
    print('"","","ns","byte","byte","register/thread","%"')
    kernels = [line["least_bytes"] for line in CASES for _ in range(line["kernels"])]
    for number, moved in enumerate(kernels):
        print(f'"{number}","stand_in","1,000","{moved:,}","0","1","50.0"')


def main():
    torch.manual_seed(0)
    run = profile if sys.argv[1:] == ["profile"] else check
    for backend in BACKENDS:
        reason = load(backend).unavailable(torch.device(DEVICE))
        if reason is None:
            run(backend)
        elif REHEARSE:
            print(f"{backend}: {reason}")
        else:
            sys.exit(f"backend {backend} is required: {reason}")
    if REHEARSE and run is profile:
        pretend_table()
    print("core: all correct", file=sys.stderr)


if __name__ == "__main__":
    main()
