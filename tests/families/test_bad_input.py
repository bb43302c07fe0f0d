"""Every refusal names the argument, its value and what is legal, before any work is done."""

import hivtp_transformers
import pytest
import torch
from tiny_llava import answer, batch, build, configure, one, photos, prompt, siglip, tower_settings
from transformers import (
    DynamicCache,
    InternVLVisionConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaModel,
    PixtralVisionConfig,
)

from hivtp_kernels import PruneConfig
from hivtp_kernels.backends import load


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"config": PruneConfig(), "budget": 100}, ValueError, "config and budget exclude"),
        ({"config": {"budget": 100}}, TypeError, "config must be a .*PruneConfig, got dict"),
        ({"config": PruneConfig(grid=(16, 16))}, ValueError, r"tile \(24, 24\), got \(16, 16\)"),
        ({"budget": 0}, ValueError, "budget must be a positive integer, or a float .*, got 0"),
        ({"budget": 1.5}, ValueError, "budget must be a positive integer"),
        ({"budget": True}, TypeError, "budget must be a positive integer"),
        ({"budget": "half"}, TypeError, "budget must be a positive integer"),
        ({"layers": (6, 7, 9)}, ValueError, r"from 0 to 8 .* got \(6, 7, 9\)"),
        ({"layers": (-1,)}, ValueError, "from 0 to 8"),
        ({"layers": ()}, ValueError, "1 to 8 different integers"),
        ({"layers": (1, 1)}, ValueError, "different integers"),
        ({"layers": 6}, TypeError, "layers must be .* got 6"),
        ({"layers": (1.0,)}, TypeError, "layers must be"),
        ({"rows": "mean"}, ValueError, "rows must be 'cls', 'all' or None, got 'mean'"),
        ({"method": ["hivtp"]}, ValueError, r"method must be one of .*, got \['hivtp'\]"),
        ({"method": "random", "budget": 9, "layers": (1,)}, ValueError, "layers must be None with"),
        ({"method": "uniform", "budget": 9, "rows": "all"}, ValueError, "rows must be None with"),
        ({"backend": "numpy"}, ValueError, "backend must be 'auto' or one of .* got 'numpy'"),
    ],
)
def test_arguments(model, arguments, error, message):
    with pytest.raises(error, match=message):
        hivtp_transformers.apply(model, **arguments)


def test_a_cache_of_another_kind(model):
    inputs = {**one(), "past_key_values": ((torch.zeros(1), torch.zeros(1)),)}
    with hivtp_transformers.apply(model), pytest.raises(TypeError, match="Cache, got a tuple"):
        model(**inputs)


def test_cls_row_of_a_tower_without_cls():
    model = build(siglip(layers=3), vision_feature_select_strategy="full")
    with pytest.raises(ValueError, match="rows must be 'all' or None .* CLS .*siglip"):
        hivtp_transformers.apply(model, rows="cls", layers=(1,))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vision_feature_select_strategy": "full"}, "strategy must be 'default' .* got 'full'"),
        ({"vision_feature_layer": [-2, 12]}, r"10 layers, or a list of them, got \[-2, 12\]"),
        ({"vision_feature_layer": 0}, "vision_feature_layer must name .* 10 layers, .* got 0"),
    ],
)
def test_configurations(changes, message):
    with pytest.raises(ValueError, match=message):
        hivtp_transformers.apply(build(**changes))


def test_vision_towers():
    config = configure(LlavaConfig, InternVLVisionConfig(num_hidden_layers=2))
    with pytest.raises(ValueError, match="clip_vision_model or siglip.*got 'internvl_vision'"):
        hivtp_transformers.token_count(config, [(9, 9)])
    vision = PixtralVisionConfig(**tower_settings(2, side=28))
    with pytest.raises(ValueError, match="clip_vision_model or siglip.*got 'pixtral'"):
        hivtp_transformers.apply(build(vision))


def test_models():
    sizes = dict.fromkeys(("vocab_size", "hidden_size", "intermediate_size"), 8)
    text = LlamaConfig(**sizes, num_hidden_layers=1, num_attention_heads=1)
    with pytest.raises(
        ValueError, match=r"supported type \(.*llava.*\), got 'llama' \(LlamaForCausalLM\)"
    ):
        hivtp_transformers.apply(LlamaForCausalLM(text))
    with pytest.raises(TypeError, match="transformers model of type .*llava.*, got Linear"):
        hivtp_transformers.apply(torch.nn.Linear(1, 1))
    bare = LlavaModel(LlavaConfig(vision_config=siglip(), text_config=text))
    with pytest.raises(TypeError, match="LlavaForConditionalGeneration, got LlavaModel"):
        hivtp_transformers.apply(bare)


def filled_cache():
    cache = DynamicCache()
    cache.update(torch.zeros(1, 2, 3, 16), torch.zeros(1, 2, 3, 16), 0)
    return cache


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"past_key_values": filled_cache()}, "past_key_values must be empty .* cache of 3 tokens"),
        ({"cache": filled_cache()}, "cache must be empty .* cache of 3 tokens"),
        ({"inputs_embeds": torch.zeros(1, 589, 64)}, "inputs_embeds must be None"),
        ({"position_ids": torch.arange(589)[None]}, "position_ids must be None"),
        ({"mm_encoder_outputs": {}}, "mm_encoder_outputs must be None"),
        ({"vision_feature_layer": -3}, "vision_feature_layer must be None"),
        ({"input_ids": None}, "input_ids must be a tensor .* got None"),
        ({"input_ids": prompt()}, r"input_ids must be a tensor .* got \(589,\)"),
        ({"pixel_values": photos(1)[0]}, r"pixel_values must be .* got \(3, 336, 336\)"),
        ({"pixel_values": [photos(1)]}, "pixel_values must be .* got"),
        ({"pixel_values": photos(2)}, r"576 placeholders .* of the 2 images .* got \[576\]"),
        (batch([prompt(patches=575)]), r"576 placeholders .* got \[575\]"),
        (
            {"attention_mask": torch.ones(1, 588)},
            r"attention_mask must be a tensor .* got \(1, 588\)",
        ),
        ({"token_type_ids": torch.zeros(1, 589)}, "token_type_ids has the shape of input_ids"),
    ],
)
def test_inputs(model, refuses, changes, message):
    refuses(model, {**one(), **changes}, message)


def test_placeholders_of_each_row(model):
    """Right in total, wrong by row: transformers itself would take it."""
    rows = [prompt(patches=500), prompt(patches=652)]
    with hivtp_transformers.apply(model), pytest.raises(ValueError, match=r"got \[500, 652\]"):
        answer(model, {**batch(rows), "pixel_values": photos(2)})


def test_generation_settings(model):
    inputs = one()
    with hivtp_transformers.apply(model):
        with pytest.raises(ValueError, match="token_healing must be False"):
            model.generate(**inputs, token_healing=True)
        with pytest.raises(ValueError, match="inputs and input_ids exclude"):
            model.generate(inputs["input_ids"], **inputs)
        with pytest.raises(ValueError, match="logits_to_keep must be an integer"):
            model(**inputs, logits_to_keep=torch.tensor([5]))


def test_missing_backend_is_named(model, monkeypatch):
    monkeypatch.setattr(load("torch"), "unavailable", lambda device, rows=None: "out of order")
    with hivtp_transformers.apply(model, backend="torch"):
        with pytest.raises(RuntimeError, match="backend 'torch' cannot run on cpu: out of order"):
            answer(model, one())
