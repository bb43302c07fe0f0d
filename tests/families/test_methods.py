"""The rules to compare HIVTP with: exact, deterministic, and what they say they are."""

import itertools
import math
from fractions import Fraction

import hivtp_transformers
import numpy as np
import pytest
import reference
import tiny_llava_next
import torch
from hivtp_transformers.policy.methods import METHODS, Evidence, best, lattice
from miniatures import MINIATURES
from tiny_llava import LAYERS, answer, one, photos, rows_of, three

from hivtp_kernels import PruneConfig

# Those without a ratio mode.
OTHERS = [name for name, method in METHODS.items() if not method.has_ratio_mode]
GRIDS = [(24, 24), (5, 7), (7, 5), (1, 9), (9, 1), (3, 20)]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("budget", [2, 64, 288, 575, 0.33])
def test_budget_is_exact(model, method, budget):
    count = int(budget * 576) if budget < 1 else budget
    with hivtp_transformers.apply(model, budget=budget, method=method) as handle:
        answer(model, three(), tokens=1)
    assert handle.stats.kept == [count] * 4
    for (stage,) in handle.stats.stages:
        assert stage.dtype == torch.int8 and stage.shape == (24, 24)
        assert int((stage > 0).sum()) == count
        if method != "hivtp":
            assert set(stage.unique().tolist()) <= {0, 1}


def highest(scores, budget):
    """Indices of the highest by score descending, then index ascending; NaN counts as -inf."""
    scores = np.where(np.isnan(scores), -np.inf, scores)
    return np.sort(np.lexsort((np.arange(len(scores)), -scores))[:budget])


def drawn(pixels, units=576):
    """The scores of the method "random" for an image."""
    evidence = Evidence((1, units), 0, torch.arange(units), None, pixels, None)
    return METHODS["random"].scores(evidence)


@pytest.mark.parametrize("rows", ["cls", "all"])
def test_topk_answers_as_the_reference(model, monkeypatch, rows):
    monkeypatch.setattr(
        reference,
        "keep",
        lambda model, image, config: highest(
            reference.importance(model, image, LAYERS, rows), config.budget
        ),
    )
    config = PruneConfig(budget=160)
    expected = [reference.answer(model, ids, i, config) for ids, i in rows_of(three())]
    with hivtp_transformers.apply(model, budget=160, method="topk", rows=rows):
        assert torch.equal(answer(model, three()), torch.stack(expected))


@pytest.mark.parametrize("method", ["uniform", "random"])
def test_others_answer_as_the_reference(model, monkeypatch, method):
    config = PruneConfig(budget=150)
    even = lattice((24, 24), 150).flatten().nonzero()[:, 0].numpy()

    def keep(model, image, config):
        return even if method == "uniform" else highest(drawn(image).numpy(), 150)

    monkeypatch.setattr(reference, "keep", keep)
    expected = [reference.answer(model, ids, i, config) for ids, i in rows_of(three())]
    with hivtp_transformers.apply(model, budget=150, method=method) as handle:
        assert handle._pruner.tower.layers == (), "nothing is tapped for nothing"
        assert torch.equal(answer(model, three()), torch.stack(expected))
        assert [own.shape for own in handle.scores(three()["pixel_values"])] == [(576,)] * 4


def test_best_with_ties():
    """Few distinct scores, NaN and both zeros among them."""
    values = np.array([0.0, -0.0, 1.0, 2.0, -1.0, np.nan, np.inf, -np.inf], np.float32)
    for scores in np.random.default_rng(0).choice(values, (5, 5000)):
        for count in (1, 2, 1700, 4999, 5000):
            kept = best(torch.tensor(scores), count).sort().values
            assert kept.tolist() == highest(scores, count).tolist()


@pytest.mark.parametrize("grid", GRIDS)
def test_uniform_has_every_budget(grid):
    for budget in range(1, grid[0] * grid[1]):
        ones = lattice(grid, budget)
        assert ones.shape == grid and ones.sum() == budget and ones.max() == 1


def test_uniform_is_even():
    def places(budget):
        return lattice((24, 24), budget).nonzero()

    assert places(64).tolist() == [[y, x] for y in range(1, 24, 3) for x in range(1, 24, 3)]
    assert places(144).tolist() == [[y, x] for y in range(1, 24, 2) for x in range(1, 24, 2)]
    assert places(1).tolist() == [[12, 12]]
    for budget in (100, 192, 288):
        quarters = torch.bincount((places(budget) // 12 * torch.tensor([2, 1])).sum(1))
        assert (quarters - budget / 4).abs().max() <= 0.07 * budget


def test_random_follows_from_the_image_alone(model):
    images = photos(4, seed=1)
    with hivtp_transformers.apply(model, budget=100, method="random") as handle:
        answer(model, three(), tokens=1)
        together = [stage.flatten().nonzero()[:, 0] for (stage,) in handle.stats.stages]
        for image, kept in zip(images, together, strict=True):
            answer(model, {**one(), "pixel_values": image[None]}, tokens=1)
            ((alone,),) = handle.stats.stages
            assert torch.equal(alone.flatten().nonzero()[:, 0], kept)
    for a, b in itertools.combinations([kept.tolist() for kept in together], 2):
        assert len(set(a) & set(b)) < 40, "17 are expected by chance"


def test_random_is_what_it_says():
    """In Python's integers: figures in print must come out again elsewhere and next year."""

    def mix(key):
        for factor in (0xFF51AFD7ED558CCD, 0xC4CEB9FE1A85EC53):
            key = (key ^ key >> 33) * factor % 2**64
        return key ^ key >> 33

    image = photos(1)
    bits = int(image.numpy().view(np.int32).sum(dtype=np.int64))
    expected = [mix((mix((bits + 2509) % 2**64) + i) % 2**64) % 2**24 for i in range(576)]
    assert drawn(image).tolist() == expected


def test_random_is_even():
    images = torch.randn(2000, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    scores = torch.stack([drawn(image) for image in images])
    kept = torch.zeros(2000, 576).scatter_(1, scores.topk(144).indices, 1)
    assert (kept.mean(0) - 0.25).abs().max() < 0.05, "each patch: five standard deviations"
    pairs = torch.corrcoef(kept.T) - torch.eye(576)
    assert pairs.abs().max() < 0.13, "no two patches go together"


def test_random_does_not_depend_on_layout():
    image = photos(2)
    strided = image.to(memory_format=torch.channels_last)
    assert torch.equal(drawn(strided), drawn(image))
    assert torch.equal(drawn(image.half()), drawn(image.half().float()))


def test_bad_arguments(model):
    with pytest.raises(ValueError, match=f"one of {', '.join(METHODS)}, got 'best'"):
        hivtp_transformers.apply(model, method="best", budget=100)
    for method in OTHERS:
        with pytest.raises(ValueError, match=f"budget must be given with method='{method}'"):
            hivtp_transformers.apply(model, method=method)
        with pytest.raises(ValueError, match=f"config must be None with method='{method}'"):
            hivtp_transformers.apply(model, PruneConfig(budget=100), method=method)
        with pytest.raises(ValueError, match="exclude"):
            hivtp_transformers.apply(model, PruneConfig(budget=100), method=method, budget=100)
        with pytest.raises(ValueError, match="budget must be a positive integer"):
            hivtp_transformers.apply(model, method=method, budget=0)
        with hivtp_transformers.apply(model, method=method, budget=1) as handle:
            answer(model, one(), tokens=1)
        assert handle.stats.kept == [1]
        with hivtp_transformers.apply(model, method=method, budget=576):
            assert "generate" not in model.__dict__


def of_lattice(shape, count):
    return lattice(shape, count).flatten().nonzero()[:, 0].tolist()


def kept_of_next(model, tiles, size, budget, method, newline="keep"):
    """Numbers of the patches that a method keeps of an image of several tiles."""
    large = tiny_llava_next.stitched(size)
    base, rest = list(range(576)), [n for row in large for n in row]
    count = budget - (len(large) if newline == "keep" else 0)
    if method == "uniform":
        first = math.floor(Fraction(count * 576, 576 + len(rest)) + Fraction(1, 2))
        shape = (len(large), len(large[0]))
        return {*of_lattice((24, 24), first), *(rest[i] for i in of_lattice(shape, count - first))}
    if method == "topk":
        tile_scores = [reference.importance(model, tile, LAYERS, "cls") for tile in tiles]
        scores = np.concatenate(tile_scores)
    else:
        scores = drawn(tiles, 576 * len(tiles)).numpy()
    shown = np.array(sorted(base + rest))
    return set(shown[highest(scores[shown], count)].tolist())


@pytest.mark.parametrize("newline", ["keep", "drop"])
@pytest.mark.parametrize("method", ["topk", "uniform", "random"])
def test_llava_next_answers_as_the_reference(monkeypatch, method, newline):
    model, budget = tiny_llava_next.build(), 320

    def keep(model, tiles, size, **rule):
        kept = kept_of_next(model, tiles, size, budget, method, newline)
        layout = tiny_llava_next.layout(size)
        return torch.tensor([newline == "keep" if n < 0 else n in kept for n in layout])

    monkeypatch.setattr(tiny_llava_next, "keep", keep)
    inputs = tiny_llava_next.three()
    with torch.no_grad():
        expected = [
            reference.continue_from(model, tiny_llava_next.embed(model, ids, images)[0])
            for ids, images in tiny_llava_next.rows_of(inputs)
        ]
    with hivtp_transformers.apply(model, budget=budget, method=method, newline=newline) as handle:
        assert torch.equal(answer(model, inputs), torch.stack(expected))
        assert handle.stats.kept == [budget] * 4
        assert all(stage.max() <= 1 for stages in handle.stats.stages for stage in stages)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", MINIATURES)
def test_every_family_keeps_the_same_number_by_every_method(name, method):
    mini = MINIATURES[name]
    inputs = mini.inputs(1, 0, 2)
    options = {**mini.options, "budget": 80 if name == "llava_next" else 30}
    with hivtp_transformers.apply(mini.model, method=method, **options) as handle:
        first = answer(mini.model, inputs)
        assert handle.stats.kept == [options["budget"]] * 3
        assert torch.equal(answer(mini.model, inputs), first)
