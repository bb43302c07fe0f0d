"""Granite Vision: LLaVA-NeXT with SigLIP, no class token, and four hidden states side by side."""

import hivtp_transformers
import pytest
import reference
import tiny_granite
import tiny_llava_next
import torch
from miniatures import MINIATURES
from tiny_llava import IMAGE_TOKEN, answer

from hivtp_kernels import PruneConfig

pytestmark = pytest.mark.parity

RULES = {
    "ratio": {},
    "own config": {"config": PruneConfig(grid=(9, 9), ratio=0.1, regions=(3, 2), window=(4, 3))},
    "budget": {"budget": 100},
    "share without newlines": {"budget": 0.3, "newline": "drop"},
}
ROWS = [(380, 300)], [], [(200, 260), (100, 1000)]


@pytest.fixture(scope="module")
def mini():
    return MINIATURES["granite"]


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_answers_follow_from_the_definition(mini, rule):
    inputs = mini.batch(*ROWS, seed=1)
    wanted = mini.answers(inputs, **(rule or {"config": None}))
    assert not torch.equal(wanted, answer(mini.model, inputs))  # else pruning goes unnoticed
    with hivtp_transformers.apply(mini.model, **rule) as handle:
        assert torch.equal(answer(mini.model, inputs), wanted)
        kept = handle.stats.kept
    sizes = [size for row in ROWS for size in row]
    counts = hivtp_transformers.token_count(mini.model, sizes, **rule)
    assert all(k <= count for k, count in zip(kept, counts, strict=True))
    if "budget" in rule:
        assert kept == counts


def test_the_true_grid():
    model = tiny_granite.build(grid=27)
    inputs = tiny_llava_next.inputs_of([(480, 640)], config=model.config)
    ((ids, images),) = tiny_llava_next.rows_of(inputs, model.config)
    embeddings, _ = tiny_llava_next.embed(model, ids, images)
    with hivtp_transformers.apply(model):
        assert torch.equal(answer(model, inputs)[0], reference.continue_from(model, embeddings))


def test_layers_and_rows_that_nobody_needs(mini):
    """Layers behind the last feature do not run, and kept patches alone are projected."""
    model = tiny_granite.build(vision_feature_layer=[-8, -6, -4, -3])
    ran, projected = [], []
    tower = getattr(model.model.vision_tower, "vision_model", model.model.vision_tower)
    for number, layer in enumerate(tower.encoder.layers):
        layer.register_forward_pre_hook(lambda *_, number=number: ran.append(number))
    model.model.multi_modal_projector.register_forward_pre_hook(
        lambda _, args: projected.append((args[0].shape[:-1].numel(), args[0].shape[-1]))
    )
    inputs = mini.batch(*ROWS)
    with hivtp_transformers.apply(model, newline="drop") as handle:
        answer(model, inputs, tokens=1)
        assert ran == list(range(8))
        assert projected == [(sum(handle.stats.kept), 4 * 64)]


def test_loss_and_gradient(mini):
    inputs, model = mini.batch(*ROWS), mini.model
    labels = inputs["input_ids"].masked_fill(inputs["input_ids"] == IMAGE_TOKEN, -100)
    labels[:, :-6] = -100
    weights = [model.model.multi_modal_projector.linear_1.weight, model.model.image_newline]
    losses = []
    for row, embeddings in zip(labels, mini.prompts(inputs, budget=100), strict=True):
        logits = reference.logits(model, embeddings)[-7:-1]
        losses.append(torch.nn.functional.cross_entropy(logits, row[-6:], reduction="none"))
    expected = torch.cat(losses).mean()
    gradients = torch.autograd.grad(expected, weights)
    with hivtp_transformers.apply(model, budget=100):
        loss = model(**inputs, labels=labels).loss
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    for own, gradient in zip(torch.autograd.grad(loss, weights), gradients, strict=True):
        assert gradient.abs().max() > 0
        torch.testing.assert_close(own, gradient, rtol=1e-3, atol=1e-4)
