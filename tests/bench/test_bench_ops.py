"""What `python -m bench.ops` computes from its measurements. No test asserts a time."""

import itertools
import re
from dataclasses import replace

import pytest
import torch

from bench.ops import __main__ as bench
from bench.ops import cases, contest, gate, gpu_timing, timing
from bench.ops.contest import Contestant

TINY = gate.Sizes(
    grid=(4, 4), large=(6, 6), batch=2, layers=1, heads=2, square=32, channels=16, budget=8
)


@pytest.fixture(autouse=True)
def idle(monkeypatch):
    monkeypatch.setattr(timing, "load", lambda: None)


def test_rounds_set_threads_and_calls_and_warm_up():
    ticks, calls = itertools.count(), []

    def run(name):
        calls.append((name, torch.get_num_threads()))
        if name == "slow":
            next(ticks)

    contestants = {
        "slow": Contestant(lambda: run("slow"), threads=2, calls=4),
        "fast": Contestant(lambda: run("fast")),
    }
    samples = contest.rounds(contestants, 2, lambda: float(next(ticks)))
    assert samples == {"slow": [5 / 4] * 2, "fast": [1.0] * 2}
    assert calls == [("slow", 2)] * 5 + [("fast", 1)] * 4 + [("slow", 2)] * 5
    assert torch.get_num_threads() == 1


def test_best_and_median_are_over_formulations_and_threads():
    samples = {"torch a, 1": [5.0, 4.0, 9.0], "torch b, 2": [6.0, 3.0, 8.0], "ours": [1.0]}
    assert contest.median(samples, "torch") == 5.0
    assert contest.best(samples, "torch") == 3.0


class FakeDevice:
    """A replay takes three ticks with a warm L2, and seven right after a flush."""

    def __init__(self):
        self.now, self.cold, self.log, self.stamps = 0.0, False, "", []

    def replay(self):
        self.now += 7.0 if self.cold else 3.0
        self.cold, self.log = False, self.log + "r"

    def flush(self):
        self.now += 100.0
        self.cold, self.log = True, self.log + "f"

    def start(self):
        self.stamps.append(self.now)

    def stop(self):
        self.stamps.append(self.now)

    def seconds(self):
        return [b - a for a, b in zip(self.stamps[::2], self.stamps[1::2], strict=True)]


def test_replays_of_a_graph():
    warm, cold = FakeDevice(), FakeDevice()
    assert gpu_timing.replays(warm, 4, 2, cold=False) == [1.5] * 4
    assert warm.log == "rrr" + "r" * 4
    assert gpu_timing.replays(cold, 4, 1, cold=True) == [7.0] * 4
    assert cold.log == "rrr" + "fr" * 4
    with pytest.raises(ValueError, match="calls must be 1 .* got 2"):
        gpu_timing.replays(cold, 4, 2, cold=True)


@pytest.mark.parametrize(
    ("value", "least", "passed"),
    [(1.49, False, True), (1.51, False, False), (1.51, True, True), (1.49, True, False)],
)
def test_a_line(value, least, passed):
    line = gate.Line("name", value, 1.5, least=least)
    assert line.passed is passed
    assert str(line).startswith("pass" if passed else "FAIL")
    assert f"{value:.2f}x" in str(line)
    assert ("at least" if least else "at most") in str(line)


def values(section, samples):
    return [line.value for line in section.judge(samples)]


def test_gate_of_all_rows():
    # 2 heads of 17 x 17 maps: 2 * 578 * 64 flops at 2 * 32^3 per second; 578 exponentials at 32768.
    samples = {
        "ours": [9.0, 4.0, 2.0], "mm, 1": [2.0, 5.0, 5.0], "mm, 2": [1.0, 6.0, 6.0],
        "exp, 1": [4.0, 1.0, 3.0], "maps a, 1": [9.0, 9.0, 1.0], "maps b, 2": [5.0, 6.0, 7.0],
        "product, 1": [3.0], "head by head, 1": [2.0], "published, 1": [6.0], "fused": [3.0],
    }  # fmt: skip
    limit = 2 * 578 * 64 / (2 * 32**3) + 578 / 32768
    assert values(gate.all_rows(TINY, 1), samples) == pytest.approx([4.0 / limit, 6.0 / 4.0])


def test_gate_of_the_cls_row():
    samples = {
        "kernel": [4.0, 3.0, 5.0], "call": [6.0],
        "read sum, 1": [9.0, 2.0, 9.0], "read dot, 1": [3.0] * 3,
    }  # fmt: skip
    assert values(gate.cls_row(TINY, 2, 1), samples) == pytest.approx([100 * 2.0 / 4.0])


def test_gate_of_select_and_gather():
    samples = {
        "kernel": [8e-6, 6e-6, 1e-6], "with outputs": [9e-6], "op": [30e-6, 16e-6, 16e-6],
    }  # fmt: skip
    assert values(gate.select(TINY, 1, 20.0), samples) == pytest.approx([6.0, 7.0])
    assert values(gate.select(TINY, 2, 4.0), samples) == pytest.approx([3.0])
    samples |= {"ours, 1": [3e-6, 1e-6, 4e-6], "index_select, 1": [9e-6], "index_select, 2": [4e-6]}
    assert values(gate.gather(TINY, 1, 1), samples) == pytest.approx([0.75, 7.0])


def test_gate_of_half_precision_pairs_the_rounds():
    samples = {"torch.float32": [1.0, 10.0, 4.0], "torch.float16": [2.0, 5.0, 4.0]}
    samples["torch.bfloat16"] = [0.5, 10.0, 8.0]
    assert values(gate.half_precision(TINY, "all", 1), samples) == [1.0, 1.0]


@pytest.mark.parametrize(("rows", "power"), [("cls", 1), ("all", 2)])
def test_gate_of_growth(rows, power):
    samples = {"few": [1.0], "2 images": [2.2], "8 layers": [8.8], "6x6 grid": [(37 / 17) ** power]}
    assert values(gate.growth(TINY, rows, 1), samples) == pytest.approx([1.1, 1.1, 1.0])


def test_the_whole_gate(capsys):
    all_pass = gate.main(1, True, TINY)
    printed = capsys.readouterr().out
    lines = re.findall(r"^(pass|FAIL)  ", printed, re.M)
    assert len(lines) == 20 and printed.count("at most") + printed.count("at least") == 20
    assert all_pass is ("FAIL" not in lines)
    assert f"{lines.count('pass')} of 20 lines pass" in printed


def test_the_gate_refuses_a_busy_machine_and_few_rounds(monkeypatch):
    with pytest.raises(SystemExit, match="at least 15 to judge, got 14"):
        gate.main(14, False, TINY)
    monkeypatch.setattr(timing, "load", lambda: "busy: load average 3.00")
    with pytest.raises(SystemExit, match="busy machine"):
        gate.main(15, False, TINY)
    with pytest.raises(SystemExit):
        bench.main(["--quick"])


def test_a_sweep_writes_what_compare_reads(tmp_path, capsys):
    sweep = ["--quick", "--rounds", "2", "--ops", "select_tokens", "--out", str(tmp_path)]
    assert bench.main(sweep) == 0
    assert (tmp_path / "cpu.png").stat().st_size > 0
    rows = bench.read(tmp_path / "cpu.csv")
    assert {key[:4] for key in rows} == {
        ("select_tokens", "[1, 4, 4]", "float32", backend) for backend in ("torch", "cpu")
    }
    twice = [dict(line) for line in rows.values()]
    for line in twice:
        line |= {name: str(2 * float(line[name])) for name in ("us", "us_low", "us_high")}
        line["us_low"] = str(2.1 * float(rows[tuple(line[k] for k in bench.KEY)]["us_high"]))
    bench.write(tmp_path / "twice.csv", twice[:1])
    capsys.readouterr()
    assert bench.main(["--compare", str(tmp_path / "cpu.csv"), str(tmp_path / "twice.csv")]) == 0
    printed = capsys.readouterr().out
    assert len(re.findall(r" 2\.000$", printed, re.M)) == 1
    assert "only in A: 1 cases" in printed
    bench.main(["--compare", str(tmp_path / "cpu.csv"), str(tmp_path / "cpu.csv")])
    assert len(re.findall(r" 1\.000 =$", capsys.readouterr().out, re.M)) == 2


def test_a_csv_of_something_else(tmp_path):
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    with pytest.raises(SystemExit, match="is not a CSV of this bench"):
        bench.compare(tmp_path / "other.csv", tmp_path / "other.csv")


def test_a_row_of_the_csv():
    case = cases.Case("op", "[1]", "float32", "cpu", lambda: None, lambda: True, 6000, 8000)
    row = bench.row(case, [2e-6, 1e-6, 9e-6], "cpu")
    assert (row["us"], row["us_low"], row["us_high"]) == ("2.00", "1.00", "9.00")
    assert (row["gb_per_s"], row["gflop_per_s"], row["rounds"]) == ("3.000", "4.000", "3")
    assert (row["l2"], row["timer"]) == ("", "host")


def test_a_row_of_a_gpu_has_the_20th_and_80th_percentile():
    case = cases.Case("op", "[1]", "float16", "cuda", lambda: None, lambda: True, 6000, 8000)
    seconds = [1e-6 * n for n in (99, 4, 2, 3, 1, 5, 6, 10, 9, 8, 7)]
    row = bench.row(case, seconds, "cuda", "cold", "graph")
    assert (row["us"], row["us_low"], row["us_high"]) == ("6.00", "3.00", "9.00")
    assert (row["l2"], row["timer"], row["rounds"]) == ("cold", "graph", "11")
    row = bench.row(case, [2e-6], "cuda", "cold", "graph")
    assert (row["us"], row["us_low"], row["us_high"]) == ("2.00", "2.00", "2.00")


def test_a_wrong_case_is_reported_and_the_others_are_timed(monkeypatch, tmp_path, capsys):
    def broken():
        raise RuntimeError("no such kernel\nand more")

    whole = [list(group) for group in cases.cases(quick=True)]
    whole[0][0] = replace(whole[0][0], check=lambda: False)
    whole[1][1] = replace(whole[1][1], check=broken)
    whole[2][0] = replace(whole[2][0], check=broken, rival=True)
    monkeypatch.setattr(bench, "cases", lambda *_, **__: whole)
    assert bench.main(["--rounds", "1", "--out", str(tmp_path)]) == 1
    printed = capsys.readouterr().out
    first, second, rival = (
        f"{case.op} {case.shape} {case.dtype} {case.backend}: "
        for case in (whole[0][0], whole[1][1], whole[2][0])
    )
    assert f"WRONG: {first}wrong result\n" in printed
    assert f"WRONG: {second}RuntimeError: no such kernel\n" in printed
    assert f"left out: {rival}RuntimeError: no such kernel\n" in printed
    assert printed.endswith(
        f"wrong, so not timed:\n  {first}wrong result\n  {second}RuntimeError: no such kernel\n"
    )
    timed = {(key[0], key[3]) for key in bench.read(tmp_path / "cpu.csv")}
    everything = {(case.op, case.backend) for group in whole for case in group}
    assert everything - timed == {
        (case.op, case.backend) for case in (whole[0][0], whole[1][1], whole[2][0])
    }


def test_a_rival_that_is_wrong_fails_no_sweep(monkeypatch, tmp_path):
    whole = [list(group) for group in cases.cases(quick=True)]
    whole[0][0] = replace(whole[0][0], check=lambda: False, rival=True)
    monkeypatch.setattr(bench, "cases", lambda *_, **__: whole)
    assert bench.main(["--rounds", "1", "--out", str(tmp_path)]) == 0


@pytest.mark.parametrize("dtype", cases.TOLERANCE, ids=str)
@pytest.mark.parametrize(
    "op",
    ["attention_scores", "select_tokens", "score_and_select", "gather_tokens", "pack_tokens"],
)
def test_every_check_can_fail(op, dtype, monkeypatch):
    def off(*arguments, **options):
        result = original(*arguments, **options)
        if options["backend"] == "torch":
            return result
        if op in ("select_tokens", "score_and_select"):
            return result._replace(stage=result.stage ^ 1)
        if op == "pack_tokens":
            return result[0] * 2, *result[1:]
        return result * (1 + 3 * cases.TOLERANCE[dtype])

    original = getattr(cases, op)
    monkeypatch.setattr(cases, op, off)
    shape, backends = cases.Shape((4, 4), 2), ["cpu"]
    groups = {
        "attention_scores": lambda: list(cases._scores(shape, dtype, backends, "cpu"))[::2],
        "score_and_select": lambda: list(cases._scores(shape, dtype, backends, "cpu"))[1::2],
        "select_tokens": lambda: [cases._select(shape, backends, "cpu")],
        "gather_tokens": lambda: list(cases._rows(shape, dtype, backends, "cpu"))[:1],
        "pack_tokens": lambda: list(cases._rows(shape, dtype, backends, "cpu"))[1:],
    }[op]()
    assert not any(case.check() for group in groups for case in group)
    monkeypatch.setattr(cases, op, original)
    assert all(case.check() for group in groups for case in group)
