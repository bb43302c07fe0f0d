"""Tiny LLaVA-NeXT models with seeded weights, inputs for them, and pruning from its definition.

Layout, budget and features are written here as plain loops; nothing of `hivtp_transformers` and nothing of
the model's own packing is used.
"""

from fractions import Fraction

import reference
import numpy as np
import oracle
import torch
from tiny_llava import IMAGE_TOKEN, batch, configure, photos, seed_weights
from transformers import LlavaNextConfig, LlavaNextForConditionalGeneration

from hivtp_kernels import PruneConfig

SIDE, PATCHES = 24, 576
PINPOINTS = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
# Visual positions of images of (height, width) pixels, unpruned.
POSITIONS = {
    (480, 640): 2340,
    (300, 900): 2328,
    (700, 333): 1826,
    (336, 336): 1176,
    (1344, 336): 1944,
}


def build(seed=0, **changes):
    config = configure(LlavaNextConfig, image_grid_pinpoints=PINPOINTS, **changes)
    return seed_weights(LlavaNextForConditionalGeneration(config).eval(), seed)


def tiles_of(size):
    """Rows and columns of tiles: the resolution that shows most of the image and wastes least."""
    height, width = size

    def fit(resolution):
        scale = min(resolution[0] / height, resolution[1] / width)
        shown = min(int(height * scale) * int(width * scale), height * width)
        return shown, shown - resolution[0] * resolution[1]

    rows, columns = max(PINPOINTS, key=fit)
    return rows // 336, columns // 336


def stitched(size):
    """Numbers of the patches that show the large image, row by row: a list of lists."""
    (height, width), (tile_rows, tile_columns) = size, tiles_of(size)
    rows, columns = tile_rows * SIDE, tile_columns * SIDE
    top = left = 0
    if width / height > columns / rows:
        top = (rows - int(round(height * columns / width, 7))) // 2
    else:
        left = (columns - int(round(width * rows / height, 7))) // 2
    return [
        [
            (1 + y // SIDE * tile_columns + x // SIDE) * PATCHES + y % SIDE * SIDE + x % SIDE
            for x in range(left, columns - left)
        ]
        for y in range(top, rows - top)
    ]


def layout(size):
    """Number of the patch at each visual position, -1 for a newline."""
    return [*range(PATCHES), *(n for row in stitched(size) for n in [*row, -1])]


def kept_patches(scores, size, config=None, budget=None, newline="keep"):
    """Numbers of the kept patches, from scores `[tiles, 576]` in NumPy."""
    if budget is None:
        stages = [oracle.select(tile, config or PruneConfig()) for tile in scores]
        return set(np.flatnonzero(np.concatenate(stages)).tolist())
    large = stitched(size)
    shape = len(large), len(large[0])
    area = shape[0] * shape[1]
    newlines = shape[0] if newline == "keep" else 0
    if isinstance(budget, float):
        budget = int(budget * (PATCHES + area + newlines))
    if budget >= PATCHES + area + newlines:
        return set(layout(size)) - {-1}
    base = int(Fraction((budget - newlines) * PATCHES, PATCHES + area) + Fraction(1, 2))
    kept = set()
    for numbers, grid, count in (
        (list(range(PATCHES)), (SIDE, SIDE), base),
        ([n for row in large for n in row], shape, budget - newlines - base),
    ):
        if count == len(numbers):
            kept |= set(numbers)
            continue
        stage = oracle.select(scores.flatten()[numbers], PruneConfig(grid=grid, budget=count))
        kept |= {numbers[i] for i in np.flatnonzero(stage)}
    return kept


def keep(model, tiles, size, rows="cls", newline="keep", **rule):
    """bool `[positions]` of one image."""
    with torch.no_grad():
        scores = np.stack(
            [reference.importance(model, tile, (6, 7, 8), rows) for tile in tiles]
        )
    kept = kept_patches(scores, size, newline=newline, **rule)
    return torch.tensor([newline == "keep" if n < 0 else n in kept for n in layout(size)])


def features(model, tiles, size):
    """`[positions, C]` of one image, unpruned."""
    states = model.model.vision_tower(tiles, output_hidden_states=True).hidden_states[-2]
    projected = model.model.multi_modal_projector(states[:, 1:]).flatten(0, 1)
    newline = model.model.image_newline
    return torch.stack([newline if n < 0 else projected[n] for n in layout(size)])


def embed(model, ids, images, **rule):
    """Embeddings `[1, T', C]` of a row after pruning, and which of its tokens they are."""
    kept_token = ids != IMAGE_TOKEN
    places = (~kept_token).nonzero().flatten()
    embeddings = model.get_input_embeddings()(torch.where(kept_token, ids, 0))
    if images:
        embeddings = embeddings.index_put(
            (places,), torch.cat([features(model, *image) for image in images])
        )
        kept_token[places] = torch.cat([keep(model, *image, **rule) for image in images])
    return embeddings[kept_token][None], kept_token


def prompt(*sizes, before=5, after=8, seed=0):
    """Ids of one row: text, then each image's placeholders with text behind them."""
    generator = torch.Generator().manual_seed(seed)

    def text(length):
        return torch.randint(2, IMAGE_TOKEN, (length,), generator=generator)

    parts = [text(before)]
    for size in sizes:
        parts += [torch.full((POSITIONS[size],), IMAGE_TOKEN), text(after)]
    return torch.cat(parts)


def inputs_of(*rows, side="left", seed=0):
    """Inputs of rows of image sizes; what pads an image to the most tiles is NaN."""
    sizes = [size for row in rows for size in row]
    counts = [1 + rows * columns for rows, columns in map(tiles_of, sizes)]
    pixels = torch.full((len(sizes), max(counts), 3, 336, 336), float("nan"))
    for image, count in enumerate(counts):
        pixels[image, :count] = photos(count, seed=10 * seed + image)
    prompts = [prompt(*row, before=3 + 4 * i, seed=seed + i) for i, row in enumerate(rows)]
    return {
        **batch(prompts, side),
        "pixel_values": pixels,
        "image_sizes": torch.tensor(sizes),
    }


def rows_of(inputs):
    """Ids of each row without padding, and its images: tiles and size."""
    images = []
    for pixels, size in zip(inputs["pixel_values"], inputs["image_sizes"].tolist(), strict=True):
        rows, columns = tiles_of(size)
        images.append((pixels[: 1 + rows * columns], tuple(size)))
    left = iter(images)
    for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True):
        ids = ids[mask.bool()]
        room, own = int((ids == IMAGE_TOKEN).sum()), []
        while room:
            own.append(next(left))
            room -= POSITIONS[own[-1][1]]
        yield ids, own


def one(size=(300, 900), seed=0):
    return inputs_of([size], seed=seed)


def three(side="left", seed=1):
    """Three padded prompts of mixed sizes, one of two images."""
    rows = [(480, 640)], [(700, 333), (336, 336)], [(300, 900)]
    return inputs_of(*rows, side=side, seed=seed)
