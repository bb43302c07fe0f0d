"""Pruned LLaVA from its definition: the unpruned model's own modules, one row at a time.

Attention maps from the eager tower, scores and selection in fp64 and plain loops, and a language
model that is fed embeddings: no generate, no cache, no padding, nothing of `hivtp_transformers`.
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
    """Greedy continuation of a row."""
    embeddings, _ = embed(model, ids, images, config, **scoring)
    return continue_from(model, embeddings, tokens)


@torch.no_grad()
def continue_from(model, embeddings, tokens=6):
    """Greedy continuation of embeddings `[1, T, C]`; refuses a seed where last bits decide."""
    new = []
    for _ in range(tokens):
        last = logits(model, embeddings)[-1]
        best, second = last.topk(2).values
        assert best - second > 1e-3, "choose another seed: two tokens are too close"
        new.append(int(last.argmax()))
        embedding = model.get_input_embeddings()(torch.tensor([[new[-1]]]))
        embeddings = torch.cat([embeddings, embedding], dim=1)
    return torch.tensor(new)


def last_logits(model, prompts):
    """A function from equally many tokens said to each row, to the logits `[rows, V]` that follow.

    `prompts` holds the embeddings `[1, T, C]` of each row.
    """

    @torch.no_grad()
    def follow(said, of_row=None):
        of_row = range(len(prompts)) if of_row is None else of_row
        out = []
        for row, tokens in zip(of_row, said, strict=True):
            embeddings = model.get_input_embeddings()(torch.tensor([tokens], dtype=torch.long))
            out.append(logits(model, torch.cat([prompts[row], embeddings], dim=1))[-1])
        return torch.stack(out)

    return follow


def sample(model, prompts, seed, tokens=6, answers=1):
    """Ancestral sampling, `answers` for each row; draws as transformers does, all rows at once."""
    follow = last_logits(model, prompts)
    of_row = [row for row in range(len(prompts)) for _ in range(answers)]
    said = [[] for _ in of_row]
    torch.manual_seed(seed)
    for _ in range(tokens):
        drawn = torch.multinomial(follow(said, of_row).softmax(-1), 1)
        for tokens_said, token in zip(said, drawn, strict=True):
            tokens_said.append(int(token))
    return torch.tensor(said)


def beams(model, prompt, width, tokens=6):
    """Beam search of one row where nothing ends early: the `width` best answers, best first."""
    follow = last_logits(model, [prompt])
    said, totals = [[]], torch.zeros(1)
    for _ in range(tokens):
        scores = totals[:, None] + follow(said, [0] * len(said)).log_softmax(-1)
        best = scores.flatten().topk(width + 1)
        assert -best.values.diff().max() > 1e-4, "choose another seed: two beams are too close"
        totals = best.values[:width]
        vocabulary = scores.shape[1]
        said = [said[int(i) // vocabulary] + [int(i) % vocabulary] for i in best.indices[:width]]
    return torch.tensor(said)
