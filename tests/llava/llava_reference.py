"""Pruned LLaVA from its definition: the unpruned model's own modules, one row at a time.

Attention maps from the eager tower, scores and selection in fp64 and plain loops, and a language
model that is fed embeddings: no generate, no cache, no padding, nothing of `hivtp_llava`.
"""

import copy

import numpy as np
import oracle
import torch
from tiny_llava import IMAGE_TOKEN


def importance(model, image, layers, rows, prefix=1):
    """fp64 `[N]`."""
    tower = copy.deepcopy(model.model.vision_tower)
    tower.set_attn_implementation("eager")
    attentions = tower(image[None], output_attentions=True).attentions
    maps = np.mean([attentions[layer].double().numpy() for layer in layers], axis=0)
    maps = maps[0].mean(0)
    return (maps[0] if rows == "cls" else maps.mean(0))[prefix:]


@torch.no_grad()
def keep(model, image, config, layers=(6, 7, 8), rows="cls", prefix=1):
    """Raster indices of the kept patches."""
    return np.flatnonzero(oracle.select(importance(model, image, layers, rows, prefix), config))


def embed(model, ids, images, config, **scoring):
    """Embeddings `[1, T', C]` of a row after pruning, and which of its tokens they are."""
    kept_token = ids != IMAGE_TOKEN
    placeholders = (~kept_token).nonzero().view(len(images), -1) if images else []
    embeddings = model.get_input_embeddings()(torch.where(kept_token, ids, 0))
    for image, places in zip(images, placeholders, strict=True):
        encoded = model.model.get_image_features(image[None])
        (features,) = getattr(encoded, "pooler_output", encoded)  # features alone in transformers 4
        kept = torch.from_numpy(keep(model, image, config, **scoring))
        embeddings = embeddings.index_put((places,), features)
        kept_token[places[kept]] = True
    return embeddings[kept_token][None], kept_token


def logits(model, embeddings):
    """Logits `[T', vocabulary]` of a row."""
    states = model.model.language_model(inputs_embeds=embeddings, use_cache=False)
    return model.lm_head(states.last_hidden_state)[0]


@torch.no_grad()
def answer(model, ids, images, config, tokens=6, **scoring):
    """Greedy continuation; refuses a seed at which the last bits would decide it."""
    embeddings, _ = embed(model, ids, images, config, **scoring)
    new = []
    for _ in range(tokens):
        last = logits(model, embeddings)[-1]
        best, second = last.topk(2).values
        assert best - second > 1e-3, "choose another seed: two tokens are too close"
        new.append(int(last.argmax()))
        embedding = model.get_input_embeddings()(torch.tensor([[new[-1]]]))
        embeddings = torch.cat([embeddings, embedding], dim=1)
    return torch.tensor(new)
