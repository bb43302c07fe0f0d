"""InternVL: scores pooled two by two, and one budget for all tiles of an image."""

import hivtp_transformers
import pytest
import tiny_internvl as tiny
import torch
from hivtp_transformers.policy import METHODS
from reference import continue_each, logits
from tiny_llava import IMAGE_TOKEN, answer, needs_features

from hivtp_kernels import PruneConfig

RATIO = {"config": PruneConfig(grid=(6, 6))}
RULES = [RATIO, {"budget": 30}, {"budget": 0.3}]
ROWS = [[2, 1], [], [3]]  # tiles of the images of three prompts


@pytest.fixture(scope="module")
def model():
    return tiny.build()


def expected(model, inputs, tokens=6, **rule):
    embedded = [tiny.embed(model, *row, **rule)[0] for row in tiny.rows_of(model, inputs)]
    return continue_each(model, embedded, tokens)


@pytest.mark.parametrize("rule", RULES, ids=["ratio", "count", "share"])
@pytest.mark.parametrize("rows", ["cls", "all"])
@pytest.mark.parametrize("tiles", [[[2]], ROWS], ids=["one row", "three rows"])
def test_answers_follow_from_the_definition(model, tiles, rows, rule):
    inputs = tiny.inputs_of(model, *tiles, seed=1)
    wanted = expected(model, inputs, rows=rows, **rule)
    assert not torch.equal(wanted, answer(model, inputs))  # else pruning goes unnoticed
    with hivtp_transformers.apply(model, rows=rows, **rule) as handle:
        assert torch.equal(answer(model, inputs), wanted)
        kept = [
            int(tiny.keep(model, image, rows=rows, **rule).sum())
            for _, own in tiny.rows_of(model, inputs)
            for image in own
        ]
        assert handle.stats.kept == kept


def test_a_budget_counts_all_tiles_of_an_image(model):
    """Not each tile by itself: more than a tile's units used to prune nothing, silently."""
    inputs = tiny.inputs_of(model, [3, 1])
    with hivtp_transformers.apply(model, budget=50) as handle:
        short = handle.compact(**inputs)
    assert handle.stats.kept == [50, 36]
    assert int((short["input_ids"] == IMAGE_TOKEN).sum()) == 86
    first, second = handle.stats.stages
    assert [tuple(grid.shape) for grid in first] == [(6, 6)] * 3 and len(second) == 1
    assert [int((grid > 0).sum()) for grid in first] == [17, 17, 16]


@pytest.mark.parametrize(
    "vision", [{"use_qk_norm": True, "norm_type": "rms_norm"}, {"use_mean_pooling": False}],
    ids=["norms of q and k", "norm after the tower"],
)  # fmt: skip
def test_variants_of_the_tower(vision):
    model = tiny.build(seed=3, **vision)
    inputs = tiny.inputs_of(model, [1], [2], seed=4)
    wanted = expected(model, inputs, budget=14)
    with hivtp_transformers.apply(model, budget=14):
        assert torch.equal(answer(model, inputs), wanted)


def test_the_true_grid_by_default():
    model = tiny.build(grid=32)
    inputs = tiny.inputs_of(model, [1])
    wanted = expected(model, inputs, config=PruneConfig(grid=(16, 16)))
    with hivtp_transformers.apply(model) as handle:
        assert torch.equal(answer(model, inputs), wanted)
        assert handle.stats.prompt_before == [256 + 3 + 8]
    with hivtp_transformers.apply(model, budget=0.25) as handle:
        answer(model, inputs, tokens=1)
        assert handle.stats.kept == [64]


def test_scores_are_the_mean_of_four_patches(model):
    inputs = tiny.inputs_of(model, [2])
    with hivtp_transformers.apply(model, budget=14) as handle:
        scores = handle.scores(inputs["pixel_values"])
        image = handle.scores(inputs["pixel_values"], input_ids=inputs["input_ids"])
        with pytest.raises(TypeError, match="scores takes pixel_values, .* got image_size$"):
            handle.scores(inputs["pixel_values"], image_size=1)
    wanted = torch.from_numpy(tiny.importance(model, inputs["pixel_values"]))
    torch.testing.assert_close(torch.cat(scores).double(), wanted, rtol=1e-3, atol=0)
    assert len(scores) == 2 and len(image) == 1 and torch.equal(image[0], torch.cat(scores))


@pytest.mark.parametrize(
    "settings",
    [
        {"num_beams": 3},
        {"num_beams": 2, "num_return_sequences": 2},
        {"cache_implementation": "static"},
        {"use_cache": False},
    ],
    ids=str,
)
@pytest.mark.parametrize("rule", [RATIO, {"budget": 30}], ids=["ratio", "budget"])
def test_modes_agree_with_rows_alone(model, rule, settings):
    inputs = tiny.inputs_of(model, *ROWS, seed=2)
    rows = [
        {"input_ids": ids[None], **({"pixel_values": torch.cat(own)} if own else {})}
        for ids, own in tiny.rows_of(model, inputs)
    ]
    with hivtp_transformers.apply(model, **rule):
        together = answer(model, inputs, **settings)
        alone = torch.cat([answer(model, row, **settings) for row in rows])
    assert torch.equal(together, alone)
    if "num_beams" not in settings:
        assert torch.equal(together, expected(model, inputs, **rule))


@needs_features
def test_prefill_in_chunks(model):
    inputs = tiny.inputs_of(model, *ROWS, seed=1)
    with hivtp_transformers.apply(model, **RATIO):
        chunks = answer(model, inputs, prefill_chunk_size=7)
        assert torch.equal(chunks, answer(model, inputs))


def test_loss_and_gradient(model):
    inputs = tiny.inputs_of(model, [2], [1], seed=1)
    labels = inputs["input_ids"].clone()
    labels[:, :-6] = -100
    losses = []
    for row, (ids, own) in enumerate(tiny.rows_of(model, inputs)):
        embeddings, kept = tiny.embed(model, ids, own, **RATIO)
        wanted = labels[row][inputs["attention_mask"][row] == 1][kept][1:]
        with torch.no_grad():
            out = logits(model, embeddings)[:-1]
        losses.append(torch.nn.functional.cross_entropy(out, wanted, reduction="none")[wanted >= 0])
    with hivtp_transformers.apply(model, **RATIO):
        loss = model(**inputs, labels=labels).loss
    loss.backward()
    torch.testing.assert_close(loss, torch.cat(losses).mean(), rtol=1e-5, atol=0)
    assert model.model.multi_modal_projector.linear_1.weight.grad.abs().sum() > 0
    model.zero_grad()


def test_the_projector_sees_kept_rows_alone_and_no_map_exists(model):
    inputs = tiny.inputs_of(model, [1], [2])
    rows = []
    hook = model.model.multi_modal_projector.register_forward_hook(
        lambda _, args, __: rows.append(args[0].shape[:-1].numel())
    )
    with hivtp_transformers.apply(model, budget=14):
        with torch.profiler.profile(record_shapes=True) as profile:
            model(**inputs)
    hook.remove()
    assert rows == [2 * 14]
    tokens = 1 + 12 * 12
    shapes = [shape for event in profile.events() for shape in event.input_shapes]
    assert shapes and not any(list(shape)[-2:] == [tokens, tokens] for shape in shapes)


def test_removed_without_a_trace(model):
    inputs = tiny.inputs_of(model, [1], [2])
    with torch.no_grad():
        before = model(**inputs).logits
        with hivtp_transformers.apply(model, budget=14):
            assert not torch.equal(model(**inputs).logits[:, -1], before[:, -1])
        assert torch.equal(model(**inputs).logits, before)
    assert not any(
        getattr(layer.attention, name)._forward_hooks
        for layer in model.model.vision_tower.encoder.layer
        for name in ("q_proj", "k_proj", "q_norm", "k_norm")
    )


def test_token_count_needs_the_processor(model):
    sizes = [(168, 168), (168, 504)]
    with pytest.raises(ValueError, match="processor must be given for internvl"):
        hivtp_transformers.token_count(model, sizes, budget=50)
    processor = tiny.processor(model)
    counts = hivtp_transformers.token_count(model.config, sizes, budget=50, processor=processor)
    assert counts == [36, 50]
    assert hivtp_transformers.token_count(model, [], budget=50) == []
    with pytest.raises(ValueError, match="processor must be the model's InternVLProc.*, got a int"):
        hivtp_transformers.token_count(model, sizes, budget=50, processor=3)
    with pytest.raises(ValueError, match="batch_num_images must be None for internvl"):
        hivtp_transformers.token_count(
            model, sizes, budget=50, processor=processor, batch_num_images=[2]
        )


@pytest.mark.parametrize(
    "change, error",
    [
        ({"downsample_ratio": 0.25}, r"downsample_ratio must be 0\.5, got 0\.25"),
        ({"vision_feature_select_strategy": "full"}, "must be 'default' .* got 'full'"),
        ({"vision_feature_layer": [1, 2]}, r"must be one integer: .* got \[1, 2\]"),
        ({"vision_feature_layer": 10}, "must be one integer: -1 .* got 10"),
    ],
)
def test_configs_that_are_refused(model, change, error):
    config = tiny.InternVLConfig(**{**model.config.to_dict(), **change})
    with pytest.raises(ValueError, match=error):
        hivtp_transformers.token_count(config, [])


def test_an_odd_grid_is_refused():
    with pytest.raises(ValueError, match="even number of patches per side, got 11 x 11"):
        hivtp_transformers.apply(tiny.build(grid=11))


@pytest.mark.parametrize("shape", [(1, 3, 336, 336), (3, 168, 168), (0, 3, 168, 168)])
def test_tiles_that_are_refused(model, shape):
    inputs = {**tiny.inputs_of(model, [1]), "pixel_values": torch.zeros(shape)}
    with hivtp_transformers.apply(model, budget=14):
        with pytest.raises(ValueError, match="pixel_values must"):
            model(**inputs)


def test_runs_that_are_no_tiles_are_refused(model):
    inputs = tiny.inputs_of(model, [2], [1])
    inputs["input_ids"][0, -20] = 7  # within the first image
    with hivtp_transformers.apply(model, budget=14):
        with pytest.raises(ValueError, match=r"36 placeholders .* 3 tiles .* runs of \["):
            model(**inputs)


@pytest.mark.parametrize("budget", [1, 3, 0.01, 50])
@pytest.mark.parametrize("method", METHODS)
def test_token_count_by_other_methods(model, method, budget):
    """A method that ranks the whole image needs one unit, others one per tile."""
    size = (168, 504)
    rule = {"budget": budget, "method": method}
    known = {"processor": tiny.processor(model)}
    inputs = tiny.inputs_of(model, [tiny.count_of(model, size)])
    with hivtp_transformers.apply(model, **rule) as handle:
        if METHODS[method].scope == "grid" and budget in (1, 3):
            with pytest.raises(ValueError, match="at least 4 for image 0, .*4 grids of 6 x 6"):
                handle.compact(**inputs)
            with pytest.raises(ValueError, match="at least 4 for image 0"):
                hivtp_transformers.token_count(model, [size], **rule, **known)
            return
        handle.compact(**inputs)
        scores = handle.scores(inputs["pixel_values"], input_ids=inputs["input_ids"])
        (stages,) = handle.stats.stages
    assert handle.stats.kept == hivtp_transformers.token_count(model, [size], **rule, **known)
    if method == "random":
        kept = torch.cat([stage.flatten() for stage in stages]) > 0
        assert scores[0][kept].min() >= scores[0][~kept].max()
