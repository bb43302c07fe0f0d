"""The method in fp64 NumPy and plain loops, from its definition, independent of the package."""

import numpy as np


def attention_scores(q, k, scale, rows, prefix):
    """Mean attention that each patch receives; `q`, `k` are lists of `[B, heads, T, D]` tensors."""
    total = 0.0
    for q_layer, k_layer in zip(q, k, strict=True):
        q_layer, k_layer = q_layer.double().numpy(), k_layer.double().numpy()
        logits = scale * q_layer @ k_layer.swapaxes(-1, -2)
        if rows == "cls":
            logits = logits[:, :, :1]
        with np.errstate(invalid="ignore"):
            weights = np.exp(logits - logits.max(-1, keepdims=True))
            total = total + (weights / weights.sum(-1, keepdims=True)).mean((1, 2))
    return total[:, prefix:] / len(q)


def log_sum_exp(q, k, scale):
    """The lse that flash attention returns with its output: `[B, heads, T]` for one layer."""
    logits = scale * q.double().numpy() @ k.double().numpy().swapaxes(-1, -2)
    top = logits.max(-1)
    return top + np.log(np.exp(logits - top[..., None]).sum(-1))


def select(scores, config):
    """Stage of every patch of one image: 1 global, 2 local, 3 filled, 0 not kept."""
    (height, width), (rows, columns), (wy, wx) = config.grid, config.regions, config.window
    scores = [-np.inf if np.isnan(s) else float(s) for s in scores]
    best_first = sorted(range(height * width), key=lambda i: (-scores[i], i))
    stage = [0] * (height * width)

    left = list(config.quotas)
    for i in best_first:
        y, x = divmod(i, width)
        region = (y * rows // height) * columns + x * columns // width
        if left[region] > 0:
            left[region] -= 1
            stage[i] = 1

    taken = set()
    for i in best_first:
        y, x = divmod(i, width)
        if stage[i] == 0 and (y // wy, x // wx) not in taken:
            taken.add((y // wy, x // wx))
            stage[i] = 2

    if config.budget is not None:
        missing = config.capacity - sum(s > 0 for s in stage)
        for i in [i for i in best_first if stage[i] == 0][:missing]:
            stage[i] = 3
    return np.array(stage)


def pad(stage, capacity):
    """The stages of one image as a row of `Selection.indices` and one of `Selection.stage`."""
    kept = np.flatnonzero(stage)
    tail = capacity - len(kept)
    return np.pad(kept, (0, tail), constant_values=-1), np.pad(stage[kept], (0, tail))
