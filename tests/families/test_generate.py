"""`generate` with pruning against the independent reference, and what it returns."""

import hivtp_transformers
import pytest
import reference
import torch
from tiny_llava import IMAGE_TOKEN, answer, batch, one, photos, prompt, rows_of, three
from transformers import GenerationConfig

from hivtp_kernels import PruneConfig


@pytest.mark.parametrize("rows", ["cls", "all"])
@pytest.mark.parametrize("budget", [None, 100])
@pytest.mark.parametrize("inputs", [one(), three()], ids=["one", "three"])
def test_greedy_equals_reference(model, inputs, rows, budget):
    config = PruneConfig(budget=budget)
    expected = [
        reference.answer(model, ids, images, config, rows=rows) for ids, images in rows_of(inputs)
    ]
    with hivtp_transformers.apply(model, config, rows=rows) as handle:
        assert torch.equal(answer(model, inputs), torch.stack(expected))
    kept = [
        len(reference.keep(model, image, config, rows=rows)) for image in inputs["pixel_values"]
    ]
    assert handle.stats.kept == kept
    if budget is None and len(kept) > 1:
        assert len(set(kept)) > 1, "choose another seed: counts must differ to prove anything"


def test_backends(model, backend):
    ((ids, images),) = rows_of(one())
    expected = reference.answer(model, ids, images, PruneConfig())
    with hivtp_transformers.apply(model, backend=backend):
        assert torch.equal(answer(model, one())[0], expected)


def test_pruning_and_image_change_the_answer(model):
    """Otherwise the parity above would prove nothing."""
    unpruned = answer(model, one())
    with hivtp_transformers.apply(model):
        pruned = answer(model, one())
        other = answer(model, {**one(), "pixel_values": photos(1, seed=7)})
    assert not torch.equal(unpruned, pruned)
    assert not torch.equal(other, pruned)


@pytest.mark.parametrize("layers", [(0,), (8, 2)])
def test_layers(model, layers):
    (ids, images), *_ = rows_of(one())
    expected = reference.answer(model, ids, images, PruneConfig(), layers=layers)
    with hivtp_transformers.apply(model, layers=layers):
        assert torch.equal(answer(model, one())[0], expected)


def test_sequences_start_with_own_prompt(model):
    inputs = three()
    with hivtp_transformers.apply(model):
        out = model.generate(**inputs, max_new_tokens=4, do_sample=False)
        beams = model.generate(
            **inputs,
            max_new_tokens=4,
            num_beams=3,
            num_return_sequences=2,
            return_dict_in_generate=True,
        ).sequences
    own = inputs["input_ids"]
    assert torch.equal(out[:, :-4], own)
    assert torch.equal(beams[:, :-4], own.repeat_interleave(2, dim=0))


def test_beams_equal_rows_by_themselves(model):
    """transformers repeats the images of a row for its beams, and tells rows by kept counts."""
    with hivtp_transformers.apply(model):
        together = answer(model, three(), num_beams=3)
        for row, (ids, images) in zip(together, rows_of(three()), strict=True):
            alone = {**batch([ids]), "pixel_values": torch.stack(images)}
            assert torch.equal(answer(model, alone, num_beams=3)[0], row)


@pytest.mark.parametrize("how", ["argument", "config", "model"])
def test_max_length_counts_own_prompt(model, monkeypatch, how):
    inputs = one()
    length = inputs["input_ids"].shape[1] + 3
    settings = {"argument": {"max_length": length}}.get(how, {})
    if how == "config":
        settings = {"generation_config": GenerationConfig(max_length=length)}
    if how == "model":
        monkeypatch.setattr(model.generation_config, "max_length", length)
    with hivtp_transformers.apply(model):
        assert model.generate(**inputs, **settings).shape[1] == length
    if how == "config":
        assert settings["generation_config"].max_length == length


def test_min_length_counts_own_prompt(model):
    inputs = one()
    with hivtp_transformers.apply(model):
        (first, *_) = answer(model, inputs)[0].tolist()
        inputs["eos_token_id"], inputs["pad_token_id"] = first, 0
        length = inputs["input_ids"].shape[1]
        stopped = model.generate(**inputs, max_new_tokens=5, do_sample=False)
        forced = model.generate(**inputs, min_length=length + 3, max_new_tokens=5, do_sample=False)
    assert stopped.shape[1] == length + 1
    assert first not in forced[0, length : length + 3]


def test_padding_without_a_mask_is_inferred_as_generate_does(model):
    inputs = three()
    with hivtp_transformers.apply(model):
        expected = answer(model, inputs)
        del inputs["attention_mask"]
        assert torch.equal(answer(model, inputs), expected)


def test_prompt_as_positional_argument(model):
    inputs = one()
    with hivtp_transformers.apply(model):
        expected = answer(model, inputs)
        ids = inputs.pop("input_ids")
        out = model.generate(ids, **inputs, max_new_tokens=6, do_sample=False)
    assert torch.equal(out[:, ids.shape[1] :], expected)


def test_row_without_an_image(model):
    rows = [prompt(1), prompt(0, before=30, seed=4)]
    inputs = {**batch(rows), "pixel_values": photos(1)}
    expected = [reference.answer(model, ids, i, PruneConfig()) for ids, i in rows_of(inputs)]
    with hivtp_transformers.apply(model):
        assert torch.equal(answer(model, inputs), torch.stack(expected))


def test_text_only_passes_through(model, monkeypatch):
    inputs = batch([prompt(0, before=12)])
    expected = answer(model, inputs)
    with hivtp_transformers.apply(model) as handle:
        monkeypatch.setattr(handle._pruner, "prune", None)
        assert torch.equal(answer(model, inputs), expected)
        model(**inputs, pixel_values=None)
        assert handle.stats is None
        assert handle.compact(**inputs) == inputs


def test_multi_turn_through_compact(model):
    """Going on from the cache equals reading the whole conversation again."""
    question = torch.tensor([[31, 41, 59, 26]])
    config = PruneConfig()
    with hivtp_transformers.apply(model, config) as handle:
        first = model.generate(
            **handle.compact(**one()),
            max_new_tokens=4,
            do_sample=False,
            return_dict_in_generate=True,
        )
        ids = torch.cat([first.sequences, question], dim=1)
        second = model.generate(
            ids, past_key_values=first.past_key_values, max_new_tokens=6, do_sample=False
        )
    said = first.sequences[0, -4:]
    assert int((first.sequences == IMAGE_TOKEN).sum()) == handle.stats.kept[0]
    whole = torch.cat([one()["input_ids"][0], said, question[0]])
    expected = reference.answer(model, whole, list(one()["pixel_values"]), config)
    assert torch.equal(second[0, ids.shape[1] :], expected)
