"""Tiny Mantis models: LLaVA with a tower without class token, whose first patch it leaves out.

Inputs for them are those of `tiny_llava`, and pruning from the definition that of `reference`.
"""

import tiny_llava
from tiny_llava import siglip

GRID = 9


def build(seed=0, grid=GRID, **changes):
    return tiny_llava.build(siglip(grid), seed, image_seq_length=grid * grid - 1, **changes)
