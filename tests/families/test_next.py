"""LLaVA-NeXT against loops of its own: layout, counts, greedy answers, loss."""

import copy
import random

import hivtp_transformers
import pytest
import tiny_llava_next as reference
import torch
import torch.nn.functional as F
from hivtp_transformers import families
from hivtp_transformers.families import llava_next
from reference import continue_from, logits
from tiny_llava import IMAGE_TOKEN, answer, batch, handed_over, prompt, tower
from tiny_llava_next import POSITIONS, one, rows_of, three
from transformers import LlavaConfig

from hivtp_kernels import PruneConfig

SIZES = pytest.mark.parametrize("size", POSITIONS, ids=lambda size: f"{size[0]}x{size[1]}")
NEWLINES = pytest.mark.parametrize("newline", ["keep", "drop"])


@pytest.fixture(scope="session")
def seeded_next():
    return reference.build()


@pytest.fixture
def model(seeded_next):
    yield seeded_next
    if (handle := seeded_next.__dict__.get("_hivtp_handle")) is not None:
        handle.remove()
    assert not seeded_next._forward_pre_hooks


@SIZES
def test_layout_equals_loop(model, size):
    packed = families.of_model(model).image(size).positions
    assert packed.tolist() == reference.layout(size)
    assert len(packed) == POSITIONS[size]


@NEWLINES
def test_any_size_and_any_budget(model, newline):
    """Every budget is met exactly, or refused with one that is."""
    generator = random.Random(0)
    for _ in range(40):
        size = tuple(int(10 ** generator.uniform(0, 3.7)) for _ in range(2))
        layout = reference.layout(size)
        assert families.of_model(model).image(size).positions.tolist() == layout
        positions = sum(number >= 0 or newline == "keep" for number in layout)
        for budget in (generator.randint(1, 2500), generator.random()):
            count = int(budget * positions) if isinstance(budget, float) else budget
            rule = {"budget": budget, "newline": newline}
            try:
                (got,) = hivtp_transformers.token_count(model, [size], **rule)
            except ValueError as error:
                assert isinstance(budget, int)
                rule["budget"] = int(str(error).split()[5])
                assert hivtp_transformers.token_count(model, [size], **rule) == [rule["budget"]]
                assert rule["budget"] > count
            else:
                newlines = sum(number < 0 for number in layout) if newline == "keep" else 0
                least = newlines + 1 + any(number >= 576 for number in layout)
                whole = isinstance(budget, int) and budget >= len(layout)
                assert got == (len(layout) if whole else min(max(count, least), positions))


@NEWLINES
@SIZES
def test_kept_tokens_and_features_equal_loop(model, size, newline):
    """What the language model is handed, against what generate would be handed unpruned."""
    inputs = one(size)
    (ids, ((tiles, _),)), *_ = rows_of(inputs)
    text = int((ids != IMAGE_TOKEN).sum())
    with torch.no_grad():
        unpruned = reference.features(model, tiles, size)
        encoded = model.get_image_features(
            inputs["pixel_values"][:, : len(tiles)], inputs["image_sizes"]
        )
        (own,) = getattr(encoded, "pooler_output", encoded)  # alone in transformers 4
    torch.testing.assert_close(unpruned, own, rtol=1e-4, atol=1e-4)

    for rule in ({}, {"budget": 640}, {"budget": 0.33}):
        kept = reference.keep(model, tiles, size, newline=newline, **rule)
        with hivtp_transformers.apply(model, newline=newline, **rule) as handle, torch.no_grad():
            short = handle.compact(**inputs)
        got = handed_over(short)
        torch.testing.assert_close(got, unpruned[kept], rtol=1e-3, atol=1e-3)
        (count,) = hivtp_transformers.token_count(model, [size], newline=newline, **rule)
        assert handle.stats.kept == [len(got)]
        assert int((short["input_ids"] == IMAGE_TOKEN).sum()) == len(got)
        assert short["input_ids"].shape[1] == text + len(got)
        assert len(got) == count if rule else len(got) <= count
        if rule.get("budget") == 640:
            assert count == 640


@NEWLINES
@pytest.mark.parametrize("budget", [None, 640])
@pytest.mark.parametrize("inputs", [one(), three()], ids=["one", "three"])
def test_greedy_equals_reference(model, inputs, budget, newline):
    rule = {"budget": budget, "newline": newline}
    expected = [
        continue_from(model, reference.embed(model, ids, images, **rule)[0])
        for ids, images in rows_of(inputs)
    ]
    counts = hivtp_transformers.token_count(model, inputs["image_sizes"], **rule)
    with hivtp_transformers.apply(model, **rule) as handle:
        assert torch.equal(answer(model, inputs), torch.stack(expected))
    if budget is None:
        assert all(kept <= most for kept, most in zip(handle.stats.kept, counts, strict=True))
    else:
        assert handle.stats.kept == counts == [budget] * len(counts)


def test_all_rows_and_an_own_config(model):
    config = PruneConfig(ratio=0.1, regions=(3, 3), window=(3, 3))
    ((ids, images),) = rows_of(one())
    embeddings, _ = reference.embed(model, ids, images, rows="all", config=config)
    expected = continue_from(model, embeddings)
    with hivtp_transformers.apply(model, config, rows="all"):
        assert torch.equal(answer(model, one())[0], expected)


def test_what_is_compared_depends_on_pruning_newlines_and_image(model):
    """Otherwise the parity above would prove nothing."""
    answers = [answer(model, one())]
    for settings in ({}, {"newline": "drop"}, {"budget": 640}):
        with hivtp_transformers.apply(model, **settings):
            answers.append(answer(model, one()))
    with hivtp_transformers.apply(model):
        answers.append(answer(model, one(seed=3)))
    assert len({tuple(a[0].tolist()) for a in answers}) == len(answers)


def test_deep_copy_has_a_handle_of_its_own(model):
    with hivtp_transformers.apply(model, budget=300):
        expected = answer(model, one())
        clone = copy.deepcopy(model)
    assert torch.equal(answer(clone, one()), expected)


@pytest.mark.parametrize(("side", "budget"), [("left", None), ("right", 640)])
def test_loss_and_gradient_equal_reference(model, side, budget):
    inputs = three(side)
    labels = inputs["input_ids"].masked_fill(inputs["input_ids"] == IMAGE_TOKEN, -100)
    first = inputs["attention_mask"].cumsum(1) == 1
    labels = labels.masked_fill(first | (inputs["attention_mask"] == 0), -100)
    weights = [model.model.multi_modal_projector.linear_1.weight, model.model.image_newline]

    losses, tokens = [], 0
    for (ids, images), row, mask in zip(
        rows_of(inputs), labels, inputs["attention_mask"], strict=True
    ):
        embeddings, kept = reference.embed(model, ids, images, budget=budget)
        target = row[mask.bool()][kept][1:]
        own = logits(model, embeddings)[:-1]
        losses.append(F.cross_entropy(own, target, reduction="sum"))
        tokens += int((target != -100).sum())
    expected = sum(losses) / tokens
    gradients = torch.autograd.grad(expected, weights)

    with hivtp_transformers.apply(model, budget=budget):
        loss = model(**inputs, labels=labels).loss
    torch.testing.assert_close(loss, expected)
    for got, gradient in zip(torch.autograd.grad(loss, weights), gradients, strict=True):
        assert gradient.abs().max() > 0
        torch.testing.assert_close(got, gradient, rtol=1e-3, atol=1e-4)


def test_remove_is_bit_identical(model):
    # The model itself reads the tiles that only pad; NaN would spoil nothing but this comparison.
    inputs = three()
    inputs["pixel_values"] = inputs["pixel_values"].nan_to_num()
    with torch.no_grad():
        before, keys = model(**inputs).logits, list(model.state_dict())
        handle = hivtp_transformers.apply(model)
        assert model(**inputs).logits.shape != before.shape
        handle.remove()
        assert torch.equal(model(**inputs).logits, before)
    assert "generate" not in model.__dict__
    assert list(model.state_dict()) == keys


def test_budget_of_all_positions_does_not_prune(model):
    inputs = three()
    expected = answer(model, inputs)
    with hivtp_transformers.apply(model, budget=2340) as handle:
        assert torch.equal(answer(model, inputs), expected)
    assert handle.stats.kept == [2340, 1826, 1176, 2328]
    assert handle.stats.prompt_after == handle.stats.prompt_before


def test_budget_that_only_one_image_exceeds(model):
    sizes = [(336, 336), (480, 640)]
    assert hivtp_transformers.token_count(model, sizes, budget=1500) == [1176, 1500]
    with hivtp_transformers.apply(model, budget=1500) as handle:
        answer(model, reference.inputs_of(sizes), tokens=1)
    assert handle.stats.kept == [1176, 1500]


def test_all_tiles_in_one_pass_and_kept_rows_only(model):
    """The tower and the scores run once, and neither padding nor newlines are projected."""
    projected, encoded = [], []
    body = model.model
    hooks = [
        body.multi_modal_projector.register_forward_pre_hook(
            lambda module, args: projected.append(len(args[0]))
        ),
        tower(model).embeddings.register_forward_pre_hook(
            lambda module, args: encoded.append(len(args[0]))
        ),
    ]
    try:
        for settings in ({}, {"budget": 640}):
            with hivtp_transformers.apply(model, newline="drop", **settings) as handle:
                answer(model, three(), tokens=1)
            assert (encoded.pop(), projected.pop()) == (5 + 4 + 3 + 4, sum(handle.stats.kept))
    finally:
        for hook in hooks:
            hook.remove()
    assert not encoded and not projected


def test_exact_budget_does_not_read_from_the_encoder(model):
    class Reads(torch.utils._python_dispatch.TorchDispatchMode):
        encoding, reads = False, []

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function is torch.ops.aten.convolution.default:
                self.encoding = True
            names = ("aten._local_scalar_dense", "aten.nonzero", "aten.masked_select")
            if self.encoding and str(function).startswith(names):
                self.reads.append(function)
            return function(*args, **(kwargs or {}))

    with hivtp_transformers.apply(model, budget=640) as handle, Reads() as reads:
        handle.compact(**three())
    assert reads.encoding and not reads.reads


def test_stage_of_every_patch(model):
    with hivtp_transformers.apply(model, budget=640, newline="drop") as handle:
        handle.compact(**one())
        (scores,) = handle.scores(one()["pixel_values"], image_sizes=one()["image_sizes"])
    ((base, stitched),) = handle.stats.stages
    assert scores.shape == (4 * 576,) and base.shape == (24, 24)
    assert int((base > 0).sum() + (stitched > 0).sum()) == 640
    assert set(base.unique().tolist()) | set(stitched.unique().tolist()) >= {0, 1, 2}


def test_stacked_tiles(model):
    """Four dimensions, all tiles of all images behind each other, as the model takes them too."""
    inputs = three()
    with hivtp_transformers.apply(model):
        expected = answer(model, inputs)
        tiles = [tiles for _, images in rows_of(inputs) for tiles, _ in images]
        inputs["pixel_values"] = torch.cat(tiles)
        assert torch.equal(answer(model, inputs), expected)


@pytest.mark.parametrize(("budget", "kept"), [(None, range(253, 290)), (101, [101])])
def test_image_of_the_base_tile_only(model, monkeypatch, budget, kept):
    """One tile and one newline after it; no size leads there in transformers 5.23."""
    monkeypatch.setattr(llava_next, "image_size_to_num_patches", lambda *_: 1)
    inputs = one((336, 336)) | batch([prompt(patches=577)])
    inputs["pixel_values"] = inputs["pixel_values"][:, :1]
    (most,) = hivtp_transformers.token_count(model, [(336, 336)], budget=budget)
    with hivtp_transformers.apply(model, budget=budget) as handle, torch.no_grad():
        features = handed_over(handle.compact(**inputs))
        assert answer(model, inputs).shape == (1, 6)
    assert len(features) in kept and len(features) <= most
    assert torch.equal(features[-1], model.model.image_newline)


def test_image_too_narrow_to_show(model):
    """The packing cuts it off altogether: the base tile is all that is left."""
    assert len(families.of_model(model).image((10, 5000)).positions) == 576
    assert hivtp_transformers.token_count(model, [(10, 5000)], budget=100) == [100]


def test_counts_from_a_config_without_weights(model):
    sizes = torch.tensor([(480, 640), (336, 336)])
    assert hivtp_transformers.token_count(model.config, sizes, budget=0.25) == [585, 294]
    assert hivtp_transformers.token_count(model.config, []) == []
    ratio = hivtp_transformers.token_count(model.config, sizes)
    assert all(640 < most <= 5 * 288 + 48 for most in ratio[:1])


def test_counts_of_llava():
    config = LlavaConfig()
    sizes = [(480, 640), (20, 20)]
    assert hivtp_transformers.token_count(config, sizes, budget=192) == [192, 192]
    assert hivtp_transformers.token_count(config, sizes, budget=1000) == [576, 576]
    assert hivtp_transformers.token_count(config, sizes) == [288, 288]


def test_a_whole_image_keeps_its_newlines(model):
    """A budget of all positions leaves an image as it is, in every way to count."""
    rule = {"budget": 2340, "newline": "drop"}
    assert hivtp_transformers.token_count(model, [(480, 640)], **rule) == [2340]
    expected = answer(model, reference.inputs_of([(480, 640)]))
    with hivtp_transformers.apply(model, **rule) as handle:
        assert torch.equal(answer(model, reference.inputs_of([(480, 640)])), expected)
    assert handle.stats.kept == [2340]
    less = hivtp_transformers.token_count(model, [(480, 640)], budget=2339, newline="drop")
    assert less == [2340 - 36]
