"""`python -m bench`: every op at every shape, dtype and backend, checked first and then timed."""

from __future__ import annotations

import argparse
import csv
import datetime
import re
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

import hivtp_kernels

from . import gate, gpu_timing, timing
from .cases import Case, cases
from .contest import Contestant, rounds

KEY = ("op", "shape", "dtype", "backend", "device", "l2")
FIELDS = (*KEY, "us", "us_low", "us_high", "gb_per_s", "gflop_per_s", "rounds", "machine", "date")


def row(case: Case, seconds: Sequence[float], device: str, l2: str = "") -> dict[str, str]:
    """One line of the CSV, from the seconds of each round."""
    middle = statistics.median(seconds)
    return {
        "op": case.op, "shape": case.shape, "dtype": case.dtype, "backend": case.backend,
        "device": device, "l2": l2,
        "us": f"{1e6 * middle:.2f}",
        "us_low": f"{1e6 * min(seconds):.2f}",
        "us_high": f"{1e6 * max(seconds):.2f}",
        "gb_per_s": f"{1e-9 * case.bytes / middle:.3f}",
        "gflop_per_s": f"{1e-9 * case.flops / middle:.3f}",
        "rounds": str(len(seconds)),
    }  # fmt: skip


def time_cpu(group: list[Case], count: int) -> list[dict[str, str]]:
    threads = torch.get_num_threads()
    samples = rounds({c.backend: Contestant(c.run, threads) for c in group}, count)
    return [row(case, samples[case.backend], "cpu") for case in group]


def time_gpu(group: list[Case], count: int) -> list[dict[str, str]]:
    return [
        row(case, seconds, "cuda", l2)
        for case in group
        for l2, seconds in zip(
            ("warm", "cold"), gpu_timing.warm_and_cold(case.run, count), strict=True
        )
    ]


def sweep(device: str, count: int, quick: bool, pattern: str) -> list[dict[str, str]]:
    """Check every case; only where all are right, time them."""
    wrong = [
        f"{case.op} {case.shape} {case.dtype} {case.backend}"
        for group in cases(device, quick)
        for case in group
        if re.search(pattern, case.op) and not case.check()
    ]
    if wrong:
        raise SystemExit("wrong results, so no speeds:\n  " + "\n  ".join(wrong))
    rows = []
    run = time_gpu if device == "cuda" else time_cpu
    for group in cases(device, quick):
        for timed in run([case for case in group if re.search(pattern, case.op)], count):
            print("{op:24} {shape:24} {dtype:9} {backend:7} {l2:5} {us:>12} us {gb_per_s:>9} GB/s"
                  .format(**timed))  # fmt: skip
            rows.append(timed)
    return rows


def _machine(device: str) -> str:
    name = torch.cuda.get_device_name() + ", " if device == "cuda" else ""
    threads = f"{torch.get_num_threads()} threads, hivtp_kernels {hivtp_kernels.__version__}"
    return f"{name}{timing.machine()}, {threads}"


def write(path: Path, rows: list[dict[str, str]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, FIELDS)
        writer.writeheader()
        writer.writerows(rows)


def read(path: Path) -> dict[tuple[str, ...], dict[str, str]]:
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        if tuple(reader.fieldnames or ()) != FIELDS:
            raise SystemExit(f"{path} is not a CSV of this bench: it must have columns {FIELDS}")
        return {tuple(line[field] for field in KEY): line for line in reader}


def compare(a: Path, b: Path) -> str:
    """Times of B over those of A, the cases that both have; a ratio within the spread says "="."""
    old, new = read(a), read(b)
    lines = [f"{'case':76} {'A us':>12} {'B us':>12} {'B / A':>7}"]
    for key in old.keys() & new.keys():
        before, after = old[key], new[key]
        ratio = float(after["us"]) / float(before["us"])
        apart = (
            float(after["us_high"]) < float(before["us_low"])
            or float(before["us_high"]) < float(after["us_low"])
        )  # fmt: skip
        name = " ".join(part for part in key if part)
        lines.append(
            f"{name:76} {before['us']:>12} {after['us']:>12} {ratio:7.3f}{'' if apart else ' ='}"
        )
    lines[1:] = sorted(lines[1:])
    for name, only in (("A", old.keys() - new.keys()), ("B", new.keys() - old.keys())):
        if only:
            lines.append(f"only in {name}: {len(only)} cases")
    machines = {line["machine"] for line in [*old.values(), *new.values()]}
    if len(machines) > 1:
        lines.append("different machines or versions: " + "; ".join(sorted(machines)))
    return "\n".join(lines)


def plot(path: Path, rows: list[dict[str, str]]) -> None:
    """Time of each op at each shape, a bar a backend and dtype."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    ops = sorted({timed["op"] for timed in rows})
    figure, axes = pyplot.subplots(len(ops), 1, figsize=(9, 3 * len(ops)), squeeze=False)
    for op, axis in zip(ops, axes[:, 0], strict=True):
        mine = [timed for timed in rows if timed["op"] == op]
        labels = [" ".join(t[f] for f in ("shape", "dtype", "backend", "l2") if t[f]) for t in mine]
        axis.barh(labels, [float(timed["us"]) for timed in mine])
        axis.set(title=op, xlabel="microseconds, median", xscale="log")
        axis.invert_yaxis()
        axis.tick_params(axis="y", labelsize=5)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("bench_out"), help="folder of CSV, plot")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--ops", default="", metavar="REGEX", help="only ops whose names match")
    parser.add_argument("--quick", action="store_true", help="one small shape of each op")
    parser.add_argument("--force", action="store_true", help="go on where the machine is busy")
    parser.add_argument("--gate", choices=("cpu",), help="judge against the machine's limits")
    parser.add_argument("--compare", type=Path, nargs=2, metavar=("A.csv", "B.csv"))
    arguments = parser.parse_args(argv)
    if arguments.rounds < 1:
        parser.error(f"--rounds must be at least 1, got {arguments.rounds}")
    if arguments.compare:
        print(compare(*arguments.compare))
        return 0
    if arguments.gate:
        return 0 if gate.main(arguments.rounds, arguments.force) else 1
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: there is no CUDA device")
    if busy := timing.load():
        print(busy, file=sys.stderr)
        if not arguments.force:
            parser.error("no figures from a busy machine; --force overrides")
    machine = ", ".join(filter(None, (_machine(arguments.device), busy)))
    about = {"machine": machine, "date": datetime.date.today().isoformat()}
    rows = sweep(arguments.device, arguments.rounds, arguments.quick, arguments.ops)
    if not rows:
        parser.error(f"--ops {arguments.ops!r} matches no op")
    rows = [timed | about for timed in rows]
    write(arguments.out / f"{arguments.device}.csv", rows)
    plot(arguments.out / f"{arguments.device}.png", rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
