"""`python -m bench.ops`: check and time every op at every shape, dtype and backend."""

from __future__ import annotations

import argparse
import csv
import datetime
import re
import statistics
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import torch

import hivtp_kernels

from . import gate, gpu_timing, stand_in, timing
from .cases import Case, cases
from .contest import Contestant, rounds

KEY = ("op", "shape", "dtype", "backend", "device", "l2", "timer")
FIELDS = (*KEY, "us", "us_low", "us_high", "gb_per_s", "gflop_per_s", "rounds", "machine", "date")

Row = dict[str, str]
# Called with a case and the reason why it is not timed.
Report = Callable[[Case, str], None]


def row(
    case: Case, seconds: Sequence[float], device: str, l2: str = "", timer: str = "host"
) -> Row:
    """One line of the CSV, from the seconds of each round."""
    middle = statistics.median(seconds)
    low, high = spread(seconds, timer)
    return {
        "op": case.op, "shape": case.shape, "dtype": case.dtype, "backend": case.backend,
        "device": device, "l2": l2, "timer": timer,
        "us": f"{1e6 * middle:.2f}",
        "us_low": f"{1e6 * low:.2f}",
        "us_high": f"{1e6 * high:.2f}",
        "gb_per_s": f"{1e-9 * case.bytes / middle:.3f}",
        "gflop_per_s": f"{1e-9 * case.flops / middle:.3f}",
        "rounds": str(len(seconds)),
    }  # fmt: skip


def spread(seconds: Sequence[float], timer: str) -> tuple[float, float]:
    """The range of rounds on the host; the 20th and 80th percentile of replays."""
    if timer == "host" or len(seconds) == 1:
        return min(seconds), max(seconds)
    cuts = statistics.quantiles(seconds, n=5, method="inclusive")
    return cuts[0], cuts[-1]


def time_cpu(group: list[Case], count: int) -> list[Row]:
    threads = torch.get_num_threads()
    samples = rounds({c.backend: Contestant(c.run, threads) for c in group}, count)
    return [row(case, samples[case.backend], "cpu") for case in group]


def time_gpu(
    group: list[Case], count: int, device: str, timers: dict[str, gpu_timing.Timer], report: Report
) -> Iterator[Row]:
    """Time each case with each timer. A failing timer other than "graph" leaves `timers`."""
    for case in group:
        for timer, times in list(timers.items()):
            try:
                measured = times(case.run, count, device)
            except Exception as error:
                if timer == "graph":
                    report(case, _line(error))
                    break
                print(f"timer {timer} is off now: {_line(error)}")
                del timers[timer]
                continue
            for l2, seconds in measured.items():
                yield row(case, seconds, device, l2, timer)


def sweep(
    groups: Iterable[list[Case]],
    pattern: str,
    time: Callable[[list[Case], Report], Iterable[Row]],
    wrong: list[str],
) -> Iterator[list[Row]]:
    """Check the cases of each group, time the correct ones, and append the others to `wrong`.

    An incorrect rival is reported and left out, but not appended.
    """

    def report(case: Case, why: str) -> None:
        name = f"{case.op} {case.shape} {case.dtype} {case.backend}: {why}"
        print(f"{'left out' if case.rival else 'WRONG'}: {name}", flush=True)
        if not case.rival:
            wrong.append(name)

    for group in groups:
        right = []
        for case in group:
            if re.search(pattern, case.op):
                if why := _wrong(case):
                    report(case, why)
                else:
                    right.append(case)
        if right:
            yield list(time(right, report))


def _wrong(case: Case) -> str | None:
    try:
        return None if case.check() else "wrong result"
    except Exception as error:
        return _line(error)


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"


def _machine(gpu: bool) -> str:
    name = torch.cuda.get_device_name() + ", " if gpu else ""
    threads = f"{torch.get_num_threads()} threads, hivtp_kernels {hivtp_kernels.__version__}"
    return f"{name}{timing.machine()}, {threads}"


def write(path: Path, rows: list[Row]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, FIELDS)
        writer.writeheader()
        writer.writerows(rows)


def read(path: Path) -> dict[tuple[str, ...], Row]:
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        if tuple(reader.fieldnames or ()) != FIELDS:
            raise SystemExit(f"{path} is not a CSV of this bench: its columns must be {FIELDS}")
        return {tuple(line[field] for field in KEY): line for line in reader}


def compare(a: Path, b: Path) -> str:
    """Ratios of B's times to A's for the cases in both; "=" marks a ratio within the spread."""
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


def plot(path: Path, rows: list[Row]) -> None:
    """Plot the time of each op at each shape, one bar per backend and dtype, warm L2 over cold."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    # CUPTI, if it timed every case.
    counts = Counter(timed["timer"] for timed in rows)
    timer = max(counts, key=lambda name: (counts[name], name == "cupti"))
    ops = {
        op: [t for t in rows if (t["op"], t["timer"]) == (op, timer)]
        for op in sorted({timed["op"] for timed in rows})
    }
    bars = [max(8, len({_label(t) for t in mine})) for mine in ops.values()]
    figure, axes = pyplot.subplots(
        len(ops), 1, figsize=(9, 0.12 * sum(bars) + len(ops)), squeeze=False, height_ratios=bars
    )
    for (op, mine), axis in zip(ops.items(), axes[:, 0], strict=True):
        for l2, color, width in (("", "C0", 0.8), ("cold", "C0", 0.8), ("warm", "C1", 0.4)):
            some = [timed for timed in mine if timed["l2"] == l2]
            if some:
                values = [float(timed["us"]) for timed in some]
                label = f"{l2} L2" if l2 else None
                axis.barh([_label(t) for t in some], values, width, color=color, label=label)
        if mine[0]["l2"]:
            axis.legend(fontsize=5)
        axis.set(title=op, xlabel=f"microseconds, median, timer {timer}", xscale="log")
        axis.invert_yaxis()
        axis.margins(y=0.01)
        axis.tick_params(axis="y", labelsize=5)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _label(timed: Row) -> str:
    return " ".join(timed[field] for field in ("shape", "dtype", "backend"))


def run(
    name: str, machine: str, *, count: int, quick: bool = False, pattern: str = "", out: Path
) -> int:
    """Sweep "cpu", "cuda" or "rehearsal" into `name`.csv and .png; returns 1 if a case is wrong."""
    device = "cuda" if name == "cuda" else "cpu"
    timers = {} if name == "cpu" else gpu_timing.timers()

    def time(group: list[Case], report: Report) -> Iterable[Row]:
        if name == "cpu":
            return time_cpu(group, count)
        return time_gpu(group, count, device, timers, report)

    about = {"machine": machine, "date": datetime.date.today().isoformat()}
    rows: list[Row] = []
    wrong: list[str] = []
    groups = cases(device, quick, rehearse=name == "rehearsal")
    for group in sweep(groups, pattern, time, wrong):
        for timed in group:
            print("{op:24} {shape:24} {dtype:9} {backend:28} {l2:5} {timer:5} {us:>12} us "
                  "{gb_per_s:>9} GB/s".format(**timed), flush=True)  # fmt: skip
            rows.append(timed | about)
        # After every group, so that an interrupted run keeps its results.
        write(out / f"{name}.csv", rows)
    if rows:
        plot(out / f"{name}.png", rows)
    if not rows and not wrong:
        raise SystemExit(f"--ops {pattern!r} matches no op")
    if wrong:
        print("wrong, so not timed:\n  " + "\n  ".join(wrong))
    return 1 if wrong else 0


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.ops", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("bench_out"), help="output folder")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--rounds", type=int, help="default: 15, or 30 replays on a GPU")
    parser.add_argument("--rehearse", action="store_true", help="the GPU sweep, tiny, on the CPU")
    parser.add_argument("--ops", default="", metavar="REGEX", help="only ops whose names match")
    parser.add_argument("--quick", action="store_true", help="fewer shapes")
    parser.add_argument("--force", action="store_true", help="time on a busy machine too")
    parser.add_argument("--gate", choices=("cpu",), help="judge by the machine's limits")
    parser.add_argument("--compare", type=Path, nargs=2, metavar=("A.csv", "B.csv"))
    arguments = parser.parse_args(argv)
    if arguments.rounds is None:
        arguments.rounds = 30 if arguments.device == "cuda" else 15
    if arguments.rounds < 1:
        parser.error(f"--rounds must be at least 1, got {arguments.rounds}")
    if arguments.compare:
        print(compare(*arguments.compare))
        return 0
    if arguments.gate:
        return 0 if gate.main(arguments.rounds, arguments.force) else 1
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: there is no CUDA device")
    what = {"count": arguments.rounds, "pattern": arguments.ops, "out": arguments.out}
    if arguments.rehearse:
        undo = stand_in.install()
        try:
            return run("rehearsal", "rehearsal: the figures mean nothing", **what)
        finally:
            undo()
    if busy := timing.load():
        print(busy, file=sys.stderr)
        if not arguments.force:
            parser.error("no figures from a busy machine; --force overrides")
    machine = ", ".join(filter(None, (_machine(arguments.device == "cuda"), busy)))
    return run(arguments.device, machine, quick=arguments.quick, **what)


if __name__ == "__main__":
    sys.exit(main())
