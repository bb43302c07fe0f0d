"""The model for lmms-eval where lmms-eval is absent; `tests/lmms_eval/run` tests it with it."""

import re
import subprocess
import sys
from importlib.metadata import entry_points


def python(code):
    return subprocess.run([sys.executable, "-c", code], text=True, capture_output=True)


def test_the_plugin_is_found_and_imports_nothing_before_it_is_asked():
    (entry,) = entry_points(group="lmms_eval.models", name="hivtp_llava")
    module, name = entry.value.split(":")
    code = (
        f"import {module}; {module}.{name}; assert not {{'torch', 'lmms_eval'}} & {{*sys.modules}}"
    )
    done = python(f"import sys; {code}")
    assert done.returncode == 0, done.stderr


def test_without_lmms_eval_the_error_says_what_to_install():
    done = python("import sys; sys.modules['lmms_eval'] = None; import hivtp_lmms_eval.model")
    needs = r"hivtp_lmms_eval needs lmms-eval, but \S+ is not installed"
    assert re.search(f"ImportError: {needs}: pip install hivtp_kernels.lmms-eval", done.stderr)
