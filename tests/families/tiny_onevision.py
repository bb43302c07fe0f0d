"""Tiny LLaVA-OneVision models with seeded weights, inputs, and pruning from its definition.

Tiles, stitching, cutting, resizing and budgets are written here as plain loops.
"""

import copy
import math
from fractions import Fraction

import numpy as np
import oracle
import torch
from tiny_llava import IMAGE_TOKEN, batch, configure, photos, prompt, seed_weights
from transformers import (
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    SiglipVisionConfig,
)

from hivtp_kernels import PruneConfig

LAYERS = (2, 3, 4)
MOST = 4096  # patches of a grid that is selected from at once


def build(seed=0, grid=9, tiles=3, most=4):
    """Tiles of `grid` x `grid` patches, up to `tiles` a side, resized to as many as `most` hold."""
    side = 14 * grid + 6  # as in the real tower, some pixels are left over
    vision = SiglipVisionConfig(
        hidden_size=64, intermediate_size=64, num_hidden_layers=6, num_attention_heads=4,
        image_size=side, patch_size=14, vision_use_head=False,
    )  # fmt: skip
    pinpoints = [
        [side * rows, side * columns]
        for rows in range(1, tiles + 1)
        for columns in range(1, tiles + 1)
    ]
    config = configure(
        LlavaOnevisionConfig, vision, image_grid_pinpoints=pinpoints, video_token_index=501,
        vision_aspect_ratio=f"anyres_max_{most}",
    )  # fmt: skip
    return seed_weights(LlavaOnevisionForConditionalGeneration(config).eval(), seed)


def grid_of(model):
    return model.config.vision_config.image_size // 14


def tiles_of(model, size):
    """Rows and columns of tiles: the resolution that shows most of the image and wastes least."""
    height, width = size

    def fit(resolution):
        scale = min(resolution[0] / height, resolution[1] / width)
        shown = min(int(height * scale) * int(width * scale), height * width)
        return shown, shown - resolution[0] * resolution[1]

    side = model.config.vision_config.image_size
    rows, columns = max(model.config.image_grid_pinpoints, key=fit)
    return rows // side, columns // side


def stitch(model, tiles, size):
    """What the large image shows, `[rows, columns, C]`, of tiles `[n, patches, C]`."""
    grid, (tile_rows, tile_columns) = grid_of(model), tiles_of(model, size)
    rows, columns = grid * tile_rows, grid * tile_columns
    out = torch.empty(rows, columns, tiles.shape[2], dtype=tiles.dtype)
    for y in range(rows):
        for x in range(columns):
            tile = y // grid * tile_columns + x // grid
            out[y, x] = tiles[1 + tile, y % grid * grid + x % grid]
    (height, width), top, left = size, 0, 0
    if width / height > columns / rows:
        top = (rows - int(round(height * columns / width, 7))) // 2
    else:
        left = (columns - int(round(width * rows / height, 7))) // 2
    return out[top : rows - top, left : columns - left]


def resize(model, values):
    """To fewer rows and columns, where they are too many: bilinear, pixel centres aligned."""
    rows, columns, _ = values.shape
    most = int(model.config.vision_aspect_ratio.removeprefix("anyres_max_"))
    ratio = math.sqrt(rows * columns / (most * grid_of(model) ** 2))
    if ratio <= 1.1:
        return values
    new = int(rows // ratio), int(columns // ratio)

    def weights(old, count):
        matrix = torch.zeros(count, old, dtype=torch.float64)
        for i in range(count):
            place = max((i + 0.5) * old / count - 0.5, 0.0)
            low = int(place)
            matrix[i, low] += 1 - (place - low)
            matrix[i, min(low + 1, old - 1)] += place - low
        return matrix

    down, across = weights(rows, new[0]), weights(columns, new[1])
    return torch.einsum("yr,xc,rcd->yxd", down, across, values.double()).to(values.dtype)


def grids_of(model, tiles, size):
    """The grids of an image `[rows, columns, C]`: its base tile and what else there is."""
    grid = grid_of(model)
    base = tiles[0].view(grid, grid, -1)
    return [base] if len(tiles) == 1 else [base, resize(model, stitch(model, tiles, size))]


def halves(values):
    if values.shape[0] * values.shape[1] <= MOST:
        return [values]
    dim = 0 if values.shape[0] >= values.shape[1] else 1
    return [part for half in torch.tensor_split(values, 2, dim=dim) for part in halves(half)]


def stages(scores, grids_shapes, config, budget, newlines, keep_newlines):
    """The stage of each cell of each grid, from scores of each."""
    sizes = [rows * columns for rows, columns in grids_shapes]
    if budget is None:
        configs = [
            PruneConfig(
                grid=shape, ratio=config.ratio,
                regions=tuple(map(min, config.regions, shape)),
                window=tuple(map(min, config.window, shape)),
            )
            for shape in grids_shapes
        ]  # fmt: skip
        return [oracle.select(s, c) for s, c in zip(scores, configs, strict=True)]
    newlines = newlines if keep_newlines else 0
    if isinstance(budget, float):
        budget = int(budget * (sum(sizes) + newlines))
    if budget >= sum(sizes) + newlines:
        return [np.ones(size) for size in sizes]
    count = budget - newlines
    first = math.floor(Fraction(count * sizes[0], sum(sizes)) + Fraction(1, 2))
    exact = [Fraction((count - first) * size, max(sum(sizes[1:]), 1)) for size in sizes[1:]]
    shares = [math.floor(share) for share in exact]
    while first + sum(shares) < count:
        left = [e - s for e, s in zip(exact, shares, strict=True)]
        # Who got one has a negative remainder.
        shares[left.index(max(left))] += 1
    return [
        np.ones(len(s)) if share == len(s) else oracle.select(s, PruneConfig(shape, budget=share))
        for s, shape, share in zip(scores, grids_shapes, [first, *shares], strict=True)
    ]


@torch.no_grad()
def importance(model, tiles):
    """fp64 `[n, patches]`: mean over rows, heads and layers of the eager tower's maps."""
    tower = copy.deepcopy(model.model.vision_tower)
    tower.set_attn_implementation("eager")
    attentions = tower(tiles, output_attentions=True).attentions
    return torch.stack([attentions[layer].double() for layer in LAYERS]).mean((0, 2, 3))


def keep(model, tiles, size, config=None, budget=None, newline="keep"):
    """bool `[positions]` of one image."""
    grids = grids_of(model, importance(model, tiles)[..., None], size)
    parts = [halves(grid) for grid in grids]
    flat = [part for of_grid in parts for part in of_grid]
    rows = 1 if len(grids) == 1 else grids[1].shape[0]
    kept = stages(
        [part.flatten().numpy() for part in flat], [tuple(part.shape[:2]) for part in flat],
        config, budget, rows, newline == "keep",
    )  # fmt: skip
    kept = iter([torch.tensor(k > 0).view(p.shape[:2]) for k, p in zip(kept, flat, strict=True)])
    (base,) = [next(kept) for _ in parts[0]]
    own = torch.tensor([newline == "keep"])
    if len(grids) == 1:
        return torch.cat([base.flatten(), own])
    whole = torch.zeros(grids[1].shape[:2], dtype=torch.bool)
    numbers = torch.arange(whole.numel()).view(whole.shape)
    for part in halves(numbers[..., None]):
        whole.view(-1)[part.flatten()] = next(kept).flatten()
    return torch.cat([base.flatten(), torch.cat([whole, own.expand(rows, 1)], dim=1).flatten()])


@torch.no_grad()
def features(model, tiles, size):
    """`[positions, C]` of one image, unpruned."""
    states = model.model.vision_tower(tiles, output_hidden_states=True).hidden_states[-1]
    grids = grids_of(model, model.model.multi_modal_projector(states), size)
    newline = model.model.image_newline
    if len(grids) == 1:
        return torch.cat([grids[0].flatten(0, 1), newline[None]])
    ends = newline.expand(grids[1].shape[0], 1, -1)
    return torch.cat([grids[0].flatten(0, 1), torch.cat([grids[1], ends], dim=1).flatten(0, 1)])


def inputs_of(model, *rows, side="left", seed=0):
    """Inputs of rows of image sizes; several images of a row are a tile each."""
    tile = model.config.vision_config.image_size
    images = [(size, len(row)) for row in rows for size in row]
    counts = [1 if several > 1 else 1 + math.prod(tiles_of(model, s)) for s, several in images]
    pixels = torch.full((len(images), max(counts), 3, tile, tile), float("nan"))
    positions = []
    for number, ((size, _), count) in enumerate(zip(images, counts, strict=True)):
        pixels[number, :count] = photos(count, seed=10 * seed + number, size=tile)
        positions.append(len(features(model, pixels[number, :count], size)))
    room, prompts = iter(positions), []
    for number, row in enumerate(rows):
        parts = [prompt(0, before=3 + 4 * number, seed=seed + number)]
        for _ in row:
            parts.append(prompt(1, before=2, after=5, seed=seed + number, patches=next(room)))
        prompts.append(torch.cat(parts))
    return {
        **batch(prompts, side),
        "pixel_values": pixels,
        "image_sizes": torch.tensor([size for size, _ in images]),
        "batch_num_images": torch.tensor([len(row) for row in rows if row]),
    }


def rows_of(model, inputs):
    """Ids of each row without padding, and its images: tiles and size."""
    together = [n for n in inputs["batch_num_images"].tolist() for _ in range(n)]
    images = []
    for pixels, size, several in zip(
        inputs["pixel_values"], inputs["image_sizes"].tolist(), together, strict=True
    ):
        count = 1 if several > 1 else 1 + math.prod(tiles_of(model, size))
        images.append((pixels[:count], tuple(size)))
    left = iter(images)
    for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True):
        ids = ids[mask.bool()]
        room, own = int((ids == IMAGE_TOKEN).sum()), []
        while room:
            own.append(next(left))
            room -= len(features(model, *own[-1]))
        yield ids, own


@torch.no_grad()
def embed(model, ids, images, **rule):
    """Embeddings `[1, T', C]` of a row after pruning, and which of its tokens they are."""
    kept_token = ids != IMAGE_TOKEN
    places = (~kept_token).nonzero().flatten()
    embeddings = model.get_input_embeddings()(torch.where(kept_token, ids, 0))
    if images:
        rows = torch.cat([features(model, *image) for image in images])
        embeddings = embeddings.index_put((places,), rows)
        kept_token[places] = torch.cat([keep(model, *image, **rule) for image in images])
    return embeddings[kept_token][None], kept_token
