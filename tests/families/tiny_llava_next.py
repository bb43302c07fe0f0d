"""Tiny LLaVA-NeXT models with seeded weights, inputs for them, and pruning from its definition.

Tiles, stitching and layout are written here as plain loops over a config; nothing of
`hivtp_transformers` and nothing of the model's own packing is used.
"""

import math

import numpy as np
import reference
import torch
from tiny_llava import batch, configure, photos, rows_with, seed_weights, texts_around
from transformers import LlavaNextConfig, LlavaNextForConditionalGeneration

SIDE, PATCHES = 24, 576
PINPOINTS = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
CONFIG = configure(LlavaNextConfig, image_grid_pinpoints=PINPOINTS)
# Visual positions of images of (height, width) pixels, unpruned.
POSITIONS = {
    (480, 640): 2340,
    (300, 900): 2328,
    (700, 333): 1826,
    (336, 336): 1176,
    (1344, 336): 1944,
}


def build(seed=0, vision=None, **changes):
    changes = {"image_grid_pinpoints": PINPOINTS, **changes}
    config = configure(LlavaNextConfig, vision, **changes)
    return seed_weights(LlavaNextForConditionalGeneration(config).eval(), seed)


def tiles_of(size, config=CONFIG):
    """Rows and columns of tiles: the resolution that shows most of the image and wastes least."""
    height, width = size

    def fit(resolution):
        scale = min(resolution[0] / height, resolution[1] / width)
        shown = min(int(height * scale) * int(width * scale), height * width)
        return shown, shown - resolution[0] * resolution[1]

    rows, columns = max(config.image_grid_pinpoints, key=fit)
    return rows // config.vision_config.image_size, columns // config.vision_config.image_size


def count_of(size, config=CONFIG):
    """Tiles of an image, the small copy included."""
    return 1 + math.prod(tiles_of(size, config))


def tile_grids(count, config=CONFIG):
    """Numbers of the patches of each tile, `[H, W]`."""
    side = config.vision_config.image_size // config.vision_config.patch_size
    return list(np.arange(count * side * side).reshape(count, side, side))


def stitched(size, config=CONFIG):
    """Numbers of the patches that show the large image, `[rows, columns]`; there may be none."""
    (height, width), (tile_rows, tile_columns) = size, tiles_of(size, config)
    tiles = tile_grids(1 + tile_rows * tile_columns, config)
    side = len(tiles[0])
    rows, columns = side * tile_rows, side * tile_columns
    whole = np.empty((rows, columns), dtype=int)
    for y in range(rows):
        for x in range(columns):
            tile = tiles[1 + y // side * tile_columns + x // side]
            whole[y, x] = tile[y % side, x % side]
    top = left = 0
    if width / height > columns / rows:
        top = (rows - int(round(height * columns / width, 7))) // 2
    else:
        left = (columns - int(round(width * rows / height, 7))) // 2
    return whole[top : rows - top, left : columns - left]


def packed(base, large, tiles=None):
    """The small copy, then the rows of the large image, each with a newline behind it."""
    rows = np.pad(large, ((0, 0), (0, 1)), constant_values=-1)
    positions = np.concatenate([base.flatten(), rows.flatten()])
    return reference.Image(positions, [grid for grid in (base, large) if grid.size], tiles)


def image_of(size, config=CONFIG):
    tiles = tile_grids(count_of(size, config), config)
    return packed(tiles[0], stitched(size, config), tiles)


def layout(size):
    """Number of the patch at each visual position, -1 for a newline."""
    return image_of(size).positions.tolist()


def kept_patches(scores, size, config=None, budget=None, newline="keep"):
    """Numbers of the kept patches, from scores `[tiles, 576]` in NumPy."""
    stage = reference.stages(image_of(size), scores.flatten(), config, budget, newline)
    return set(np.flatnonzero(stage).tolist())


@torch.no_grad()
def importance(model, tiles, size, **scoring):
    """fp64 `[units]` of one image."""
    return reference.importances(model, tiles, **scoring).flatten()


def keep(model, tiles, size, newline="keep", config=None, budget=None, **scoring):
    """bool `[positions]` of one image."""
    image, scores = image_of(size, model.config), importance(model, tiles, size, **scoring)
    stage = reference.stages(image, scores, config, budget, newline)
    return reference.positions(image, stage, image.newline(budget, newline))


def features(model, tiles, size):
    """`[positions, C]` of one image, unpruned."""
    projected = reference.project(model, tiles).flatten(0, 1)
    rows = torch.cat([projected, model.model.image_newline[None]])  # number -1 is the last
    return rows[image_of(size, model.config).positions]


def embed(model, ids, images, **rule):
    """Embeddings `[1, T', C]` of a row after pruning, and which of its tokens they are."""
    unpruned = [features(model, *image) for image in images]
    return reference.splice(model, ids, unpruned, [keep(model, *image, **rule) for image in images])


def inputs_of(*rows, side="left", seed=0, config=CONFIG):
    """Inputs of rows of image sizes."""
    sizes = [size for row in rows for size in row]
    images = [(count_of(size, config), len(image_of(size, config).positions)) for size in sizes]
    return inputs_with(rows, images, config.vision_config.image_size, side, seed)


def inputs_with(rows, images, pixels, side, seed):
    """Inputs of rows of image sizes, of so many tiles and positions each.

    What pads an image to the most tiles is NaN.
    """
    values = torch.full(
        (len(images), max([count for count, _ in images], default=0), 3, pixels, pixels),
        float("nan"),
    )
    for image, (count, _) in enumerate(images):
        values[image, :count] = photos(count, seed=10 * seed + image, size=pixels)
    left = iter(images)
    texts = texts_around([[next(left)[1] for _ in row] for row in rows], seed)
    inputs = batch(texts, side)
    if images:
        inputs["pixel_values"] = values
        inputs["image_sizes"] = torch.tensor([size for row in rows for size in row])
    return inputs


def rows_of(inputs, config=CONFIG):
    """Ids of each row without padding, and its images: tiles and size."""
    sizes = [tuple(size) for size in inputs["image_sizes"].tolist()]
    tiles = zip(inputs["pixel_values"], sizes, strict=True)
    images = [(pixels[: count_of(size, config)], size) for pixels, size in tiles]
    return rows_with(inputs, images, [len(image_of(size, config).positions) for size in sizes])


def one(size=(300, 900), seed=0):
    return inputs_of([size], seed=seed)


def three(side="left", seed=1):
    """Three padded prompts of mixed sizes, one of two images."""
    rows = [(480, 640)], [(700, 333), (336, 336)], [(300, 900)]
    return inputs_of(*rows, side=side, seed=seed)
