"""Mantis: LLaVA with SigLIP, whose first patch is left out as if it were a class token."""

import hivtp_transformers
import numpy as np
import pytest
import reference
import tiny_mantis
import torch
from miniatures import MINIATURES
from tiny_llava import answer

from hivtp_kernels import PruneConfig

pytestmark = pytest.mark.parity

RULES = {
    "ratio": {"config": None},
    "own config": {"config": PruneConfig(grid=(9, 9), ratio=0.1, regions=(3, 2), window=(4, 3))},
    "one": {"budget": 1},
    "two": {"budget": 2},
    "budget": {"budget": 40},
    "all but one": {"budget": 79},
    "share": {"budget": 0.3},
}


@pytest.fixture(scope="module")
def mini():
    return MINIATURES["mantis"]


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_answers_follow_from_the_definition(mini, rule):
    inputs = mini.inputs(1, 0, 2, seed=1)
    wanted = mini.answers(inputs, **rule)
    with hivtp_transformers.apply(mini.model, **rule) as handle:
        assert torch.equal(answer(mini.model, inputs), wanted)
        kept = handle.stats.kept
    counts = hivtp_transformers.token_count(mini.model, [(9, 9)] * 3, **rule)
    assert all(k <= count for k, count in zip(kept, counts, strict=True))
    if "budget" in rule:
        assert kept == counts == [rule["budget"] if rule["budget"] >= 1 else 24] * 3


def test_the_budget_is_of_shown_patches():
    image = reference.layout(tiny_mantis.build())
    assert image.positions.tolist() == list(range(1, 81)) and image.hidden == (0,)
    scores = np.random.default_rng(0).random(81)
    for budget in range(1, 81):
        for scores[0] in (0.0, 2.0):  # the patch that is not shown is the worst, the best
            stage = reference.stages(image, scores, budget=budget)
            assert (stage[1:] > 0).sum() == budget


def test_everything_kept_is_the_untouched_model(mini):
    inputs = mini.inputs(1, 0, 2)
    expected = answer(mini.model, inputs)
    with hivtp_transformers.apply(mini.model, budget=80):
        assert torch.equal(answer(mini.model, inputs), expected)
    assert hivtp_transformers.token_count(mini.model, [(9, 9)], budget=81) == [80]


@pytest.mark.parametrize("options", [{}, {"budget": 20}, {"budget": 20, "method": "topk"}], ids=str)
def test_stages_are_those_of_units_that_stay(options):
    """Not the patch without a position, which a budget selects for its own reasons."""
    mini = MINIATURES["mantis"]
    with hivtp_transformers.apply(mini.model, **options) as handle:
        handle.compact(**mini.inputs(1))
    ((stage,),) = handle.stats.stages
    assert int((stage > 0).sum()) == handle.stats.kept[0] and stage[0, 0] == 0
