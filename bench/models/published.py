"""The published procedure, implemented from its definition: full maps, one image at a time."""

import torch


def scores(maps, layers):
    """Mean of the chosen `[1, heads, T, T]` maps per key, without the CLS token: `[N]`."""
    return torch.stack([maps[layer] for layer in layers]).mean((0, 2, 3))[0, 1:]


def blocks(x, rows, columns):
    """Cut an `[H, W]` grid into `rows x columns` equal blocks: `[rows * columns, area]`."""
    height, width = x.shape
    cut = x.view(rows, height // rows, columns, width // columns)
    return cut.transpose(1, 2).reshape(rows * columns, -1)


def select(scores, grid=(24, 24), regions=(2, 2), ratio=0.25, window=(2, 2)):
    """Raster indices of kept patches: the best of each region, then the best left per window."""
    height, width = grid
    raster = torch.arange(height * width, device=scores.device).view(grid)
    by_region = blocks(scores.view(grid), *regions)
    best = by_region.topk(int(ratio * by_region.shape[1]), dim=1).indices
    kept = torch.zeros(height * width, dtype=torch.bool, device=scores.device)
    kept[blocks(raster, *regions).gather(1, best)] = True

    windows = height // window[0], width // window[1]
    left = blocks(scores.masked_fill(kept, -torch.inf).view(grid), *windows).max(1)
    winners = blocks(raster, *windows).gather(1, left.indices[:, None])[:, 0]
    kept[winners[left.values > -torch.inf]] = True
    return kept.nonzero()[:, 0]


def encode(tower, pixel_values, layers=(6, 7, 8), grid=(24, 24), feature_layer=-2):
    """Kept features per image, a list of `[kept, C]`; `tower` must run eager attention."""
    features = []
    for image in pixel_values.split(1):
        out = tower(image, output_attentions=True, output_hidden_states=True)
        kept = select(scores(out.attentions, layers), grid)
        features.append(out.hidden_states[feature_layer][0, 1:].index_select(0, kept))
    return features
