"""LLaVA-OneVision images: no class token, resized grids, samples of several images."""

import math

import hivtp_transformers
import pytest
import tiny_onevision as tiny
import torch
from reference import continue_each, continue_from, logits
from tiny_llava import answer, batch, clip, needs_features, prompt

from hivtp_kernels import PruneConfig

# Heights and widths, and the grids next to the 9 x 9 of the base tile.
WIDE, TALL, SMALL, LARGE = (200, 260), (240, 111), (30, 30), (380, 300)
GRIDS = {WIDE: (14, 18), TALL: (18, 9), SMALL: (9, 9), LARGE: (20, 15)}
RATIO = PruneConfig(grid=(9, 9))
RULES = [{"config": RATIO}, {"budget": 100}, {"budget": 0.3, "newline": "drop"}]
OPTIONS = {"layers": tiny.LAYERS}


@pytest.fixture(scope="module")
def model():
    return tiny.build()


def expected(model, inputs, tokens=6, **rule):
    embedded = [tiny.embed(model, *row, **rule)[0] for row in tiny.rows_of(model, inputs)]
    return continue_each(model, embedded, tokens)


def test_the_sizes_are_what_the_tests_need(model):
    """Wide, tall and small ones as they are, the large one resized."""
    for size, shape in GRIDS.items():
        tiles = torch.zeros(1 + math.prod(tiny.tiles_of(model, size)), 81, 1)
        assert tiny.grids_of(model, tiles, size)[1].shape[:2] == shape
    assert tiny.stitch(model, torch.zeros(10, 81, 1), LARGE).shape[:2] != GRIDS[LARGE]


def test_the_reference_is_the_unpruned_model(model):
    inputs = tiny.inputs_of(model, [LARGE], [WIDE, TALL], [SMALL])
    with torch.no_grad():
        out = model(**inputs).logits
    for row, (ids, images) in enumerate(tiny.rows_of(model, inputs)):
        embeddings, _ = tiny.embed(model, ids, images, budget=100_000)
        with torch.no_grad():
            own = logits(model, embeddings)
        torch.testing.assert_close(out[row, -len(ids) :], own, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rule", RULES, ids=["ratio", "budget", "share without newlines"])
@pytest.mark.parametrize("size", GRIDS, ids=["wide", "tall", "small", "large"])
def test_one_row_follows_from_the_definition(model, size, rule):
    inputs = tiny.inputs_of(model, [size], seed=2)
    wanted = expected(model, inputs, **rule)
    with hivtp_transformers.apply(model, **rule, **OPTIONS) as handle:
        assert torch.equal(answer(model, inputs), wanted)
        (kept,) = handle.stats.kept
    ((_, (image,)),) = tiny.rows_of(model, inputs)
    assert kept == int(tiny.keep(model, *image, **rule).sum())
    (count,) = hivtp_transformers.token_count(model, [size], **rule)
    assert kept == count if "budget" in rule else kept <= count


@pytest.mark.parametrize("rule", RULES, ids=["ratio", "budget", "share without newlines"])
def test_mixed_rows_follow_from_the_definition(model, rule):
    inputs = tiny.inputs_of(model, [LARGE], [], [WIDE, LARGE, TALL], [TALL], seed=1)
    if rule.get("budget") == 100:  # more than what an image of one tile has
        rule = {"budget": 60}
    wanted = expected(model, inputs, **rule)
    with hivtp_transformers.apply(model, **rule, **OPTIONS):
        assert torch.equal(answer(model, inputs), wanted)


def test_images_of_a_sample_are_a_tile_each(model):
    inputs = tiny.inputs_of(model, [WIDE, TALL])
    assert (inputs["input_ids"] == tiny.IMAGE_TOKEN).sum() == 2 * (81 + 1)
    with hivtp_transformers.apply(model, budget=30, **OPTIONS) as handle:
        assert torch.equal(answer(model, inputs), expected(model, inputs, budget=30))
        assert handle.stats.kept == [30, 30]


def test_the_true_grid():
    model = tiny.build(grid=27, tiles=2)
    inputs = tiny.inputs_of(model, [(480, 640)])
    wanted = expected(model, inputs, config=PruneConfig(grid=(27, 27)))
    with hivtp_transformers.apply(model, **OPTIONS):
        assert torch.equal(answer(model, inputs), wanted)


@pytest.mark.parametrize("rule", [{"config": PruneConfig(grid=(27, 27))}, {"budget": 700}])
def test_a_grid_of_more_patches_than_one_selection_takes(rule):
    model = tiny.build(grid=27, most=9)
    inputs = tiny.inputs_of(model, [(1150, 1000)])
    ((ids, (image,)),) = tiny.rows_of(model, inputs)
    assert len(tiny.features(model, *image)) == 27 * 27 + 81 * 71 + 81
    with hivtp_transformers.apply(model, **rule, **OPTIONS) as handle:
        short = handle.compact(**inputs)
        assert short["input_ids"].shape[1] == handle.stats.prompt_after[0]
        assert handle.stats.kept == [int(tiny.keep(model, *image, **rule).sum())]
        new = answer(model, inputs, tokens=2)
    assert torch.equal(new[0], continue_from(model, tiny.embed(model, ids, [image], **rule)[0], 2))


@pytest.mark.parametrize(
    "settings",
    [{"num_beams": 3}, {"cache_implementation": "static"}, {"use_cache": False}],
    ids=str,
)
def test_modes_agree_with_rows_alone(model, settings):
    inputs = tiny.inputs_of(model, [LARGE], [], [TALL], seed=1)
    rows = []
    for ids, images in tiny.rows_of(model, inputs):
        rows.append({"input_ids": ids[None]})
        if images:
            ((tiles, size),) = images
            rows[-1] |= {"pixel_values": tiles[None], "image_sizes": torch.tensor([size])}
    with hivtp_transformers.apply(model, budget=100, **OPTIONS):
        together = answer(model, inputs, **settings)
        alone = torch.cat([answer(model, row, **settings) for row in rows])
    assert torch.equal(together, alone)


@needs_features
def test_prefill_in_chunks(model):
    inputs = tiny.inputs_of(model, [LARGE], [], [TALL], seed=1)
    with hivtp_transformers.apply(model, budget=100, **OPTIONS):
        chunks = answer(model, inputs, prefill_chunk_size=13)
        assert torch.equal(chunks, answer(model, inputs))


@pytest.mark.parametrize("size", [WIDE, LARGE], ids=["as it is", "resized"])
def test_loss_and_gradient(model, size):
    inputs = tiny.inputs_of(model, [size], [TALL])
    labels = inputs["input_ids"].clone()
    labels[:, :-4] = -100
    losses = []
    for ids, images in tiny.rows_of(model, inputs):
        embeddings, _ = tiny.embed(model, ids, images, budget=100)
        with torch.no_grad():
            out = logits(model, embeddings)[-5:-1]
        losses.append(torch.nn.functional.cross_entropy(out, ids[-4:], reduction="none"))
    with hivtp_transformers.apply(model, budget=100, **OPTIONS):
        loss = model(**inputs, labels=labels).loss
    loss.backward()
    torch.testing.assert_close(loss, torch.cat(losses).mean(), rtol=1e-5, atol=0)
    assert model.model.multi_modal_projector.linear_1.weight.grad.abs().sum() > 0
    model.zero_grad()


def test_removed_without_a_trace(model):
    inputs = tiny.inputs_of(model, [LARGE])
    with torch.no_grad():
        before = model(**inputs).logits
        with hivtp_transformers.apply(model, budget=100, **OPTIONS):
            assert model(**inputs).logits.shape[1] < before.shape[1]
        assert torch.equal(model(**inputs).logits, before)


@pytest.mark.parametrize("how", ["generate", "forward", "compact"])
def test_videos_are_refused(model, how):
    inputs = {**batch([prompt(0)]), "pixel_values_videos": torch.zeros(1, 2, 3, 132, 132)}
    with hivtp_transformers.apply(model, budget=100, **OPTIONS) as handle:
        call = {"generate": model.generate, "forward": model, "compact": handle.compact}[how]
        with pytest.raises(ValueError, match="pixel_values_videos must be None"):
            call(**inputs)


@pytest.mark.parametrize(
    "change, error",
    [
        (
            {"batch_num_images": torch.tensor([2])},
            "batch_num_images .* add up to the 1 images",
        ),
        ({"image_sizes": torch.tensor([[0, 3]])}, "image_sizes must hold"),
        ({"pixel_values": torch.zeros(1, 3, 132, 132)}, "pixel_values must hold"),
        ({"vision_aspect_ratio": "anyres_max_2"}, "vision_aspect_ratio must be None"),
    ],
    ids=lambda value: None if isinstance(value, dict) else value[:30],
)
def test_inputs_that_are_refused(model, change, error):
    inputs = {**tiny.inputs_of(model, [TALL]), **change}
    with hivtp_transformers.apply(model, budget=100, **OPTIONS) as handle:
        with pytest.raises(ValueError, match=error):
            handle.compact(**inputs)


def test_a_budget_config_is_refused(model):
    with pytest.raises(ValueError, match="ratio mode for llava_onevision"):
        hivtp_transformers.apply(model, PruneConfig(grid=(9, 9), budget=30), **OPTIONS)


def test_there_is_no_class_token(model):
    with pytest.raises(ValueError, match="rows must be 'all' or None"):
        hivtp_transformers.apply(model, rows="cls", **OPTIONS)


@pytest.mark.parametrize("size", [WIDE, LARGE], ids=["as it is", "resized"])
def test_a_tower_with_a_class_token(size, monkeypatch):
    """CLIP instead of SigLIP: its class token is no unit, resized or not."""
    model = tiny.build(vision=clip(9, layers=6), vision_feature_select_strategy="default")
    inputs = tiny.inputs_of(model, [size], seed=2)
    wanted = expected(model, inputs, budget=100)
    with hivtp_transformers.apply(model, budget=100) as handle:
        assert torch.equal(answer(model, inputs), wanted)
        pruner = handle._pruner
        pixels, images = pruner.family.images(inputs, None)
        hidden = pruner.tower.encode(pixels).hidden
        features = pruner.family.unit_features(model, hidden, images)
    assert len(features) == sum(image.units for image in images)


@pytest.mark.parametrize("together", [1, ["a"], [2, 1], [0.5, "x"]], ids=str)
def test_samples_that_do_not_add_up(model, together):
    with pytest.raises(ValueError, match="batch_num_images must be integers that add up to the 2"):
        hivtp_transformers.token_count(model, [WIDE, TALL], batch_num_images=together)
