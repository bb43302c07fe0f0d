"""The examples of CONTRIBUTING.md, pasted into a copy of the packages, run and do what they say."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
if not (ROOT / "CONTRIBUTING.md").exists():
    pytest.skip("the documentation is in the source tree alone", allow_module_level=True)

EXAMPLE = re.compile(r"^```python\n# ([\w/]+\.py)(?:: ([^\n]*))?\n(.*?)^```$", re.M | re.S)
# Where an example goes in its file: the text after or before which it is inserted.
AFTER = {
    "an import": "from __future__ import annotations\n",
    "a line of _SCHEMAS": "_SCHEMAS = (\n",
    "a line of the last loop": "for _name, _run in (\n",
    "a line of _MODULES": "_MODULES = {",
    "a line of METHODS": "METHODS: dict[str, Method] = {\n",
    "a line of FAMILIES": "FAMILIES: dict[str, type[Family]] = {\n",
    "a line of TOWERS": "TOWERS: dict[str, type[Tower]] = {\n",
}
BEFORE = {
    "above the last loop": "for _name, _run in (\n",
    "above METHODS": "METHODS: dict[str, Method]",
    "above TOWERS": "TOWERS: dict[str, type[Tower]]",
}

OPS = """
import torch
from hivtp_kernels import PruneConfig, available_backends, gather_tokens, select_tokens
from hivtp_kernels.functional import unit_stages

kept = select_tokens(torch.randn(2, 576), PruneConfig(budget=192), backend="torch")
assert (unit_stages(kept) > 0).sum(1).tolist() == [192, 192]
compiled = torch.compile(unit_stages, fullgraph=True, backend="aot_eager")
assert torch.equal(compiled(kept), unit_stages(kept))
assert available_backends()["numpy"] is None
x = torch.randn(2, 577, 8)
expected = gather_tokens(x, kept, backend="torch")
assert torch.equal(gather_tokens(x, kept, backend="numpy"), expected)
try:
    unit_stages(kept, backend="numpy")
except RuntimeError as error:
    assert "it has no unit_stages" in str(error)
else:
    raise AssertionError("it has no such op")
"""

MODELS = """
import hivtp_transformers
import tiny_llava
import torch
from hivtp_engine.models import Engine
from miniatures import MINIATURES
from transformers import Dinov2Config

model, inputs = tiny_llava.build(), MINIATURES["llava"].inputs(1, 2)
pixels = inputs["pixel_values"]

with hivtp_transformers.apply(model, budget=64, method="norm") as handle:
    handle.compact(**inputs)
    kept = handle.stats.stages[0][0].flatten() > 0
    tower = handle._pruner.tower
    hidden = tower.encode(pixels).hidden[:, tower.prefix :]
best = hidden[0].norm(dim=-1).argsort(descending=True)[:64]
assert kept[best].all() and kept.sum() == 64

model.config.hivtp_budget = 64
engine = Engine(model.config)
assert engine.placeholders((480, 640)) == 64 and engine.placeholders((480, 640), 0.5) == 288
with hivtp_transformers.apply(model, budget=64) as handle:
    short = handle.compact(**inputs)
    encoded = handle._pruner.tower.encode(pixels)
arguments = encoded.q, encoded.k, encoded.hidden, model.model.multi_modal_projector, None
embedded = engine.embed(*arguments, [(9, 9)] * 3, [64] * 3)
embeddings = model.get_input_embeddings()(short["input_ids"])
if "mm_encoder_outputs" in short:
    expected = torch.cat(list(short["mm_encoder_outputs"]["image"].pooler_output))
else:
    expected = short["inputs_embeds"][short["input_ids"] == tiny_llava.IMAGE_TOKEN]
torch.testing.assert_close(torch.cat(embedded), expected)

model.config.model_type = "my_llava"
with hivtp_transformers.apply(model, budget=64) as handle:
    model.generate(**inputs, max_new_tokens=2, do_sample=False)
    assert type(handle._pruner.family).__name__ == "MyLlava" and handle.stats.kept == [64] * 3

vision = Dinov2Config(**tiny_llava.tower_settings(10, 14 * 24))
model = tiny_llava.build(vision)
tower = model.model.vision_tower
# With the names of transformers 5.
if hasattr(tower.encoder.layer[0].attention, "q_proj"):
    with hivtp_transformers.apply(model, budget=64) as handle, torch.no_grad():
        model.generate(**inputs, max_new_tokens=2, do_sample=False)
        assert handle.stats.kept == [64] * 3
        scores = handle.scores(pixels)[0]
        tower.set_attn_implementation("eager")
        maps = tower(pixels, output_attentions=True).attentions
    middle = torch.stack([maps[layer] for layer in (2, 3)])[:, 0, :, 0, 1:].mean((0, 1))
    torch.testing.assert_close(scores, middle, rtol=1e-3, atol=1e-6)
"""


def paste(folder, path, where, code):
    file = folder / path
    text = file.read_text() if file.exists() else ""
    if where in AFTER:
        assert AFTER[where] in text, f"{path} has no place for {where!r}"
        text = text.replace(AFTER[where], AFTER[where] + code, 1)
    elif where in BEFORE:
        assert BEFORE[where] in text, f"{path} has no place for {where!r}"
        text = text.replace(BEFORE[where], f"{code}\n\n{BEFORE[where]}", 1)
    else:
        assert bool(text) == (where == "at the end"), f"{path} exists, or should"
        text += f"\n\n{code}"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pasted")
    skip = shutil.ignore_patterns("__pycache__", "*.so")
    for package in ("hivtp_kernels", "python"):
        shutil.copytree(ROOT / package, folder / package, ignore=skip)
    for example in EXAMPLE.findall((ROOT / "CONTRIBUTING.md").read_text()):
        paste(folder, *example)
    own = [folder, folder / "python", ROOT / "tests" / "ops", ROOT / "tests" / "families"]

    def run(*arguments):
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, own))}
        done = subprocess.run(
            [sys.executable, *arguments],
            cwd=folder,
            env=environment,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stdout + done.stderr

    return run


def test_an_op_and_a_backend(run):
    run("-c", OPS)
    run("-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/ops/test_unit_stages.py")


def test_a_method_a_family_a_tower_and_an_engine(run):
    run("-c", MODELS)
