"""Tiny LLaVA-OneVision models with seeded weights, inputs, and pruning from its definition.

Tiles and stitching are those of LLaVA-NeXT; resizing is written here as plain loops.
"""

import math

import numpy as np
import reference
import tiny_llava_next as anyres
import torch
from tiny_llava import IMAGE_TOKEN, configure, rows_with, seed_weights, siglip  # noqa: F401
from transformers import LlavaOnevisionConfig, LlavaOnevisionForConditionalGeneration

LAYERS = (1, 2)


def build(seed=0, grid=9, tiles=3, most=4, vision=None, **changes):
    """Tiles of `grid` x `grid` patches, up to `tiles` a side or eight in a strip.

    Resized to as many patches as `most` tiles hold.
    """
    vision = vision or siglip(grid, layers=6)
    shapes = [(y, x) for y in range(1, tiles + 1) for x in range(1, tiles + 1)]
    config = configure(
        LlavaOnevisionConfig, vision, video_token_index=501,
        image_grid_pinpoints=[
            [vision.image_size * rows, vision.image_size * columns]
            for rows, columns in [*shapes, (1, 8), (8, 1)]
        ],
        vision_aspect_ratio=f"anyres_max_{most}", **changes,
    )  # fmt: skip
    return seed_weights(LlavaOnevisionForConditionalGeneration(config).eval(), seed)


def grid_of(model):
    return model.config.vision_config.image_size // 14


def tiles_of(model, size):
    return anyres.tiles_of(size, model.config)


def count_of(model, size, together=1):
    """Tiles of an image, the small copy included: that alone if there are several in a sample."""
    return 1 if together > 1 else anyres.count_of(size, model.config)


def stitch(model, tiles, size):
    """What the large image shows, `[rows, columns, C]`, of tiles `[n, patches, C]`."""
    return tiles.flatten(0, 1)[anyres.stitched(size, model.config)]


def shrunk(model, rows, columns):
    """Rows and columns of a stitched grid after resizing."""
    most = int(model.config.vision_aspect_ratio.removeprefix("anyres_max_"))
    ratio = math.sqrt(rows * columns / (most * grid_of(model) ** 2))
    return (int(rows // ratio), int(columns // ratio)) if ratio > 1.1 else (rows, columns)


def resize(model, values):
    """To fewer rows and columns, where they are too many: bilinear, pixel centres aligned."""
    rows, columns, _ = values.shape
    new = shrunk(model, rows, columns)
    if new == (rows, columns):
        return values

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


def image_of(model, size, count):
    """An image of so many tiles. If it is resized, its units are the cells of the new grid."""
    (base,) = anyres.tile_grids(1, model.config)
    if count == 1:
        return reference.Image(np.append(base.flatten(), -1), [base])
    large = anyres.stitched(size, model.config)
    new = shrunk(model, *large.shape)
    if new != large.shape:
        large = base.size + np.arange(math.prod(new)).reshape(new)
    return anyres.packed(base, large)


@torch.no_grad()
def importance(model, tiles, size, **scoring):
    """fp64 `[units]` of one image."""
    scores = torch.from_numpy(reference.importances(model, tiles, **scoring))[..., None]
    if len(tiles) > 1:
        large = stitch(model, scores, size)
        if (resized := resize(model, large)).shape != large.shape:
            return torch.cat([scores[0].flatten(), resized.flatten()]).numpy()
    return scores.flatten().numpy()


def keep(model, tiles, size, newline="keep", config=None, budget=None, **scoring):
    """bool `[positions]` of one image."""
    image, scores = image_of(model, size, len(tiles)), importance(model, tiles, size, **scoring)
    stage = reference.stages(image, scores, config, budget, newline)
    return reference.positions(image, stage, image.newline(budget, newline))


def features(model, tiles, size):
    """`[positions, C]` of one image, unpruned."""
    grids = grids_of(model, reference.project(model, tiles), size)
    newline = model.model.image_newline
    if len(grids) == 1:
        return torch.cat([grids[0].flatten(0, 1), newline[None]])
    ends = newline.expand(grids[1].shape[0], 1, -1)
    return torch.cat([grids[0].flatten(0, 1), torch.cat([grids[1], ends], dim=1).flatten(0, 1)])


def embed(model, ids, images, **rule):
    """Embeddings `[1, T', C]` of a row after pruning, and which of its tokens they are."""
    unpruned = [features(model, *image) for image in images]
    return reference.splice(model, ids, unpruned, [keep(model, *image, **rule) for image in images])


def inputs_of(model, *rows, side="left", seed=0):
    """Inputs of rows of image sizes; several images of a row are a tile each."""
    images = []
    for row in rows:
        for size in row:
            count = count_of(model, size, len(row))
            images.append((count, len(image_of(model, size, count).positions)))
    inputs = anyres.inputs_with(rows, images, model.config.vision_config.image_size, side, seed)
    return {**inputs, "batch_num_images": torch.tensor([len(row) for row in rows if row])}


def rows_of(model, inputs):
    """Ids of each row without padding, and its images: tiles and size."""
    together = [n for n in inputs["batch_num_images"].tolist() for _ in range(n)]
    sizes = [tuple(size) for size in inputs["image_sizes"].tolist()]
    counts = [count_of(model, *each) for each in zip(sizes, together, strict=True)]
    tiles = zip(inputs["pixel_values"], counts, sizes, strict=True)
    images = [(pixels[:count], size) for pixels, count, size in tiles]
    return rows_with(
        inputs, images, [len(image_of(model, size, len(tiles)).positions) for tiles, size in images]
    )
