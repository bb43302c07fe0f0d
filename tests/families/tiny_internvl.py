"""Tiny InternVL models with seeded weights, inputs for them, and pruning from its definition."""

import copy
import itertools
import math

import numpy as np
import reference
import torch
from tiny_llava import (
    IMAGE_TOKEN,
    PAD_TOKEN,
    PATCH,
    VOCABULARY,
    batch,
    photos,
    rows_with,
    seed_weights,
    texts_around,
)
from transformers import (
    GotOcr2ImageProcessor,
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLProcessor,
    InternVLVisionConfig,
    Qwen2Config,
)


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


def processor(model, most=6):
    """The real processor, but for its tokenizer and what needs torchvision; up to `most` tiles."""
    height, width = model.config.vision_config.image_size
    made = InternVLProcessor.__new__(InternVLProcessor)
    made.image_seq_length = tokens_of(model)
    made.image_processor = GotOcr2ImageProcessor(
        size={"height": height, "width": width}, max_patches=most
    )
    return made


def count_of(model, size, most=6):
    """Tiles of an image: of the closest aspect ratio, and a small copy if they are several."""
    (height, width), side = size, model.config.vision_config.image_size[0]
    shapes = [(x, y) for x in range(1, most + 1) for y in range(1, most + 1) if x * y <= most]
    best, least = (1, 1), math.inf
    for columns, rows in sorted(shapes, key=math.prod):
        difference = abs(width / height - columns / rows)
        large = height * width > 0.5 * side * side * columns * rows
        if difference < least or (difference == least and large):
            best, least = (columns, rows), difference
    return 1 if best == (1, 1) else 1 + math.prod(best)


def inputs_of(model, *rows, side="left", seed=0):
    """Inputs of rows of images, each given by how many tiles it has."""
    counts = [[tiles * tokens_of(model) for tiles in row] for row in rows]
    inputs = batch(texts_around(counts, seed), side)
    if tiles := sum(sum(row) for row in rows):
        size = model.config.vision_config.image_size[0]
        inputs["pixel_values"] = photos(tiles, seed=seed, size=size)
    return inputs


def rows_of(model, inputs):
    """Ids of each row without padding, and its images `[tiles, 3, side, side]`.

    An image is a run of placeholders.
    """
    rows = [
        [len(list(run)) for visual, run in itertools.groupby(ids == IMAGE_TOKEN) if visual]
        for ids in inputs["input_ids"]
    ]
    runs = [run for row in rows for run in row]
    tiles = inputs.get("pixel_values", torch.empty(0))
    images = tiles.split([run // tokens_of(model) for run in runs])
    return rows_with(inputs, images, runs)


def image_of(model, count):
    """An image of so many tiles."""
    side = math.isqrt(tokens_of(model))
    units = np.arange(count * side * side)
    return reference.Image(units, list(units.reshape(count, side, side)))


@torch.no_grad()
def importance(model, tiles, layers=None, rows="cls"):
    """fp64 `[units]`: the mean of what a token's four patches receive in the eager tower's maps."""
    tower = copy.deepcopy(model.model.vision_tower)
    tower.set_attn_implementation("eager")
    maps = []
    for layer in reference.middle(model) if layers is None else layers:
        attention = tower.encoder.layer[layer].attention
        attention.register_forward_hook(lambda _, __, out: maps.append(out[1].double().numpy()))
    tower(tiles)
    average = np.mean(maps, axis=(0, 2))
    received = (average[:, 0] if rows == "cls" else average.mean(1))[:, 1:]
    side = math.isqrt(received.shape[1])
    squares = received.reshape(len(tiles), side, side)
    pooled = np.zeros((len(tiles), side // 2, side // 2))
    for y in range(side):
        for x in range(side):
            pooled[:, y // 2, x // 2] += squares[:, y, x] / 4
    return pooled.flatten()


def keep(model, tiles, config=None, budget=None, **scoring):
    """bool `[positions]` of one image."""
    image, scores = image_of(model, len(tiles)), importance(model, tiles, **scoring)
    return reference.positions(image, reference.stages(image, scores, config, budget))


def features(model, tiles):
    """`[positions, C]` of one image, unpruned."""
    encoded = model.model.get_image_features(tiles)
    return getattr(encoded, "pooler_output", encoded).flatten(0, 1)


@torch.no_grad()
def embed(model, ids, images, config=None, **rule):
    """Embeddings `[1, T', C]` of a row after pruning, and which of its tokens they are."""
    unpruned = [features(model, tiles) for tiles in images]
    kept = [keep(model, tiles, config, **rule) for tiles in images]
    return reference.splice(model, ids, unpruned, kept)
