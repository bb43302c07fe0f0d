"""Plain `forward`: logits, loss and gradients."""

import hivtp_transformers
import pytest
import reference
import torch
import torch.nn.functional as F
from tiny_llava import IMAGE_TOKEN, one, rows_of, three

from hivtp_kernels import PruneConfig


@pytest.mark.parametrize("budget", [None, 100])
@pytest.mark.parametrize("side", ["left", "right"])
def test_loss_and_gradient_equal_reference(model, side, budget):
    inputs, config = three(side), PruneConfig(budget=budget)
    labels = inputs["input_ids"].masked_fill(inputs["input_ids"] == IMAGE_TOKEN, -100)
    # Nothing comes before a row's first token but padding, and that must not predict it.
    first = inputs["attention_mask"].cumsum(1) == 1
    labels = labels.masked_fill(first | (inputs["attention_mask"] == 0), -100)
    projector = model.model.multi_modal_projector.linear_1.weight

    losses, tokens = [], 0
    for (ids, images), row, mask in zip(
        rows_of(inputs), labels, inputs["attention_mask"], strict=True
    ):
        embeddings, kept = reference.embed(model, ids, images, config)
        target = row[mask.bool()][kept][1:]
        logits = reference.logits(model, embeddings)[:-1]
        losses.append(F.cross_entropy(logits, target, reduction="sum"))
        tokens += int((target != -100).sum())
    expected = sum(losses) / tokens
    (gradient,) = torch.autograd.grad(expected, projector)

    with hivtp_transformers.apply(model, config):
        loss = model(**inputs, labels=labels).loss
    torch.testing.assert_close(loss, expected)
    (pruned_gradient,) = torch.autograd.grad(loss, projector)
    assert gradient.abs().max() > 0
    torch.testing.assert_close(pruned_gradient, gradient, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("config", [PruneConfig(), PruneConfig(budget=200)], ids=str)
def test_loss_of_an_unpadded_batch_is_the_mean_of_its_rows(model, config):
    """Kept counts differ, so that a row is padded whose first token nothing predicts."""
    inputs = three()
    ids = inputs["input_ids"][:1].expand(2, -1)[:, -589:]
    images = inputs["pixel_values"][[0, 1]]
    labels = ids.masked_fill(ids == IMAGE_TOKEN, -100)
    assert (labels[:, 0] != -100).all()
    with hivtp_transformers.apply(model, config) as handle, torch.no_grad():
        together = model(input_ids=ids, pixel_values=images, labels=labels).loss
        assert len(set(handle.stats.kept)) == (2 if config.budget is None else 1)
        alone = [
            model(input_ids=ids[:1], pixel_values=image[None], labels=labels[:1]).loss
            for image in images
        ]
    torch.testing.assert_close(together, sum(alone) / 2, rtol=1e-4, atol=1e-5)


def test_logits_equal_reference(model):
    inputs, config = one(), PruneConfig()
    with hivtp_transformers.apply(model, config), torch.no_grad():
        out = model(**inputs).logits[0]
        positional = model(inputs["input_ids"], inputs["pixel_values"]).logits[0]
    assert torch.equal(out, positional)
    ((ids, images),) = rows_of(inputs)
    with torch.no_grad():
        expected = reference.logits(model, reference.embed(model, ids, images, config)[0])
    torch.testing.assert_close(out, expected, rtol=1e-3, atol=1e-3)


def test_last_column_holds_the_last_token_of_every_row(model):
    """Unpadded prompts whose kept counts differ: whoever reads `logits[:, -1]` gets no padding."""
    inputs = three()
    same = {
        "input_ids": inputs["input_ids"][:1].expand(2, -1)[:, -589:],
        "pixel_values": inputs["pixel_values"][[0, 1]],
    }
    with hivtp_transformers.apply(model, PruneConfig()) as handle, torch.no_grad():
        last = model(**same).logits[:, -1]
        assert len(set(handle.stats.kept)) == 2
        for i in range(2):
            alone = {name: value[i : i + 1] for name, value in same.items()}
            torch.testing.assert_close(last[i], model(**alone).logits[0, -1], rtol=1e-3, atol=1e-3)
