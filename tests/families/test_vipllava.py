"""ViP-LLaVA: five hidden states side by side, normalised before they are projected."""

import hivtp_transformers
import pytest
import tiny_llava
import tiny_vipllava
import torch
from miniatures import MINIATURES
from reference import continue_from, embed
from tiny_llava import answer

from hivtp_kernels import PruneConfig

pytestmark = pytest.mark.parity

GRID = (tiny_vipllava.GRID,) * 2
RULES = {
    "ratio": {},
    "own config": {"config": PruneConfig(grid=GRID, ratio=0.1, regions=(3, 2), window=(4, 3))},
    "budget": {"budget": 40},
    "share": {"budget": 0.3},
}


@pytest.fixture(scope="module")
def mini():
    return MINIATURES["vipllava"]


@pytest.mark.parametrize("rows", ["cls", "all"])
@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_answers_follow_from_the_definition(mini, rule, rows):
    inputs = mini.inputs(1, 0, 2, seed=1)
    wanted = mini.answers(inputs, rows=rows, **rule)
    assert not torch.equal(wanted, answer(mini.model, inputs))  # else pruning goes unnoticed
    with hivtp_transformers.apply(mini.model, rows=rows, **rule) as handle:
        assert torch.equal(answer(mini.model, inputs), wanted)
        kept = handle.stats.kept
    counts = hivtp_transformers.token_count(mini.model, [(9, 9)] * 3, **rule)
    assert all(k <= count for k, count in zip(kept, counts, strict=True))
    if "budget" in rule:
        assert kept == counts


@pytest.mark.parametrize("features", [-2, [-2], [6, 4]], ids=str)
def test_other_features(features):
    model = tiny_vipllava.build(features=features)
    inputs = {**tiny_llava.batch([tiny_llava.prompt(patches=144)])}
    inputs["pixel_values"] = tiny_llava.photos(1, size=168)
    wanted = continue_from(model, embed(model, inputs["input_ids"][0], inputs["pixel_values"])[0])
    with hivtp_transformers.apply(model):
        assert torch.equal(answer(model, inputs)[0], wanted)


def test_layers_and_rows_that_nobody_needs():
    """Layers behind the last feature do not run, and kept patches alone are projected."""
    model = tiny_vipllava.build()
    ran, projected = [], []
    for number, layer in enumerate(tiny_llava.tower(model).encoder.layers):
        layer.register_forward_pre_hook(lambda *_, number=number: ran.append(number))
    model.model.multi_modal_projector.register_forward_pre_hook(
        lambda _, args: projected.append((args[0].shape[:-1].numel(), args[0].shape[-1]))
    )
    with hivtp_transformers.apply(model, budget=40):
        answer(model, MINIATURES["vipllava"].inputs(1, 0, 2), tokens=1)
    assert ran == list(range(11)) and projected == [(3 * 40, 5 * 64)]
