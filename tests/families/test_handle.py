"""The life of a handle: statistics, undoing, copies, towers."""

import copy
from concurrent.futures import ThreadPoolExecutor
from unittest.mock import patch

import hivtp_transformers
import pytest
import reference
import torch
from tiny_llava import (
    LAYERS,
    answer,
    batch,
    build,
    needs_features,
    one,
    photos,
    prompt,
    rows_of,
    siglip,
    three,
)

from hivtp_kernels import PruneConfig


def test_remove_is_bit_identical(model):
    with torch.no_grad():
        before = model(**three()).logits
        answers = answer(model, three())
        keys = list(model.state_dict())
        handle = hivtp_transformers.apply(model)
        assert list(model.state_dict()) == keys
        assert model(**three()).logits.shape != before.shape
        handle.remove()
        handle.remove()
        assert torch.equal(model(**three()).logits, before)
    assert torch.equal(answer(model, three()), answers)
    assert "generate" not in model.__dict__
    assert model.generate.__func__ is type(model).generate
    assert list(model.state_dict()) == keys


def test_remove_restores_a_generate_of_the_callers(model):
    def own(**inputs):
        pass

    with patch.dict(model.__dict__, generate=own):
        with hivtp_transformers.apply(model):
            assert model.generate is not own
        assert model.generate is own


def test_context_manager_removes_on_error(model):
    with pytest.raises(KeyError), hivtp_transformers.apply(model):
        raise KeyError
    assert "_hivtp_handle" not in model.__dict__


def test_second_apply_raises(model):
    with hivtp_transformers.apply(model):
        with pytest.raises(RuntimeError, match="pruned already"):
            hivtp_transformers.apply(model)
    with hivtp_transformers.apply(model, budget=576), pytest.raises(RuntimeError):
        hivtp_transformers.apply(model)


def test_two_models_two_rules():
    first, second = build(seed=1), build(seed=2)
    with (
        hivtp_transformers.apply(first, budget=100) as a,
        hivtp_transformers.apply(second, budget=0.5) as b,
    ):
        answer(first, one())
        answer(second, one())
        assert (a.stats.kept, b.stats.kept) == ([100], [288])


def test_deep_copy_has_a_handle_of_its_own(model):
    with hivtp_transformers.apply(model, budget=100):
        expected = answer(model, one())
        clone = copy.deepcopy(model)
    assert clone.generate.__self__._model is clone
    assert torch.equal(answer(clone, one()), expected)
    clone._hivtp_handle.remove()
    assert torch.equal(answer(clone, one()), answer(model, one()))


def test_stats(model):
    inputs = three()
    with hivtp_transformers.apply(model) as handle:
        assert handle.stats is None
        answer(model, inputs)
        stats = handle.stats
    assert stats.prompt_before == inputs["attention_mask"].sum(1).tolist()
    a, b, c, d = stats.kept
    removed = [576 - a, 1152 - b - c, 576 - d]
    assert [x - y for x, y in zip(stats.prompt_before, stats.prompt_after, strict=True)] == removed
    assert [int((stage > 0).sum()) for (stage,) in stats.stages] == stats.kept
    assert all(stage.shape == (24, 24) and stage.dtype == torch.int8 for (stage,) in stats.stages)
    assert stats.milliseconds == {}


def test_stage_times(model):
    with hivtp_transformers.apply(model, profile=True) as handle:
        answer(model, one())
    assert list(handle.stats.milliseconds) == ["encode", "score_and_select", "project", "compact"]
    assert min(handle.stats.milliseconds.values()) > 0


@pytest.mark.parametrize(
    "keep", [{"budget": 576}, {"budget": 1000}, {"config": PruneConfig(ratio=1.0)}]
)
def test_everything_kept_is_the_untouched_model(model, keep):
    expected = answer(model, one())
    with hivtp_transformers.apply(model, **keep) as handle:
        assert "generate" not in model.__dict__
        assert torch.equal(answer(model, one()), expected)
        assert handle.compact(**one()).keys() == one().keys()


def test_compact_serves_forward(model):
    with hivtp_transformers.apply(model) as handle, torch.no_grad():
        expected = model(**three()).logits
        assert torch.equal(model(**handle.compact(**three())).logits, expected)


@needs_features  # else they are what compact() gives
def test_ids_beside_embeddings_are_still_an_error(model):
    inputs = {"input_ids": torch.ones(1, 3).long(), "inputs_embeds": torch.zeros(1, 3, 64)}
    with hivtp_transformers.apply(model), pytest.raises(ValueError, match="exactly one"):
        model(**inputs)


@pytest.mark.parametrize("rows", ["cls", "all"])
def test_scores_equal_reference(model, rows):
    pixel_values = three()["pixel_values"]
    with hivtp_transformers.apply(model, rows=rows) as handle:
        scores = handle.scores(pixel_values)
    assert all(own.dtype == torch.float32 and not own.requires_grad for own in scores)
    for own, image in zip(scores, pixel_values, strict=True):
        with torch.no_grad():
            expected = torch.tensor(reference.importance(model, image, LAYERS, rows))
        torch.testing.assert_close(own.double(), expected, rtol=1e-3, atol=0)


def test_what_needs_pruning_says_so(model):
    handle = hivtp_transformers.apply(model)
    handle.remove()
    for method in (handle.compact, handle.scores):
        with pytest.raises(RuntimeError, match="remove"):
            method(pixel_values=one()["pixel_values"])
    with (
        hivtp_transformers.apply(model, budget=576) as handle,
        pytest.raises(RuntimeError, match="every"),
    ):
        handle.scores(one()["pixel_values"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_runs(dtype):
    model = build().to(dtype)
    with hivtp_transformers.apply(model, budget=100) as handle:
        answer(model, one(), tokens=2)
    assert handle.stats.kept == [100]


def test_siglip_tower():
    """No CLS token, every row averaged, an odd grid, and a feature layer counted from the front."""
    vision = siglip(grid=5, layers=5)
    model = build(vision, vision_feature_select_strategy="full", vision_feature_layer=4)
    inputs = {**batch([prompt(patches=25)]), "pixel_values": photos(1, size=vision.image_size)}
    config = PruneConfig(grid=(5, 5))
    ids, images = inputs["input_ids"][0], list(inputs["pixel_values"])
    expected = reference.answer(model, ids, images, config, layers=(1, 3), rows="all", prefix=0)
    with hivtp_transformers.apply(model, layers=(1, 3)):
        assert torch.equal(answer(model, inputs)[0], expected)


def test_last_hidden_state_as_feature():
    model = build(vision_feature_layer=-1)
    ((ids, images),) = rows_of(one())
    expected = reference.answer(model, ids, images, PruneConfig(), layers=(9,))
    with hivtp_transformers.apply(model, layers=(9,)):
        assert torch.equal(answer(model, one())[0], expected)


def test_calls_in_several_threads_keep_to_their_own_images(model):
    inputs = [three() for _ in range(4)]
    for shift, each in enumerate(inputs):
        each["pixel_values"] = each["pixel_values"].roll(shift, 0)
    with hivtp_transformers.apply(model, budget=128) as handle, torch.no_grad():
        alone = [model(**each).logits for each in inputs]
        with ThreadPoolExecutor(4) as pool:
            # Grad mode is each thread's own.
            run = torch.no_grad()(lambda each: model(**each).logits)
            for _ in range(4):
                for together, expected in zip(pool.map(run, inputs), alone, strict=True):
                    torch.testing.assert_close(together, expected)
        assert handle.stats is not None
