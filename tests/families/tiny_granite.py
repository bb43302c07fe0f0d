"""Tiny Granite Vision models: LLaVA-NeXT with a tower without class token and several features.

Inputs for them and pruning from the definition are those of `tiny_llava_next`.
"""

import tiny_llava_next
from tiny_llava import siglip

FEATURES = [-8, -6, -4, -1]  # the hidden states that are put next to each other


def build(seed=0, grid=9, **changes):
    """Tiles of `grid` x `grid` patches: up to three a side, or eight in a strip."""
    vision = siglip(grid)
    tile = vision.image_size
    shapes = [(y, x) for y in range(1, 4) for x in range(1, 4)] + [(1, 8), (8, 1)]
    settings = {
        "vision_feature_layer": FEATURES,
        "vision_feature_select_strategy": "full",
        "image_grid_pinpoints": [[tile * rows, tile * columns] for rows, columns in shapes],
        **changes,
    }
    return tiny_llava_next.build(seed, vision, **settings)
