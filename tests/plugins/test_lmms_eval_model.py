"""The model for lmms-eval without lmms-eval; `tests/plugins/lmms_eval/run` is with it."""

import os
import subprocess
import sys
from importlib.metadata import entry_points

import pytest


def python(code, *flags, **environment):
    command = [sys.executable, *flags, "-c", code]
    return subprocess.run(command, env=os.environ | environment, text=True, capture_output=True)


def test_the_plugin_is_found_and_imports_nothing_before_it_is_asked():
    (entry,) = entry_points(group="lmms_eval.models", name="hivtp_llava_hf")
    module, name = entry.value.split(":")
    code = (
        f"import {module}; {module}.{name}; assert not {{'torch', 'lmms_eval'}} & {{*sys.modules}}"
    )
    done = python(f"import sys; {code}")
    assert done.returncode == 0, done.stderr


def test_without_lmms_eval_the_error_says_what_to_install(tmp_path):
    missing = "raise ModuleNotFoundError('No module named lmms_eval', name='lmms_eval')"
    (tmp_path / "lmms_eval.py").write_text(missing)
    done = python("import hivtp_lmms_eval.model", PYTHONPATH=str(tmp_path))
    needs = "hivtp_lmms_eval needs lmms-eval>=0.7.3,<0.8, but lmms_eval is not installed"
    assert f'ImportError: {needs}: pip install "hivtp_kernels[lmms-eval]"' in done.stderr


def test_a_broken_lmms_eval_is_named(tmp_path):
    chat = tmp_path / "lmms_eval" / "models" / "chat"
    chat.mkdir(parents=True)
    (chat / "llava_hf.py").write_text("import os; os.gone")
    done = python("import hivtp_lmms_eval.model", PYTHONPATH=str(tmp_path))
    reason = "module 'os' has no attribute 'gone'"
    assert f"but lmms_eval does not load: AttributeError: {reason}: pip install" in done.stderr


@pytest.mark.parametrize(
    ("registry", "reason"),
    [
        (None, "ModuleNotFoundError: No module named 'lmms_eval.models.registry_v2'"),
        ("", "ImportError: cannot import name 'ModelManifest'"),
        ("class ModelManifest: pass", "TypeError: ModelManifest() takes no arguments"),
        ("raise RuntimeError('boom')", "RuntimeError: boom"),
    ],
)
def test_another_registry_gets_no_model_and_a_warning(tmp_path, registry, reason):
    models = tmp_path / "lmms_eval" / "models"
    models.mkdir(parents=True)
    if registry is not None:
        (models / "registry_v2.py").write_text(registry)
    code = "import hivtp_lmms_eval; assert hivtp_lmms_eval.manifest() == []"
    done = python(code, "-W", "error", PYTHONPATH=str(tmp_path))
    assert done.returncode == 0, done.stderr
    (line,) = done.stderr.splitlines()
    assert (
        line.startswith("hivtp_lmms_eval needs lmms-eval>=0.7.3,<0.8, got one") and reason in line
    )
