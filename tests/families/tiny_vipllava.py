"""Tiny ViP-LLaVA models, which show the language model the hidden states of five layers at once.

Inputs for them are those of `tiny_llava`, and pruning from the definition that of `reference`.
"""

from tiny_llava import clip, configure, seed_weights
from transformers import VipLlavaConfig, VipLlavaForConditionalGeneration

GRID = 12
FEATURES = [-2, -5, -8, -11, 6]


def build(seed=0, grid=GRID, features=FEATURES):
    config = configure(VipLlavaConfig, clip(grid, layers=12), image_seq_length=grid * grid)
    for name in (
        "vision_feature_layer",
        "vision_feature_layers",
    ):  # before transformers 5 the second
        if hasattr(config, name):
            setattr(config, name, features)
    return seed_weights(VipLlavaForConditionalGeneration(config).eval(), seed)
