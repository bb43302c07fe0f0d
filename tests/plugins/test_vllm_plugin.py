"""What the vLLM plugin does without vLLM; `tests/plugins/serving/run` is the proof with it."""

import importlib.metadata
import json
import logging
import os
import subprocess
import sys
import types
from concurrent.futures import ThreadPoolExecutor

import hivtp_transformers
import hivtp_vllm
import pytest
import tiny_llava_next as tiny
import torch
from hivtp_vllm import batch
from hivtp_vllm.pruning import Pruning
from PIL import Image
from tiny_llava import configure
from transformers import LlavaConfig, LlavaNextConfig, Qwen2_5_VLConfig

SIZES = list(tiny.POSITIONS)


def next_config(**settings):
    return configure(LlavaNextConfig, image_grid_pinpoints=tiny.PINPOINTS, **settings)


def pretend(monkeypatch, version="0.32.0", **attributes):
    """A vllm module of some version; returns what is registered with it."""
    registered = {}
    vllm = types.ModuleType("vllm")
    if version != "missing":
        vllm.__version__ = version
    vllm.ModelRegistry = types.SimpleNamespace(register_model=registered.__setitem__)
    vars(vllm).update(attributes)
    monkeypatch.setitem(sys.modules, "vllm", vllm)
    monkeypatch.setattr(hivtp_vllm, "_warned", False)
    return registered


def test_importing_the_plugin_imports_neither_vllm_nor_torch():
    code = (
        "import sys, hivtp_vllm\n"
        "print({'vllm', 'torch', 'transformers', 'hivtp_kernels'} & set(sys.modules))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "set()"


def test_vllm_finds_the_plugin():
    (point,) = importlib.metadata.entry_points(group="vllm.general_plugins", name="hivtp")
    assert point.load() is hivtp_vllm.register


@pytest.mark.parametrize("version", ["0.32.0", "0.32.7+cpu"])
def test_register_names_the_architectures(monkeypatch, caplog, version):
    registered = pretend(monkeypatch, version)
    hivtp_vllm.register()
    assert not caplog.records
    assert registered == {
        name: f"hivtp_vllm.models:{name}"
        for name in (
            "HivtpLlavaForConditionalGeneration",
            "HivtpLlavaNextForConditionalGeneration",
        )
    }


@pytest.mark.parametrize(
    "version",
    ["0.31.2", "0.33.0", "0.320.0", "1.0.0", "dev", "0.1.dev1+g0", "", None, 32, "missing"],
)
def test_another_vllm_is_left_alone_with_one_warning(monkeypatch, caplog, version):
    registered = pretend(monkeypatch, version)
    hivtp_vllm.register()
    hivtp_vllm.register()
    (record,) = caplog.records
    got = None if version == "missing" else version
    assert f"hivtp_vllm needs vllm 0.32, got {got!r}: no model" in record.getMessage()
    assert record.levelname == "WARNING" and not registered


def test_threads_share_one_warning(monkeypatch, caplog):
    pretend(monkeypatch, "0.33.0")
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: hivtp_vllm.register(), range(100)))
    assert len(caplog.records) == 1


@pytest.mark.parametrize("error", [AttributeError, ImportError, OSError, RuntimeError, SystemError])
def test_a_vllm_that_fails_to_register_is_one_warning(monkeypatch, caplog, error):
    def register_model(*_):
        raise error("boom")

    registry = types.SimpleNamespace(register_model=register_model)
    pretend(monkeypatch, "0.32.1", ModelRegistry=registry)
    hivtp_vllm.register()
    hivtp_vllm.register()
    (record,) = caplog.records
    reason = f"needs vllm 0.32, got '0.32.1', which fails with {error.__name__}: boom: no model"
    assert reason in record.getMessage()


def test_a_logging_handler_that_raises_does_not_reach_vllm(monkeypatch):
    def emit(record):
        raise OSError("disk full")

    pretend(monkeypatch, "0.33.0")
    handler = logging.Handler()
    handler.emit = emit
    monkeypatch.setattr(logging.getLogger("hivtp_vllm"), "handlers", [handler])
    hivtp_vllm.register()


@pytest.mark.parametrize(
    ("code", "got"),
    [
        ("__version__ = '0.33.0'", "got '0.33.0': no model"),
        (
            "import warnings\nwarnings.warn('old')",
            "got None, which fails with UserWarning: old: no model",
        ),
        ("raise RuntimeError('broken')", "got None, which fails with RuntimeError: broken: no mo"),
    ],
)
def test_the_warning_reaches_the_user_and_cannot_become_an_error(tmp_path, code, got):
    """As vLLM calls the plugin, in a process whose logging nobody has set up."""
    (tmp_path / "vllm.py").write_text(code)
    call = (
        "from importlib.metadata import entry_points\n"
        "(plugin,) = entry_points(group='vllm.general_plugins', name='hivtp')\n"
        "for _ in range(2): plugin.load()()"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", call],
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith("hivtp_vllm needs vllm 0.32, ") and got in line
    assert not done.stdout


@pytest.mark.parametrize("newline", ["keep", "drop"])
@pytest.mark.parametrize("budget", [300, 640, 0.33, None, 100_000])
def test_counts_are_those_of_hivtp_transformers(budget, newline):
    config = next_config(hivtp_newline=newline)
    pruning = Pruning(config)
    for size in SIZES:
        count = pruning.count(size, budget)
        if budget in (None, 100_000):
            assert count == tiny.POSITIONS[size]
        else:
            options = {"budget": budget, "newline": newline}
            assert [count] == hivtp_transformers.token_count(config, [size], **options)


def test_a_request_may_have_a_budget_of_its_own():
    pruning = Pruning(configure(LlavaConfig, hivtp_budget=192))
    assert [pruning.count((9, 9), b) for b in (None, 96, 0.5, 576, 999)] == [192, 96, 288, 576, 576]


@pytest.mark.parametrize("newline", ["keep", "drop"])
@pytest.mark.parametrize("count", [300, 640])
@pytest.mark.parametrize("size", SIZES)
def test_kept_positions_follow_from_the_definition(size, count, newline):
    pruning = Pruning(next_config(hivtp_newline=newline))
    rows, columns = tiny.tiles_of(size)
    generator = torch.Generator().manual_seed(count)
    scores = torch.rand(1 + rows * columns, tiny.PATCHES, generator=generator)
    kept = tiny.kept_patches(scores.numpy(), size, budget=count, newline=newline)
    expected = [n for n in tiny.layout(size) if n in kept or (n < 0 and newline == "keep")]
    assert len(expected) == count
    assert pruning.keep(scores, size, count).tolist() == expected


def test_a_full_count_keeps_everything_newlines_too():
    pruning = Pruning(next_config(hivtp_newline="drop"))
    kept = pruning.keep(torch.rand(5, tiny.PATCHES), (480, 640), 2340)
    assert kept.tolist() == tiny.layout((480, 640))


@pytest.mark.parametrize("budget", [0, -5, 1, True, "many", 1.5, 0.001])
@pytest.mark.parametrize("config", [configure(LlavaConfig), next_config()])
def test_an_illegal_budget_of_a_request_is_a_value_error(config, budget):
    with pytest.raises(ValueError, match="budget"):
        Pruning(config).count((480, 640), budget)


@pytest.mark.parametrize(
    "settings, error",
    [
        ({"hivtp_budget": "many"}, "budget"),
        ({"hivtp_budget": -1}, "budget"),
        ({"hivtp_layers": [99]}, "layers"),
        ({"hivtp_rows": "some"}, "rows"),
        ({"hivtp_newline": "drop"}, "newline"),
    ],
)
def test_an_engine_does_not_start_with_illegal_settings(settings, error):
    with pytest.raises((TypeError, ValueError), match=error):
        Pruning(configure(LlavaConfig, **settings))


def test_other_models_are_refused_by_name():
    with pytest.raises(ValueError, match=r"llava or llava_next, got 'qwen2_5_vl'"):
        Pruning(Qwen2_5_VLConfig())


def test_the_key_tells_engines_apart():
    settings = (
        {},
        {"hivtp_budget": 192},
        {"hivtp_budget": 96},
        {"hivtp_layers": [5]},
        {"hivtp_rows": "all"},
        {"hivtp_newline": "drop"},
    )
    assert len({Pruning(next_config(**s)).key for s in settings}) == len(settings)


def stub_run_batch(monkeypatch, calls, broken=()):
    """In place of vLLM: answers each request with its own number of bytes."""

    def run(command, check):
        _, asked_path, _, out_path = command[command.index("-i") :][:4]
        lines = []
        with open(asked_path) as file:
            asked = [json.loads(line) for line in file]
        calls.append([line["custom_id"] for line in asked])
        for line in asked:
            body = {
                "choices": [{"message": {"content": f"of {line['custom_id']}"}}],
                "usage": {"prompt_tokens": 197},
            }
            failed = line["custom_id"] in broken
            lines.append({
                "custom_id": line["custom_id"],
                "response": {"body": {} if failed else body},
                "error": {"message": "no image"} if failed else None,
            })  # fmt: skip
        with open(out_path, "w") as file:
            file.writelines(json.dumps(line) + "\n" for line in lines)

    monkeypatch.setattr(batch.subprocess, "run", run)


def test_batch_goes_on_where_it_was(tmp_path, monkeypatch):
    folder, out = tmp_path / "pictures", tmp_path / "answers.jsonl"
    (folder / "more").mkdir(parents=True)
    for name in ("b.png", "a.png", "more/c.png"):
        Image.new("RGB", (4, 4)).save(folder / name)
    (folder / "notes.txt").write_text("no image")
    calls = []
    stub_run_batch(monkeypatch, calls, broken=["b.png"])
    assert batch.run(folder, out, "m", "What?", 8, 2, []) == 1
    assert calls == [["a.png", "b.png"], ["more/c.png"]]
    stub_run_batch(monkeypatch, calls)
    assert batch.run(folder, out, "m", "What?", 8, 2, []) == 0
    assert calls[2:] == [["b.png"]]
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [line["image"] for line in lines if "answer" in line] == ["a.png", "more/c.png", "b.png"]
    assert lines[0] == {"image": "a.png", "answer": "of a.png", "prompt_tokens": 197}
    assert lines[1]["error"] == {"message": "no image"}
