"""Pruning from its definition: the unpruned model's own modules, one row at a time.

Attention maps from the eager tower, scores and selection in fp64, shares in fractions and plain
loops, and a language model that is fed embeddings: no generate, no cache, no padding, nothing of
`hivtp_transformers`.
"""

import copy
import math
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import oracle
import torch
from tiny_llava import IMAGE_TOKEN

from hivtp_kernels import PruneConfig

LARGEST = 4096  # units of a grid that one selection takes


@dataclass
class Image:
    """What the language model gets of an image, and the grids of it.

    `positions` holds the number of the unit at each position, -1 for a learned newline. A budget is
    shared by `grids`, arrays `[H, W]` of unit numbers; ratio mode prunes `tiles` one by one, which
    are the grids by default. `hidden` units have a score but no position.
    """

    positions: np.ndarray
    grids: list
    tiles: list | None = None
    hidden: tuple = ()

    def shown(self, grid):
        return grid.size - int(np.isin(grid, self.hidden).sum())

    def counts(self, newline="keep"):
        """Smallest legal count, and all positions."""
        newlines = int((self.positions < 0).sum()) if newline == "keep" else 0
        return newlines + len(self.grids), newlines + int((self.positions >= 0).sum())

    def newline(self, budget, otherwise=None):
        """What becomes of newlines: an image of which a budget keeps all stays as it is."""
        whole = isinstance(budget, int) and budget >= len(self.positions)
        return "keep" if whole else otherwise

    def kept(self, budget, newline="keep"):
        """How many positions a budget keeps; None if it is not legal."""
        if self.newline(budget) == "keep":
            return len(self.positions)
        least, most = self.counts(newline)
        if isinstance(budget, float):
            exact = budget * most
            near = abs(exact - round(exact)) < 1e-9
            budget = max(round(exact) if near else math.floor(exact), least)
        return min(budget, most) if budget >= least else None


def apportion(count, areas):
    """Share `count` in proportion to the areas: largest remainder, ties to the lower number."""
    exact = [Fraction(count * area, sum(areas)) for area in areas]
    shares = [math.floor(share) for share in exact]
    by_remainder = sorted(range(len(areas)), key=lambda i: (shares[i] - exact[i], i))
    for i in by_remainder[: count - sum(shares)]:
        shares[i] += 1
    return shares


def share(count, areas):
    """The same, but each gets at least one, at the expense of the largest share."""
    shares = apportion(count, areas)
    while 0 in shares:
        shares[shares.index(max(shares))] -= 1
        shares[shares.index(0)] += 1
    return shares


def halves(grid):
    """A grid `[H, W]`, cut along its longer side until no part has too many units."""
    if grid.size <= LARGEST:
        return [grid]
    parts = np.array_split(grid, 2, axis=0 if grid.shape[0] >= grid.shape[1] else 1)
    return [smaller for part in parts for smaller in halves(part)]


def stages(image, scores, config=None, budget=None, newline="keep"):
    """Stage of every unit, from `scores` `[units]`: 1 global, 2 local, 3 filled, 0 dropped."""
    stage = np.zeros(len(scores), dtype=int)

    def select(part, config):
        stage[part] = oracle.select(own[part].flatten(), config).reshape(part.shape)

    own = np.array(scores, dtype=float)
    if budget is None:
        for tile in image.tiles or image.grids:
            for part in halves(tile):
                select(part, fit(config or PruneConfig(), part.shape))
        return stage

    least, most = image.counts(newline)
    newlines, count = least - len(image.grids), image.kept(budget, newline)
    assert count is not None, f"{budget} is too small, the smallest legal budget is {least}"
    if count >= most:
        return np.ones(len(scores), dtype=int)
    own[list(image.hidden)] = np.inf
    shares = share(count - newlines, [image.shown(grid) for grid in image.grids])
    for grid, of_grid in zip(image.grids, shares, strict=True):
        parts = halves(grid)
        areas = [image.shown(part) for part in parts]
        for part, area, units in zip(parts, areas, apportion(of_grid, areas), strict=True):
            hidden = part.size - area
            if units == area:
                stage[part] = 1
            elif units > 1:
                regions = tuple(min(2, extent) for extent in part.shape)
                select(part, PruneConfig(part.shape, regions=regions, budget=units + hidden))
            elif units == 1:
                one = {"regions": (1, 1), "window": part.shape}
                select(part, PruneConfig(part.shape, budget=1 + hidden, **one))
    return stage


def fit(config, shape):
    """A config for a grid of this shape: regions and window no larger than it."""
    if config.budget is not None:
        assert config.grid == shape
        return config
    regions, window = (
        tuple(min(a, b) for a, b in zip(pair, shape, strict=True))
        for pair in (config.regions, config.window)
    )
    return PruneConfig(shape, regions=regions, window=window, ratio=config.ratio)


def positions(image, stage, newline="keep"):
    """bool `[positions]`: which positions of an image stay."""
    return torch.tensor([newline == "keep" if n < 0 else stage[n] > 0 for n in image.positions])


def splice(model, ids, features, kept):
    """Embeddings `[1, T', C]` of a row after pruning, and which of its tokens they are.

    `features` `[positions, C]` and `kept` `[positions]` are lists with one tensor per image.
    """
    kept_token = ids != IMAGE_TOKEN
    places = (~kept_token).nonzero().flatten()
    embeddings = model.get_input_embeddings()(torch.where(kept_token, ids, 0))
    if len(places):
        embeddings = embeddings.index_put((places,), torch.cat(features))
        kept_token[places] = torch.cat(kept)
    return embeddings[kept_token][None], kept_token


def class_tokens(model):
    """How many tokens of the tower come before its patches."""
    return 0 if model.config.vision_config.model_type.startswith("siglip") else 1


def middle(model):
    """The layers that score by default: from a quarter to a third of the tower's depth."""
    depth = model.config.vision_config.num_hidden_layers
    return range(depth // 4, depth // 3 + 1)


def importance(model, image, layers=None, rows=None, prefix=None):
    """fp64 `[N]`: mean attention that each patch of one tile receives."""
    return importances(model, image[None], layers, rows, prefix)[0]


def importances(model, tiles, layers=None, rows=None, prefix=None):
    """fp64 `[tiles, N]`."""
    prefix = class_tokens(model) if prefix is None else prefix
    rows = rows or ("cls" if prefix else "all")
    layers = middle(model) if layers is None else layers
    tower = copy.deepcopy(model.model.vision_tower)
    tower.set_attn_implementation("eager")
    scores = []
    for tile in tiles:
        attentions = tower(tile[None], output_attentions=True).attentions
        maps = np.mean([attentions[layer].double().numpy() for layer in layers], axis=0)
        maps = maps[0].mean(0)
        scores.append((maps[0] if rows == "cls" else maps.mean(0))[prefix:])
    return np.stack(scores)


def project(model, tiles):
    """`[tiles, N, C]`: the tower's hidden state, or several next to each other, projected."""
    layers = getattr(model.config, "vision_feature_layer", None)
    if layers is None:
        layers = model.config.vision_feature_layers  # of ViP-LLaVA in transformers 4
    states = model.model.vision_tower(tiles, output_hidden_states=True).hidden_states
    states = torch.cat([states[i] for i in ([layers] if isinstance(layers, int) else layers)], -1)
    # ViP-LLaVA has no such setting and leaves out its CLS token.
    whole = getattr(model.config, "vision_feature_select_strategy", "default") == "full"
    return model.model.multi_modal_projector(states if whole else states[:, 1:])


def features(model, image):
    """`[positions, C]` of an image that is one grid, unpruned."""
    return project(model, image[None])[0]


def layout(model):
    """An image that is one grid, as in LLaVA-1.5.

    The model leaves out the tower's first token: a patch, if there is no class token.
    """
    config = model.config
    side = config.vision_config.image_size // config.vision_config.patch_size
    units = np.arange(side * side)
    strategy = getattr(config, "vision_feature_select_strategy", "default")
    hidden = 1 if strategy == "default" and not class_tokens(model) else 0
    return Image(units[hidden:], [units.reshape(side, side)], hidden=(0,) * hidden)


@torch.no_grad()
def keep(model, image, config=None, budget=None, **scoring):
    """Which positions of an image that is one grid are kept: their numbers."""
    scores, own = importance(model, image, **scoring), layout(model)
    return positions(own, stages(own, scores, config, budget)).nonzero().flatten().numpy()


def embed(model, ids, images, config=None, **rule):
    """Embeddings `[1, T', C]` of a row after pruning, and which of its tokens they are."""
    unpruned = [features(model, image) for image in images]
    kept = [torch.zeros(len(f), dtype=torch.bool) for f in unpruned]
    for mask, image in zip(kept, images, strict=True):
        mask[keep(model, image, config, **rule)] = True
    return splice(model, ids, unpruned, kept)


def logits(model, embeddings):
    """Logits `[T', vocabulary]` of a row."""
    states = model.model.language_model(inputs_embeds=embeddings, use_cache=False)
    return model.lm_head(states.last_hidden_state)[0]


@torch.no_grad()
def answer(model, ids, images, config=None, tokens=6, **scoring):
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


def continue_each(model, prompts, tokens=6):
    """Greedy continuation of each of several embeddings."""
    return torch.stack([continue_from(model, embeddings, tokens) for embeddings in prompts])


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
