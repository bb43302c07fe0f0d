"""Tiny InternVL models with seeded weights, inputs for them, and pruning from its definition."""

import copy

import numpy as np
import oracle
import torch
from tiny_llava import IMAGE_TOKEN, PAD_TOKEN, VOCABULARY, batch, photos, prompt, seed_weights
from transformers import (
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLVisionConfig,
    Qwen2Config,
)

PATCH = 14


def build(seed=0, grid=12, layers=10, **vision):
    """A tower of `grid` x `grid` patches, which is a quarter as many tokens."""
    vision_config = InternVLVisionConfig(
        hidden_size=64, intermediate_size=64, num_hidden_layers=layers, num_attention_heads=4,
        image_size=(PATCH * grid,) * 2, patch_size=(PATCH, PATCH), **vision,
    )  # fmt: skip
    text = Qwen2Config(
        vocab_size=VOCABULARY, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=4096,
        pad_token_id=PAD_TOKEN, eos_token_id=None, bos_token_id=1, tie_word_embeddings=False,
    )  # fmt: skip
    config = InternVLConfig(
        vision_config=vision_config, text_config=text, image_token_id=IMAGE_TOKEN,
        image_seq_length=grid * grid // 4, tie_word_embeddings=False,
    )  # fmt: skip
    model = seed_weights(InternVLForConditionalGeneration(config).eval(), seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lambda" in name:  # else a layer adds next to nothing
                weight.fill_(0.7)
            elif "q_norm" in name or "k_norm" in name:
                weight.copy_(1 + torch.rand(weight.shape, generator=generator))
            elif "cls_token" in name:
                weight.copy_(torch.randn(weight.shape, generator=generator))
    return model


def tokens_of(model):
    """Visual tokens of a tile."""
    side = model.config.vision_config.image_size[0] // PATCH
    return side * side // 4


def inputs_of(model, *tiles, side="left", seed=0):
    """A row for each number of tiles."""
    size = model.config.vision_config.image_size[0]
    rows = [
        prompt(count, before=3 + 4 * i, seed=seed + i, patches=tokens_of(model))
        for i, count in enumerate(tiles)
    ]
    inputs = batch(rows, side)
    if sum(tiles):
        inputs["pixel_values"] = photos(sum(tiles), seed=seed, size=size)
    return inputs


def rows_of(model, inputs):
    """Ids of each row without padding, and its tiles."""
    left = iter(inputs.get("pixel_values", ()))
    for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True):
        ids = ids[mask.bool()]
        yield ids, [next(left) for _ in range(int((ids == IMAGE_TOKEN).sum()) // tokens_of(model))]


@torch.no_grad()
def importance(model, tile, layers, rows):
    """fp64 `[N]`: what the four patches of a token receive, from the maps of the eager tower."""
    tower = copy.deepcopy(model.model.vision_tower)
    tower.set_attn_implementation("eager")
    maps = []
    for layer in layers:
        attention = tower.encoder.layer[layer].attention
        attention.register_forward_hook(lambda _, __, out: maps.append(out[1].double().numpy()))
    tower(tile[None])
    average = np.mean(maps, axis=0)[0].mean(0)
    received = (average[0] if rows == "cls" else average.mean(0))[1:]
    side = int(len(received) ** 0.5)
    square = received.reshape(side, side)
    pooled = np.zeros((side // 2, side // 2))
    for y in range(side):
        for x in range(side):
            pooled[y // 2, x // 2] += square[y, x]
    return pooled.flatten()


def keep(model, tile, config, layers=(6, 7, 8), rows="cls"):
    """bool `[N]`."""
    return torch.from_numpy(oracle.select(importance(model, tile, layers, rows), config) > 0)


@torch.no_grad()
def embed(model, ids, tiles, config, **scoring):
    """Embeddings `[1, T', C]` of a row after pruning, and which of its tokens they are."""
    kept_token = ids != IMAGE_TOKEN
    embeddings = model.get_input_embeddings()(torch.where(kept_token, ids, 0))
    places = (~kept_token).nonzero().view(len(tiles), -1) if tiles else []
    for tile, here in zip(tiles, places, strict=True):
        encoded = model.model.get_image_features(tile[None])
        (features,) = getattr(encoded, "pooler_output", encoded)
        embeddings = embeddings.index_put((here,), features)
        kept_token[here] = keep(model, tile, config, **scoring)
    return embeddings[kept_token][None], kept_token
