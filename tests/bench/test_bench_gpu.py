"""The GPU sweep of `python -m bench.ops`, over stand-ins on the CPU. No test asserts a time."""

import itertools
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType

import pytest
import torch

from bench.ops import __main__ as bench
from bench.ops import cases, gpu_timing, rivals, stand_in
from hivtp_kernels import (
    PruneConfig,
    attention_scores,
    available_backends,
    gather_tokens,
    pack_tokens,
    select_tokens,
)


@pytest.fixture
def cuda():
    """Stand-ins for `torch.cuda` and CUPTI."""
    undo = stand_in.install()
    yield
    undo()


def prune(scores, x, backend):
    kept = select_tokens(scores, PruneConfig((4, 4), budget=8), backend=backend)
    # A view, and an op in place.
    return *kept[:3], gather_tokens(x, kept, backend=backend).flatten(0, 1).add_(1)


def test_a_graph_stand_in_replays_with_new_inputs(backend, cuda):
    scores, x = torch.randn(2, 16), torch.randn(2, 17, 8)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        assert torch.cuda.is_current_stream_capturing()
        results = prune(scores, x, backend)
    assert not torch.cuda.is_current_stream_capturing()
    before = [result.clone() for result in results]
    for seed in (1, 2):
        generator = torch.Generator().manual_seed(seed)
        scores.normal_(generator=generator)
        x.normal_(generator=generator)
        # Nothing runs until a replay.
        assert all(map(torch.equal, results, before))
        graph.replay()
        assert all(map(torch.equal, results, prune(scores, x, backend)))
        before = [result.clone() for result in results]


def test_a_graph_stand_in_refuses_what_synchronizes(cuda):
    kept = select_tokens(torch.randn(2, 16), PruneConfig((4, 4)))
    with (
        pytest.raises(RuntimeError, match="synchronizes"),
        torch.cuda.graph(torch.cuda.CUDAGraph()),
    ):
        pack_tokens(torch.randn(2, 17, 8), kept)
    assert not torch.cuda.is_current_stream_capturing()


def test_stand_ins_are_removed_again():
    before = {name: getattr(torch.cuda, name) for name in stand_in._STAND_INS}
    available = torch.cuda.is_available()
    undo = stand_in.install()
    assert torch.cuda.get_device_capability() == (9, 0)
    assert torch.cuda.is_available() is available
    undo()
    assert before == {name: getattr(torch.cuda, name) for name in stand_in._STAND_INS}


@pytest.mark.parametrize(("cold", "calls"), [(1e-6, 20), (10.1e-6, 20), (150e-6, 2), (5e-3, 1)])
def test_a_warm_graph_holds_enough_calls(cold, calls, monkeypatch):
    asked = []

    def replays(watch, count, calls, **options):
        asked.append((watch, count, calls, options["cold"]))
        return [cold] * count

    monkeypatch.setattr(gpu_timing, "Graph", lambda run, calls, device: (calls, device))
    monkeypatch.setattr(gpu_timing, "replays", replays)
    times = gpu_timing.by_events(lambda: None, 3, "cpu")
    assert times == {"warm": [cold] * 3, "cold": [cold] * 3}
    assert asked == [((1, "cpu"), 3, 1, True), ((calls, "cpu"), 3, calls, False)]


class Device(stand_in.Cupti):
    """Three overlapping kernels per replay, 10 + n ns in total, and a flush outside the graph."""

    def __init__(self, lost=0):
        super().__init__()
        self.launches, self.lost, self.log = itertools.count(), lost, []

    def record(self, kind, correlation_id, **_):
        n = next(self.launches)
        for graph_id, id_, start, end in (
            (0, -correlation_id, 0, 5000),
            (1, correlation_id, 6000, 6004),
            (1, correlation_id, 6003, 6010 + n),
            (1, correlation_id, 6002, 6003),
        ):
            if n >= self.lost:
                times = {"start": 10_000 * n + start, "end": 10_000 * n + end}
                super().record(kind, graph_id=graph_id, correlation_id=id_, **times)

    def finalize(self):
        super().finalize()
        self.launches = itertools.count()


def test_cupti_times_are_spans_of_the_replays_after_the_warm_up(monkeypatch):
    device, flushes = Device(), []
    monkeypatch.setattr(stand_in, "cupti", device)
    monkeypatch.setattr(gpu_timing.Graph, "flush", lambda graph: flushes.append(graph))
    undo = stand_in.install()
    try:
        x = torch.ones(4)
        times = gpu_timing.by_cupti(lambda: x * 2, 3, "cpu")
    finally:
        undo()
    assert times == {l2: pytest.approx([13e-9, 14e-9, 15e-9]) for l2 in ("warm", "cold")}
    assert not device._kinds
    assert len(flushes) == 3 and len(set(flushes)) == 1


def test_cupti_that_loses_records_is_dropped(monkeypatch, capsys):
    monkeypatch.setattr(stand_in, "cupti", Device(lost=1))
    undo = stand_in.install()
    x = torch.ones(4)
    case = cases.Case("op", "[1]", "float16", "cuda", lambda: x * 2, lambda: True, 6000, 8000)
    try:
        timers = gpu_timing.timers()
        assert list(timers) == ["graph", "cupti"]
        rows = list(bench.time_gpu([case, case], 3, "cpu", timers, pytest.fail))
    finally:
        undo()
    assert [(row["timer"], row["l2"]) for row in rows] == [("graph", "warm"), ("graph", "cold")] * 2
    printed = capsys.readouterr().out
    assert printed == "timer cupti is off now: RuntimeError: CUPTI recorded 5 of 6 replays\n"


def test_a_case_that_cannot_be_captured_is_reported_and_the_next_one_timed(cuda):
    x, reports = torch.ones(4), []
    bad, good = (
        cases.Case("op", "[1]", "float16", name, run, lambda: True, 6000, 8000)
        for name, run in (("bad", lambda: x.sum().item()), ("good", lambda: x * 2))
    )
    timers = {"graph": gpu_timing.by_events}
    rows = list(bench.time_gpu([bad, good], 3, "cpu", timers, lambda *r: reports.append(r)))
    assert [row["backend"] for row in rows] == ["good"] * 2
    ((case, why),) = reports
    assert case is bad and "synchronizes" in why


def test_without_cupti_the_timer_is_events(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "cupti", None)
    assert list(gpu_timing.timers()) == ["graph"]
    assert "timer cupti is unavailable: " in capsys.readouterr().out


@pytest.mark.parametrize(("rows", "prefix"), [("cls", 1), ("all", 1), ("all", 0)])
def test_rivals_compute_what_attention_scores_does(rows, prefix):
    q, k = cases.attention((5, 3), 2, torch.float16, prefix=prefix, layers=2, heads=2, head_dim=24)
    found = rivals.scores(q, k, rows, prefix, compiled=True)
    assert {"eager maps", "compiled maps"} <= found.keys()
    assert ("flash lse + columns" in found) is (rows == "all")
    assert ("flash lse + compiled columns" in found) is (rows == "all")
    expected = attention_scores(q, k, rows=rows, prefix=prefix, backend="torch")
    for name, score in found.items():
        if name != "flash-colreduce":
            torch.testing.assert_close(
                score().float(), expected, rtol=rivals.TOLERANCE, atol=0, msg=name
            )


def test_cosine_topk_keeps_the_patches_least_like_the_others():
    x = torch.randn(2, 9, 6, generator=torch.Generator().manual_seed(0))
    x[0, 3], x[1, 8] = -x[0, 1:].sum(0), -x[1, 1:].sum(0)
    kept = rivals.cosine_topk(x, 1, 3)
    for image in range(2):
        patches = x[image, 1:]
        mean = [sum(float(torch.cosine_similarity(a, b, dim=0)) for b in patches) for a in patches]
        assert kept[image].tolist() == sorted(range(8), key=mean.__getitem__)[:3]


def test_flash_colreduce_is_called_per_layer_if_it_is_installed(monkeypatch):
    def flash_colreduce(query, key, reduction):
        assert reduction == "mean"
        return (query @ key.mT * query.shape[3] ** -0.5).softmax(-1).mean(2)

    package = ModuleType("flash_colreduce")
    package.__spec__ = ModuleSpec("flash_colreduce", None)
    package.flash_colreduce = flash_colreduce
    monkeypatch.setitem(sys.modules, "flash_colreduce", package)
    q, k = cases.attention((5, 3), 2, torch.float16, layers=2, heads=2, head_dim=24)
    assert "flash-colreduce" not in rivals.scores(q, k, "cls", 1, compiled=False)
    scores = rivals.scores(q, k, "all", 1, compiled=False)["flash-colreduce"]()
    expected = attention_scores(q, k, rows="all", backend="torch")
    torch.testing.assert_close(scores.float(), expected, rtol=rivals.TOLERANCE, atol=0)


@pytest.mark.parametrize("rows", ["cls", "all"])
def test_the_check_of_a_rival_can_fail(rows, monkeypatch):
    def off(*arguments):
        return maps(*arguments) * (1 + 2 * rivals.TOLERANCE)

    def checks():
        groups = cases._scores(shape, rivals.DTYPE, [], "cpu", gpu=True)
        contestants = [case for group in groups for case in group if case.op.endswith(rows)]
        return [case.check() for case in contestants if case.backend.startswith("eager maps")]

    maps, shape = rivals.maps, cases.Shape((4, 4), 2, layers=1, heads=2, head_dim=16)
    assert checks() == [True, True]
    monkeypatch.setattr(rivals, "maps", off)
    assert checks() == [False, False]


def test_shapes_of_the_gpu_sweep():
    shapes = cases._gpu_shapes(quick=False)
    assert [(s.prefix + s.patches, s.head_dim, s.batch) for s in shapes] == [
        *((577, 64, batch) for batch in (1, 8, 64)),
        *((729, 72, batch) for batch in (1, 8, 64)),
        (4097, 64, 1),
    ]
    assert [s for s in shapes if torch.float32 in s.dtypes] == shapes[:1]
    assert {s.layers for s in shapes} == {3} and {s.heads for s in shapes} == {16}


def test_a_rehearsal_runs_the_whole_gpu_sweep(tmp_path, capsys):
    assert bench.main(["--rehearse", "--rounds", "2", "--out", str(tmp_path)]) == 0
    assert "left out" not in capsys.readouterr().out
    assert (tmp_path / "rehearsal.png").stat().st_size > 0
    rows = bench.read(tmp_path / "rehearsal.csv")
    assert {row["machine"] for row in rows.values()} == {"rehearsal: the figures mean nothing"}
    timed = {}
    for row in rows.values():
        timed.setdefault(row["op"], set()).add(row["backend"])
    ours = {name for name in ("torch", "cpu") if available_backends("cpu")[name] is None}
    maps = {"eager maps", "compiled maps"}
    flash = {"flash lse + columns", "flash lse + compiled columns"}
    assert timed == {
        "attention_scores cls": ours | maps,
        "attention_scores all": ours | maps | flash,
        "score_and_select cls": ours | {f"{name} + topk" for name in maps},
        "score_and_select all": ours | {f"{name} + topk" for name in maps | flash},
        "select_tokens": ours,
        "gather_tokens": ours,
        "cosine topk": {"eager"},
    }
    for row in rows.values():
        assert float(row["us_low"]) <= float(row["us"]) <= float(row["us_high"])
    cases_timed = {key[:4] for key in rows}
    assert len(rows) == 4 * len(cases_timed)
    assert {key[5:] for key in rows} == set(itertools.product(("warm", "cold"), ("graph", "cupti")))
