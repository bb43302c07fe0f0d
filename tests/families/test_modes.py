"""Every way to generate, with every family, against the independent reference, or refused."""

import copy

import hivtp_transformers
import numpy as np
import pytest
import reference
import torch
import torch.nn.functional as F
from miniatures import MINIATURES, arguments
from tiny_llava import (
    IMAGE_TOKEN,
    answer,
    build,
    needs_embeddings,
    needs_features,
    rows_of,
    three,
)
from transformers import LlamaConfig, LlamaForCausalLM, StaticCache

from hivtp_kernels import PruneConfig

pytestmark = pytest.mark.parity

# What transformers would do to the distribution by default.
ALL_TOKENS = {"do_sample": True, "top_k": 0, "top_p": 1.0, "temperature": 1.0}
# Rows of 1, 0 and 2 images.
ROWS = (1, 0, 2)


@pytest.fixture(scope="module", params=MINIATURES)
def mini(request):
    """A tiny model of each family."""
    return MINIATURES[request.param]


@pytest.fixture
def handle(mini):
    with hivtp_transformers.apply(mini.model, **mini.options) as handle:
        yield handle


@pytest.fixture(scope="module")
def three_rows(mini):
    """Inputs, and the embeddings of each row by definition."""
    inputs = mini.inputs(*ROWS)
    return inputs, mini.prompts(inputs)


@pytest.fixture(scope="module")
def expected(mini, three_rows):
    """Greedy answers of the reference to the three rows."""
    return greedy(mini, three_rows[1], tokens=8)


def greedy(mini, prompts, tokens=6):
    return reference.continue_each(mini.model, prompts, tokens)


def test_greedy(mini, handle, three_rows, expected):
    assert torch.equal(answer(mini.model, three_rows[0], tokens=8), expected)


@pytest.mark.parametrize("answers", [1, 2])
def test_sampling(mini, handle, three_rows, answers):
    inputs, prompts = three_rows
    sampled = reference.sample(mini.model, prompts, seed=5, answers=answers)
    assert len(set(map(tuple, sampled.tolist()))) == len(sampled), "answers differ"
    torch.manual_seed(5)
    settings = {**ALL_TOKENS, "num_return_sequences": answers, "max_new_tokens": 6}
    out = mini.model.generate(**inputs, **settings)
    assert torch.equal(out[:, inputs["input_ids"].shape[1] :], sampled)


@pytest.mark.parametrize("answers", [1, 2])
def test_beams(mini, handle, three_rows, answers):
    inputs, prompts = three_rows
    best = [reference.beams(mini.model, prompt, width=3) for prompt in prompts]
    out = answer(mini.model, inputs, num_beams=3, num_return_sequences=answers)
    assert torch.equal(out, torch.cat([b[:answers] for b in best]))


@pytest.mark.parametrize(
    "settings", [{"cache_implementation": "static"}, {"use_cache": False}], ids=["static", "none"]
)
def test_caches(mini, handle, three_rows, expected, settings):
    assert torch.equal(answer(mini.model, three_rows[0], tokens=8, **settings), expected)


def test_cache_of_the_callers(mini, handle, three_rows, expected):
    cache = StaticCache(config=mini.model.config.text_config, max_cache_len=1200)
    out = answer(mini.model, three_rows[0], tokens=8, past_key_values=cache)
    assert torch.equal(out, expected)


def lookup_prompt(mini):
    """A bigram comes back at the prompt's end, so that the very first step has a draft to check."""
    return mini.inputs(1, tail=(31, 41, 59, 26, 31, 41))


def little_llama(mini):
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=512, hidden_size=32, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, max_position_embeddings=8192, pad_token_id=0, eos_token_id=None,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


NEEDS_FEATURES = {
    "prompt_lookup_num_tokens": lambda mini: 3,
    "prefill_chunk_size": lambda mini: 50,
    "assistant_model": little_llama,
}


@needs_features
@pytest.mark.parametrize("name", NEEDS_FEATURES)
def test_drafts_and_chunks(mini, handle, name):
    inputs = lookup_prompt(mini)
    settings = {name: NEEDS_FEATURES[name](mini), "eos_token_id": 511}
    out = answer(mini.model, inputs, **settings)
    assert torch.equal(out, greedy(mini, mini.prompts(inputs)))


@needs_features
@pytest.mark.parametrize("size", [1, 32, 5000])
def test_chunks_of_a_batch(mini, handle, three_rows, expected, size):
    if size == 1:  # hundreds of steps
        inputs = mini.inputs(1)
        out = answer(mini.model, inputs, tokens=2, prefill_chunk_size=1)
        assert torch.equal(out, greedy(mini, mini.prompts(inputs), tokens=2))
        return
    out = answer(mini.model, three_rows[0], tokens=8, prefill_chunk_size=size)
    assert torch.equal(out, expected)


@needs_embeddings
@pytest.mark.parametrize("name", NEEDS_FEATURES)
def test_refused_without_features(mini, monkeypatch, name):
    """Their first step would read placeholders whose images are gone, and answer wrongly."""
    model, one = mini.model, mini.inputs(1)
    settings = {name: NEEDS_FEATURES[name](mini)}
    with hivtp_transformers.apply(model, **mini.options) as handle:
        compact = handle.compact(**one)
        monkeypatch.setattr(handle._pruner.tower, "encode", lambda _: pytest.fail("worked first"))
        for inputs in (one, compact):
            with pytest.raises(ValueError, match=f"{name} must be None .* mm_encoder_outputs"):
                answer(model, inputs, **settings)
    text = lookup_prompt(mini)["input_ids"][:, -10:]
    assert IMAGE_TOKEN not in text
    greedily = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": 511}
    unpruned = model.generate(text, **greedily)
    if name != "prefill_chunk_size":
        greedily |= settings
    with hivtp_transformers.apply(model, **mini.options):
        assert torch.equal(model.generate(text, **greedily), unpruned)


@needs_embeddings
def test_loops_of_others_are_refused_without_features(mini, handle):
    with pytest.raises(ValueError, match="custom_generate must be None"):
        answer(
            mini.model, mini.inputs(1), custom_generate=lambda model, **inputs: pytest.fail("ran")
        )


def test_max_length(mini, handle, three_rows, expected):
    inputs = three_rows[0]
    length = inputs["input_ids"].shape[1]
    out = mini.model.generate(**inputs, max_length=length + 8, do_sample=False)
    assert torch.equal(out[:, length:], expected)


class Heard:
    """A streamer that keeps what it is given."""

    def __init__(self):
        self.parts, self.ended = [], False

    def put(self, value):
        self.parts.append(value.flatten())

    def end(self):
        self.ended = True


def test_streaming(mini, handle):
    """The prompt comes first, as the model gets it: shortened. Then one token after the other."""
    inputs, streamer = mini.inputs(1), Heard()
    out = answer(mini.model, inputs, streamer=streamer)
    short = handle.compact(**inputs)["input_ids"]
    said, *tokens = streamer.parts
    assert torch.equal(said, short[0]) and int((said == IMAGE_TOKEN).sum()) == handle.stats.kept[0]
    assert torch.equal(torch.cat(tokens), out[0]) and streamer.ended
    assert torch.equal(out, greedy(mini, mini.prompts(inputs)))


@pytest.mark.parametrize("rows", [(0, 2, 0), (2, 0, 0)], ids=str)
def test_text_only_rows_around_image_rows(mini, handle, rows):
    inputs = mini.inputs(*rows, seed=2)
    prompts = mini.prompts(inputs)
    assert torch.equal(answer(mini.model, inputs), greedy(mini, prompts))
    beams = answer(mini.model, inputs, num_beams=2)
    best = [reference.beams(mini.model, prompt, width=2)[0] for prompt in prompts]
    assert torch.equal(beams, torch.stack(best))


def test_two_images_in_a_prompt(mini, handle):
    inputs = mini.inputs(2, seed=8)
    assert torch.equal(answer(mini.model, inputs), greedy(mini, mini.prompts(inputs)))
    assert len(handle.stats.kept) == 2 and len(handle.stats.prompt_after) == 1


def test_three_turns(mini, handle):
    """Going on from the cache twice equals reading the whole conversation again."""
    turns = [torch.tensor([[31, 41, 59]]), torch.tensor([[27, 18, 28, 18]])]
    settings = {"do_sample": False, "return_dict_in_generate": True, "max_new_tokens": 4}
    one = mini.inputs(1)
    out = mini.model.generate(**handle.compact(**one), **settings)
    whole = [one["input_ids"], out.sequences[:, -4:]]
    for turn in turns:
        ids = torch.cat([out.sequences, turn], dim=1)
        out = mini.model.generate(ids, past_key_values=out.past_key_values, **settings)
        whole += [turn, out.sequences[:, -4:]]
    ids = torch.cat(whole[:-1], dim=1)
    conversation = {**one, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
    assert torch.equal(out.sequences[:, -4:], greedy(mini, mini.prompts(conversation), tokens=4))


def test_nothing_stays_behind(mini):
    """The handles above took their hooks with them."""
    assert "generate" not in mini.model.__dict__ and not mini.model._forward_pre_hooks


# Of the logits, relative; and of the kept patches, shared with the reference. The tiny tower's
# sharp attention magnifies rounding, so that patches swap at the cut.
TOLERANCE = {torch.float16: (1e-2, 0.9), torch.bfloat16: (5e-2, 0.8)}


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("budget", [None, 100])
def test_half_precision(monkeypatch, dtype, budget):
    inputs, config = three(), PruneConfig(budget=budget)
    inputs["pixel_values"] = inputs["pixel_values"].to(dtype)
    model, (tolerance, shared) = build().to(dtype), TOLERANCE[dtype]
    with hivtp_transformers.apply(model, config) as handle, torch.no_grad():
        out = model(**inputs).logits[:, -1]
        kept = [stage.flatten().nonzero()[:, 0].numpy() for (stage,) in handle.stats.stages]
        answer(model, inputs)
        answer(model, inputs, num_beams=2, cache_implementation="static")
    for patches, image in zip(kept, inputs["pixel_values"], strict=True):
        wanted = set(reference.keep(model, image, config).tolist())
        assert len(wanted & set(patches.tolist())) >= shared * len(wanted)

    left = iter(kept)
    monkeypatch.setattr(reference, "keep", lambda *args, **settings: next(left))
    prompts = [reference.embed(model, ids, i, config)[0] for ids, i in rows_of(inputs)]
    expected = reference.last_logits(model, prompts)([[]] * 3)
    assert (out - expected).float().norm() < tolerance * expected.float().norm()


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("name", [name for name in MINIATURES if name != "llava"])
def test_half_precision_of_the_others(monkeypatch, name, dtype):
    mini, (tolerance, shared) = MINIATURES[name], TOLERANCE[dtype]
    model, image, inputs = copy.deepcopy(mini.model), mini.image_of(mini.size), mini.inputs(1)
    model.to(dtype)
    inputs["pixel_values"] = inputs["pixel_values"].to(dtype)
    budget = len(image.positions) // 5
    with hivtp_transformers.apply(model, budget=budget) as handle, torch.no_grad():
        out = model(**inputs).logits[:, -1]
        answer(model, inputs, num_beams=2, cache_implementation="static")
    stage = np.zeros(1 + max(grid.max() for grid in image.grids))
    for grid, of_grid in zip(image.grids, handle.stats.stages[0], strict=True):
        stage[grid] = of_grid.numpy()
    kept = reference.positions(image, stage)
    ((ids, (own,)),) = mini.rows(inputs)
    wanted = torch.zeros_like(kept)
    wanted[mini.module.keep(model, *arguments(own), budget=budget)] = True
    assert int((kept & wanted).sum()) >= shared * int(wanted.sum()) and int(kept.sum()) == budget

    monkeypatch.setattr(mini.module, "keep", lambda *args, **rule: kept)
    embeddings, _ = mini.module.embed(model, ids, [own])
    expected = reference.last_logits(model, [embeddings])([[]])
    assert (out - expected).float().norm() < tolerance * expected.float().norm()


def test_loss_and_gradient(mini, handle):
    """Of text alone, whose first token nothing predicts, in rows that are padded."""
    inputs = mini.inputs(1, 2, seed=1)
    mask = inputs["attention_mask"]
    labels = inputs["input_ids"].masked_fill(inputs["input_ids"] == IMAGE_TOKEN, -100)
    labels = labels.masked_fill((mask.cumsum(1) == 1) | (mask == 0), -100)
    weight = mini.model.model.multi_modal_projector.linear_1.weight

    losses = []
    for row, (ids, images) in enumerate(mini.rows(inputs)):
        embeddings, kept = mini.module.embed(mini.model, ids, images, **mini.options)
        targets = labels[row][mask[row] == 1][kept][1:]
        logits = reference.logits(mini.model, embeddings)[:-1]
        losses.append(F.cross_entropy(logits, targets, reduction="none")[targets >= 0])
    loss = mini.model(**inputs, labels=labels).loss
    torch.testing.assert_close(loss, torch.cat(losses).mean(), rtol=1e-4, atol=1e-5)
    (gradient,) = torch.autograd.grad(loss, weight)
    assert gradient.abs().sum() > 0
