"""What the vLLM plugin does without vLLM; `tests/plugins/serving/run` is the proof with it."""

import importlib.metadata
import logging
import os
import subprocess
import sys
import types
from concurrent.futures import ThreadPoolExecutor

import hivtp_transformers
import hivtp_vllm
import pytest
import reference
import tiny_llava_next as tiny
import torch
from hivtp_vllm.settings import serving_of
from tiny_llava import configure, siglip
from transformers import LlavaConfig, LlavaNextConfig, Qwen2_5_VLConfig

SIZES = list(tiny.POSITIONS)
CPU = torch.device("cpu")


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
    serving = serving_of(config)
    for size in SIZES:
        count = serving.count(size, budget)
        if budget in (None, 100_000):
            assert count == tiny.POSITIONS[size]
        else:
            options = {"budget": budget, "newline": newline}
            assert [count] == hivtp_transformers.token_count(config, [size], **options)


def test_a_request_may_have_a_budget_of_its_own():
    serving = serving_of(configure(LlavaConfig, hivtp_budget=192))
    assert [serving.count((9, 9), b) for b in (None, 96, 0.5, 576, 999)] == [192, 96, 288, 576, 576]


@pytest.mark.parametrize("newline", ["keep", "drop"])
@pytest.mark.parametrize("count", [300, 640])
@pytest.mark.parametrize("size", SIZES)
def test_kept_positions_follow_from_the_definition(size, count, newline):
    serving = serving_of(next_config(hivtp_newline=newline))
    image = tiny.image_of(size)
    units = tiny.PATCHES * tiny.count_of(size)
    scores = torch.rand(units, generator=torch.Generator().manual_seed(count))
    kept = reference.positions(
        image, reference.stages(image, scores.numpy(), budget=count, newline=newline), newline
    )
    assert int(kept.sum()) == count
    got = serving.select([size], [count], CPU)(scores)
    assert torch.equal(got.mask, kept) and got.counts == [count]
    arranged = got.arrange(torch.arange(len(scores))[got.units, None], torch.tensor([-1]))
    assert arranged.flatten().tolist() == image.positions[kept].tolist()


def test_a_full_count_keeps_everything_newlines_too():
    serving = serving_of(next_config(hivtp_newline="drop"))
    kept = serving.select([(480, 640)], [2340], CPU)(torch.rand(5 * tiny.PATCHES))
    assert kept.mask.all() and kept.counts == [2340]


def test_images_of_one_call_have_budgets_of_their_own():
    """Each as if it were alone, and units counted through the call."""
    serving = serving_of(next_config())
    sizes, counts = [(480, 640), (336, 336), (300, 900)], [300, 1176, 640]
    scores = [torch.rand(tiny.PATCHES * tiny.count_of(size)) for size in sizes]
    together = serving.select(sizes, counts, CPU)(torch.cat(scores))
    masks = together.mask.split([tiny.POSITIONS[size] for size in sizes])
    first, units = 0, []
    for own, size, count, mask in zip(scores, sizes, counts, masks, strict=True):
        alone = serving.select([size], [count], CPU)(own)
        assert torch.equal(alone.mask, mask)
        units.append(alone.units + first)
        first += len(own)
    assert torch.equal(together.units, torch.cat(units)) and together.counts == counts


@pytest.mark.parametrize(
    "changes",
    [{"vision_feature_layer": [-2, -3]}, {"vision_feature_select_strategy": "default"}],
    ids=["several feature layers", "a patch dropped"],
)
def test_features_that_vllm_would_make_otherwise_are_refused(changes):
    vision = siglip() if "vision_feature_select_strategy" in changes else None
    with pytest.raises(ValueError, match="vision_feature_layer must be one layer, and every"):
        serving_of(configure(LlavaConfig, vision, **changes))


@pytest.mark.parametrize("budget", [0, -5, True, "many", 1.5, 1])
@pytest.mark.parametrize("config", [configure(LlavaConfig), next_config()])
def test_an_illegal_budget_of_a_request_is_a_value_error(config, budget):
    if budget is not True and budget == 1 and config.model_type == "llava":
        assert serving_of(config).count((480, 640), budget) == 1
        return
    with pytest.raises(ValueError, match="budget"):
        serving_of(config).count((480, 640), budget)


def test_a_share_too_small_for_an_image_is_the_smallest_count():
    assert serving_of(configure(LlavaConfig)).count((480, 640), 0.001) == 1
    serving, size = serving_of(next_config()), (3000, 300)
    least = serving.count(size, 0.01)
    with pytest.raises(ValueError, match=f"budget must be at least {least} for"):
        serving.count(size, least - 1)


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
        serving_of(configure(LlavaConfig, **settings))


def test_other_models_are_refused_by_name():
    with pytest.raises(ValueError, match=r"llava or llava_next, got 'qwen2_5_vl'"):
        serving_of(Qwen2_5_VLConfig())


def test_the_key_tells_engines_apart():
    settings = (
        {},
        {"hivtp_budget": 192},
        {"hivtp_budget": 96},
        {"hivtp_layers": [5]},
        {"hivtp_rows": "all"},
        {"hivtp_newline": "drop"},
    )
    assert len({serving_of(next_config(**s)).key for s in settings}) == len(settings)
