"""Every way to generate, against the independent reference, or refused before any work."""

import hivtp_llava
import llava_reference as reference
import pytest
import torch
from tiny_llava import (
    IMAGE_TOKEN,
    TAKES_FEATURES,
    answer,
    batch,
    build,
    one,
    photos,
    prompt,
    rows_of,
    three,
    where,
)
from transformers import LlamaForCausalLM, StaticCache

from hivtp_kernels import PruneConfig

# What transformers would do to the distribution by default.
ALL_TOKENS = {"do_sample": True, "top_k": 0, "top_p": 1.0, "temperature": 1.0}


def greedy(model, inputs, tokens=6):
    config = PruneConfig()
    return torch.stack(
        [reference.answer(model, ids, i, config, tokens) for ids, i in rows_of(inputs)]
    )


@pytest.fixture(scope="module")
def expected(seeded_model):
    """Greedy answers of the reference to `three()`."""
    return greedy(seeded_model, three(), tokens=8)


@pytest.mark.parametrize("answers", [1, 2])
@pytest.mark.parametrize("inputs", [one(), three()], ids=["one", "three"])
def test_sampling(model, inputs, answers):
    sampled = reference.sample(model, rows_of(inputs), PruneConfig(), seed=5, answers=answers)
    assert len(set(map(tuple, sampled.tolist()))) == len(sampled), "answers differ"
    with hivtp_llava.apply(model):
        torch.manual_seed(5)
        settings = {**ALL_TOKENS, "num_return_sequences": answers, "max_new_tokens": 6}
        out = model.generate(**inputs, **settings)
    assert torch.equal(out[:, inputs["input_ids"].shape[1] :], sampled)


@pytest.mark.parametrize("answers", [1, 2])
@pytest.mark.parametrize("inputs", [one(), three()], ids=["one", "three"])
def test_beams(model, inputs, answers):
    best = [reference.beams(model, row, PruneConfig(), width=3) for row in rows_of(inputs)]
    with hivtp_llava.apply(model):
        out = answer(model, inputs, num_beams=3, num_return_sequences=answers)
    assert torch.equal(out, torch.cat([b[:answers] for b in best]))


@pytest.mark.parametrize(
    "settings",
    [{}, {"cache_implementation": "static"}, {"use_cache": False}],
    ids=["dynamic", "static", "none"],
)
def test_caches(model, expected, settings):
    with hivtp_llava.apply(model):
        assert torch.equal(answer(model, three(), tokens=8, **settings), expected)


def test_cache_of_the_callers(model, expected):
    with hivtp_llava.apply(model):
        cache = StaticCache(config=model.config.text_config, max_cache_len=1200)
        assert torch.equal(answer(model, three(), tokens=8, past_key_values=cache), expected)


def lookup_prompt():
    """A bigram comes back at the prompt's end, so that the very first step has a draft to check."""
    text = torch.tensor([31, 41, 59, 26, 31, 41])
    return {**batch([torch.cat([prompt(), text])]), "pixel_values": photos(1)}


def little_llama(model):
    torch.manual_seed(3)
    return LlamaForCausalLM(model.config.text_config).eval()


NEEDS_FEATURES = {
    "prompt_lookup_num_tokens": lambda model: 3,
    "prefill_chunk_size": lambda model: 100,
    "assistant_model": little_llama,
}


@where(TAKES_FEATURES)
@pytest.mark.parametrize("name", NEEDS_FEATURES)
def test_drafts_and_chunks(model, name):
    inputs = lookup_prompt()
    settings = {name: NEEDS_FEATURES[name](model), "eos_token_id": 511}
    with hivtp_llava.apply(model):
        assert torch.equal(answer(model, inputs, **settings), greedy(model, inputs))


@where(TAKES_FEATURES)
@pytest.mark.parametrize("size", [1, 288, 5000])
def test_chunks_of_a_batch(model, expected, size):
    with hivtp_llava.apply(model):
        out = answer(model, three(), tokens=8, prefill_chunk_size=size)
        assert torch.equal(out, expected)


@where(not TAKES_FEATURES)
@pytest.mark.parametrize("name", NEEDS_FEATURES)
def test_refused_without_features(model, monkeypatch, name):
    """Their first step would read placeholders whose images are gone, and answer wrongly."""
    settings = {name: NEEDS_FEATURES[name](model)}
    with hivtp_llava.apply(model) as handle:
        compact = handle.compact(**one())
        monkeypatch.setattr(handle._pruner.tower, "encode", lambda _: pytest.fail("worked first"))
        for inputs in (one(), compact):
            with pytest.raises(ValueError, match=f"{name} must be None .* mm_encoder_outputs"):
                answer(model, inputs, **settings)
    text = lookup_prompt()["input_ids"][:, -20:]
    greedily = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": 511}
    expected = model.generate(text, **greedily)
    if name != "prefill_chunk_size":
        greedily |= settings
    with hivtp_llava.apply(model):
        assert torch.equal(model.generate(text, **greedily), expected)


def test_max_length(model, expected):
    inputs = three()
    length = inputs["input_ids"].shape[1]
    with hivtp_llava.apply(model):
        out = model.generate(**inputs, max_length=length + 8, do_sample=False)
    assert torch.equal(out[:, length:], expected)


@where(not TAKES_FEATURES)
def test_loops_of_others_are_refused_without_features(model):
    with hivtp_llava.apply(model), pytest.raises(ValueError, match="custom_generate must be None"):
        answer(model, one(), custom_generate=lambda model, **inputs: pytest.fail("ran"))


class Heard:
    """A streamer that keeps what it is given."""

    def __init__(self):
        self.parts, self.ended = [], False

    def put(self, value):
        self.parts.append(value.flatten())

    def end(self):
        self.ended = True


def test_streaming(model):
    """The prompt comes first, as the model gets it: shortened. Then one token after the other."""
    inputs, streamer = one(), Heard()
    with hivtp_llava.apply(model) as handle:
        out = answer(model, inputs, streamer=streamer)
        short = handle.compact(**inputs)["input_ids"]
    said, *tokens = streamer.parts
    assert torch.equal(said, short[0]) and int((said == IMAGE_TOKEN).sum()) == handle.stats.kept[0]
    assert torch.equal(torch.cat(tokens), out[0]) and streamer.ended
    assert torch.equal(out, greedy(model, inputs))


@pytest.mark.parametrize("image_row", [0, 1])
def test_text_only_rows_between_image_rows(model, image_row):
    rows = [prompt(1), prompt(0, before=30, seed=4), prompt(2, seed=6)]
    rows = rows if image_row == 0 else [rows[1], rows[2], rows[1]]
    images = sum(int((row == IMAGE_TOKEN).sum()) // 576 for row in rows)
    inputs = {**batch(rows), "pixel_values": photos(images, seed=2)}
    with hivtp_llava.apply(model):
        assert torch.equal(answer(model, inputs), greedy(model, inputs))
        beams = answer(model, inputs, num_beams=2)
    expected = [reference.beams(model, row, PruneConfig(), width=2)[0] for row in rows_of(inputs)]
    assert torch.equal(beams, torch.stack(expected))


def test_two_images_in_a_prompt(model):
    inputs = {**batch([prompt(2, seed=8)]), "pixel_values": photos(2, seed=3)}
    with hivtp_llava.apply(model) as handle:
        assert torch.equal(answer(model, inputs), greedy(model, inputs))
    assert len(handle.stats.kept) == 2 and len(handle.stats.prompt_after) == 1


def test_three_turns(model):
    """Going on from the cache twice equals reading the whole conversation again."""
    turns = [torch.tensor([[31, 41, 59]]), torch.tensor([[27, 18, 28, 18]])]
    settings = {"do_sample": False, "return_dict_in_generate": True, "max_new_tokens": 4}
    with hivtp_llava.apply(model) as handle:
        out = model.generate(**handle.compact(**one()), **settings)
        whole = [one()["input_ids"], out.sequences[:, -4:]]
        for turn in turns:
            ids = torch.cat([out.sequences, turn], dim=1)
            out = model.generate(ids, past_key_values=out.past_key_values, **settings)
            whole += [turn, out.sequences[:, -4:]]
    conversation = {
        "input_ids": torch.cat(whole[:-1], dim=1),
        "pixel_values": one()["pixel_values"],
    }
    conversation["attention_mask"] = torch.ones_like(conversation["input_ids"])
    assert torch.equal(out.sequences[:, -4:], greedy(model, conversation, tokens=4))


# Of the logits, relative; and of the kept patches, shared with the reference. The tiny tower's
# sharp attention magnifies rounding, so that patches swap at the cut.
TOLERANCE = {torch.float16: (1e-2, 0.9), torch.bfloat16: (5e-2, 0.8)}


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("budget", [None, 100])
def test_half_precision(monkeypatch, dtype, budget):
    inputs, config = three(), PruneConfig(budget=budget)
    inputs["pixel_values"] = inputs["pixel_values"].to(dtype)
    model, (tolerance, shared) = build().to(dtype), TOLERANCE[dtype]
    with hivtp_llava.apply(model, config) as handle, torch.no_grad():
        out = model(**inputs).logits[:, -1]
        indices, counts, *_ = handle.stats.selection
        answer(model, inputs)
        answer(model, inputs, num_beams=2, cache_implementation="static")
    kept = [row[:count].numpy() for row, count in zip(indices, counts.tolist(), strict=True)]
    for patches, image in zip(kept, inputs["pixel_values"], strict=True):
        wanted = set(reference.keep(model, image, config).tolist())
        assert len(wanted & set(patches.tolist())) >= shared * len(wanted)

    left = iter(kept)
    monkeypatch.setattr(reference, "keep", lambda *args, **settings: next(left))
    expected = reference.last_logits(model, rows_of(inputs), config)([[]] * 3)
    assert (out - expected).float().norm() < tolerance * expected.float().norm()
