"""What `tools.static_report` counts and computes, without compiling kernels."""

import csv
import shutil
from pathlib import Path

import pytest
import torch

from tools import machine_code, static_report

pytestmark = pytest.mark.skipif(
    not machine_code.SOURCES.exists(), reason="needs the sources of the kernels"
)
RESULTS = Path(__file__).parents[2] / "bench" / "results"
# Two launches read q and k twice unless L2 keeps them from the first to the second.
ABOVE_THE_LEAST = {f"{op} all" for op in ("attention_scores", "score_and_select")}


@pytest.fixture(scope="module")
def calls(tmp_path_factory):
    if shutil.which("c++") is None:
        pytest.skip("c++ is not installed")
    queued = list(static_report.cuda_calls(tmp_path_factory.mktemp("queue")))
    return static_report.call_rows(queued)


def test_every_op_is_counted(calls):
    assert [(r["op"], r["batch"]) for r in calls] == [
        (op, batch) for batch in static_report.BATCHES for op in static_report.OPS
    ]
    for row in calls:
        scores = row["op"] not in ("select_tokens", "gather_tokens")
        assert row["memsets"] == scores, row
        assert row["bytes_least"] <= row["bytes_memory"] <= row["bytes_asked"], row


def test_targets_of_calls(calls):
    launches = dict(static_report.LAUNCHES)
    for row in calls:
        assert row["kernels"] <= launches.get(row["op"], row["kernels"]), row
    (missed,) = [m for name, m in static_report.targets(calls) if m]
    assert {line.split(", ")[0].removeprefix("cuda ") for line in missed} == ABOVE_THE_LEAST
    # With q and k kept in L2, all are within the target.
    assert all(r["excess_kept"] <= static_report.EXCESS for r in calls)


def test_a_missed_target_is_reported(calls):
    slow = [r | {"kernels": 3, "excess": 1.21} for r in calls]
    kernel = {
        "row": "kernel", "backend": "cuda", "target": 90, "kernel": "hivtp_lse_f16", "op": "",
        "wide_loops": False, "stack": 8, "registers": 129,
    }  # fmt: skip
    judged = static_report.targets([*slow, kernel])
    assert len(judged) == 7 and all(missed for _, missed in judged)
    good = kernel | {"wide_loops": True, "stack": 0, "registers": 128}
    fast = [r | {"excess": 1.2} for r in calls]
    assert not any(missed for _, missed in static_report.targets([*fast, good]))


def test_least_bytes_agree_with_the_timed_cases():
    """They are the bytes that `python -m bench.ops` divides by its times."""
    from bench.ops import cases

    for group in cases.cases("cpu", batches=(1,)):
        for case in group:
            if case.dtype != "float16" or case.shape != "3x[1, 16, 577, 64]":
                continue
            assert case.bytes == static_report.least_bytes(case.op, 1), case.op
            break
        else:
            continue
        if case.op == "score_and_select all":
            return
    pytest.fail("no case was compared")


def test_published_procedure():
    rows = static_report.published_rows()
    assert [r["torch_ops"] for r in rows] == [18, 18] and rows[0]["torch_ops_authors"] == 217
    assert rows[1]["maps_bytes"] == 2 * rows[0]["maps_bytes"] == 24 * 16 * 577 * 577 * 4


def test_torch_ops_leave_out_views_and_allocations():
    with machine_code.TorchOps() as counted:
        a = torch.zeros(4)
        torch.ops.aten.empty.memory_format([3])  # conftest.py fills the result of torch.empty
        (a + a).view(2, 2).unbind(0)
    assert (counted.count, counted.bytes) == (2, 16 + 3 * 16)


CODE = """
        /*0000*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
.L_x_1:
        /*0010*/              @P0  LDG.E{width} R8, desc[UR4][R2.64] ;
.L_x_2:
        /*0020*/                   HMMA.16816.F32 R12, R4, R8, R12 ;
        /*0030*/               @P1 BRA `(.L_x_2) ;
        /*0040*/                   BRA.U UP0, `(.L_x_1) ;
.L_x_3:
        /*0050*/                   LDG.E R8, desc[UR4][R2.64] ;
        /*0060*/                   FADD R9, R8, R9 ;
        /*0070*/                   BRA `(.L_x_3) ;
        /*0080*/                   REDUX.SUM UR5, R3 ;
        /*0090*/                   REDG.E.ADD.STRONG.GPU desc[UR4][R2.64], R5 ;
"""


def test_count():
    """The loop that reads and multiplies is judged, not the sum after it nor the load before it."""
    kernel = machine_code.count(CODE.replace("{width}", ".128.CONSTANT"))
    assert kernel["instructions"] == 10 and kernel["atomic"] == 1
    assert (kernel["load_128"], kernel["load_32"], kernel["tensor_core"]) == (2, 1, 1)
    (loop,) = kernel["product_loops"]
    assert (loop["load_128"], loop["load_32"], loop["tensor_core"]) == (1, 0, 1)
    assert machine_code.wide(kernel)
    for narrow in ("", ".64", ".U16"):
        assert not machine_code.wide(machine_code.count(CODE.replace("{width}", narrow)))


@pytest.mark.parametrize(
    ("instruction", "kind"),
    [
        ("LDG.E.ENL2.256.CONSTANT", "load_128"),
        ("LDG.E.U8.STRONG.GPU", "load_narrow"),
        ("LDG.E.STRONG.GPU", "load_32"),
        ("LDGSTS.E.BYPASS.LTC128B.128", "async_16"),
        ("LDGSTS.E", "async_narrow"),
        ("UTMALDG.2D", "async_16"),
        ("HGMMA.64x64x16.F32", "tensor_core"),
        ("UTCHMMA.gdesc", "tensor_core"),
        ("HFMA2.MMA", "multiply"),
        ("MUFU.EX2", "special"),
        ("ATOMG.E.ADD", "atomic"),
        ("REDUX.SUM", None),
        ("LDGDEPBAR", None),
    ],
)
def test_classes(instruction, kind):
    assert machine_code.classify(instruction) == kind


def test_occupancy():
    # By hand: 128 registers leave 16 of 64 warps; then shared memory, threads and blocks limit.
    assert machine_code.occupancy(90, 128, 256, 0) == 16 / 64
    assert machine_code.occupancy(90, 32, 256, 100 << 10) == 2 * 8 / 64
    assert machine_code.occupancy(86, 32, 1024, 0) == 32 / 48
    assert machine_code.occupancy(80, 16, 32, 0) == 32 / 64


def test_written(tmp_path, calls):
    rows = calls + static_report.published_rows()
    static_report.write(tmp_path / "static.csv", rows)
    static_report.plot(tmp_path / "static.png", rows)
    lines = (tmp_path / "static.csv").read_text().splitlines()
    assert len(lines) == 1 + len(rows)
    assert (tmp_path / "static.png").stat().st_size < 100_000


def test_committed_results():
    """They cover exactly today's calls and kernels."""
    with (RESULTS / "static.csv").open() as file:
        rows = list(csv.DictReader(file))
    calls = {(r["backend"], r["op"], int(r["batch"])) for r in rows if r["row"] == "call"}
    assert calls == {
        (backend, op, batch)
        for backend in ("cuda", "triton")
        for op in static_report.OPS
        for batch in static_report.BATCHES
    }
    over = {
        (r["backend"], r["op"]) for r in rows if r["row"] == "call" and float(r["excess"]) > 1.2
    }
    assert over == {
        *((backend, op) for backend in ("cuda", "triton") for op in ABOVE_THE_LEAST),
        # One byte per patch goes through memory, in addition to the four of its score.
        ("triton", "select_tokens"),
    }
    targets = {(r["backend"], int(r["target"])) for r in rows if r["target"]}
    assert targets == {
        *(("cuda", target) for target in machine_code.CUDA_TARGETS),
        *(("triton", target) for target in machine_code.TRITON_TARGETS),
    }
