"""`tests/gpu/run`: no step ends the run, and no failure is lost."""

import importlib.util
import re
import sys
from importlib.machinery import SourceFileLoader
from pathlib import Path

import pytest

RUN = Path(__file__).with_name("run")


@pytest.fixture(scope="module")
def run():
    loader = SourceFileLoader("gpu_run", str(RUN))
    spec = importlib.util.spec_from_loader("gpu_run", loader)
    module = importlib.util.module_from_spec(spec)
    sys.modules["gpu_run"] = module
    loader.exec_module(module)
    yield module
    del sys.modules["gpu_run"]


def python(code):
    return [sys.executable, "-c", code]


def test_a_step(run):
    step = run.Step("s", 60, [python("print('one')"), python("print('two')")])
    outcome = run.run_step(step, {})
    assert (outcome.status, outcome.note) == ("ok", "two")
    assert "one" in outcome.output


@pytest.mark.parametrize("at_once", [False, True])
def test_a_failure_does_not_keep_the_next_command_from_running(at_once, run):
    commands = [python("raise ValueError('bad')"), ["no such program"], python("print('two')")]
    outcome = run.run_step(run.Step("s", 60, commands, at_once=at_once), {})
    assert outcome.status == "FAILED"
    assert outcome.note == "ValueError: bad"
    assert "\ntwo\n" in outcome.output


def test_a_step_that_takes_too_long_is_ended_with_its_children(run):
    child = "import os, time; print('child', os.getpid(), flush=True); time.sleep(120)"
    code = f"import subprocess; subprocess.run({python(child)!r})"
    outcome = run.run_step(run.Step("s", 10, [python(code)]), {})
    assert outcome.status == "TIMED OUT"
    assert outcome.seconds < 60
    (number,) = re.findall(r"^child (\d+)", outcome.output, re.MULTILINE)
    # The kernel takes a moment to end it, and it may not have been reaped yet.
    for _ in range(600):
        try:
            if "zombie" in Path("/proc", number, "status").read_text():
                break
        except (FileNotFoundError, ProcessLookupError):
            break
        run.time.sleep(0.1)
    else:
        pytest.fail(f"the child {number} is still running")


def test_the_deadline_of_the_run_ends_a_step_before_its_limit(run):
    late = run.time.monotonic() + 1
    outcome = run.run_step(run.Step("s", 60, [python("import time; time.sleep(120)")]), {}, late)
    assert outcome.status == "TIMED OUT"
    assert outcome.seconds < 30


def test_a_tool_without_access_to_the_device_is_unavailable(run):
    refused = python("print('Device not supported'); exit(1)")
    assert run.run_step(run.Step("s", 60, [refused]), {}).status == "unavailable"
    other = python("print('an error'); exit(1)")
    assert run.run_step(run.Step("s", 60, [refused, other]), {}).status == "FAILED"


@pytest.mark.parametrize(
    ("output", "note"),
    [
        ("==== 3 passed, 1 failed in 2.50s ====\nlast\n", "3 passed, 1 failed in 2.50s"),
        ("Traceback\nRuntimeError: no\nlast\n", "RuntimeError: no"),
        ("first\n\nlast\n\n", "last"),
        ("", ""),
    ],
)
def test_the_most_informative_line(output, note, run):
    assert run.note_of(output) == note


CASES = (
    '{"case": "a", "kernels": 2, "least_bytes": 1000}\n'
    '==PROF== Profiling "x"\n'
    '{"case": "b", "kernels": 1, "least_bytes": 500}\n'
)


def profile(*kernels):
    names = ["ID", "Kernel Name"]
    names += ["gpu__time_duration.sum", "dram__bytes_read.sum", "dram__bytes_write.sum"]
    names += ["launch__registers_per_thread", "sm__warps_active.avg.pct_of_peak_sustained_active"]
    lines = [names, ["", "", "ns", "byte", "byte", "register/thread", "%"], *kernels]
    return CASES + "".join(",".join(f'"{cell}"' for cell in line) + "\n" for line in lines)


def test_rows_of_the_profile(run):
    x, y = ["x", "1,500", "1,000", "200", "64", "50.0"], ["y", "10", "500", "0", "32", "25.0"]
    rows = run.profile_rows(profile(["0", *x], ["1", *x], ["2", *y]) + "core: all correct\n")
    assert [(row["case"], row["kernel"], row["moved_over_least"]) for row in rows] == [
        ("a", "x", "1.20"), ("a", "x", "1.20"), ("b", "y", "1.00"),
    ]  # fmt: skip
    assert rows[0]["time_ns"] == "1500"
    assert rows[2]["registers"] == "32"
    with pytest.raises(ValueError, match="saw 2 kernels, and 3 were launched"):
        run.profile_rows(profile(["0", *x], ["2", *y]))


def test_a_run_continues_and_reports_failures(run, monkeypatch, tmp_path, capsys):
    steps = [
        run.Step("tests", 60, [python("print('3 failed, 1 passed in 0.1s'); exit(1)")]),
        run.Step("kernels", 60, [python("print('done')")]),
        run.Step("sanitizers", 60, [python("print('not in quick')")]),
    ]
    monkeypatch.setattr(run, "steps_of", lambda options, out, scratch: steps)
    monkeypatch.setenv("OUT", str(tmp_path))
    assert run.main(["--quick", "--wheels", str(tmp_path)]) == 1
    table = capsys.readouterr().out.splitlines()[-3:]
    assert [line.split()[:2] for line in table] == [
        ["step", "status"], ["tests", "FAILED"], ["kernels", "ok"],
    ]  # fmt: skip
    assert "3 failed, 1 passed" in table[1]
    assert "=== kernels: ok" in (tmp_path / "log.txt").read_text()
    assert (tmp_path / "summary.txt").read_text().splitlines() == table
    only = ["--only", "kernels", "--only", "sanitizers", "--quick", "--wheels", str(tmp_path)]
    assert run.main(only) == 0
    assert "not in quick" in (tmp_path / "log.txt").read_text()


def test_without_a_gpu_it_says_so(run, monkeypatch, tmp_path):
    monkeypatch.setenv("OUT", str(tmp_path))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(SystemExit, match="no CUDA device was found, and --rehearse"):
        run.main([])


def test_steps_are_in_order_and_quick_shortens_benches(run, tmp_path):
    def steps(**chosen):
        options = {"quick": False, "rehearse": True} | chosen
        return run.steps_of(run.argparse.Namespace(**options), tmp_path, str(tmp_path))

    assert tuple(step.name for step in steps()) == run.STEPS
    for step in steps(quick=True):
        assert ("--quick" in step.commands[0]) == (step.name in ("kernels", "end_to_end"))
