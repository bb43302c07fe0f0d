"""Shares of a budget, and methods that look at features or pixels, by themselves."""

from types import SimpleNamespace

import hivtp_transformers
import pytest
import torch
from hivtp_transformers.layout import Image, tiled_image
from hivtp_transformers.policy import METHODS, Method, Policy, Sources
from miniatures import MINIATURES
from tiny_llava import answer, one

from hivtp_kernels import PruneConfig

FAMILY = SimpleNamespace(has_newlines=True, one_grid=False, grid=(4, 4))


def grids(*shapes):
    """An image of grids of these shapes, one after another."""
    numbers = torch.arange(sum(height * width for height, width in shapes))
    parts = numbers.split([height * width for height, width in shapes])
    views = tuple(part.view(shape) for part, shape in zip(parts, shapes, strict=True))
    return Image(numbers, views, len(numbers))


@pytest.mark.parametrize(
    ("shapes", "budget", "shares"),
    [
        ([(24, 24), (48, 24)], 288, [96, 192]),
        ([(4, 4), (4, 4)], 5, [3, 2]),  # a tie goes to the lower grid
        ([(4, 4), (4, 4), (4, 4)], 10, [4, 3, 3]),
        ([(2, 1), (40, 40)], 3, [1, 2]),  # never none
        ([(2, 1), (2, 1), (40, 40)], 3, [1, 1, 1]),
        ([(1, 1), (1, 9)], 9, [1, 8]),
        ([(1, 1), (10, 4), (10, 4)], 6, [1, 2, 3]),  # what it lacks, the first of the largest gives
        ([(1, 1), (1, 1), (10, 4), (10, 4)], 6, [1, 1, 2, 2]),
    ],
)
def test_shares(shapes, budget, shares):
    image = grids(*shapes)
    policy = Policy(FAMILY, budget=budget)
    assert [share.kept for share in policy.shares(image)] == shares
    plan = policy.plan([image]).prepare(torch.device("cpu"))
    scores = torch.rand(image.units, generator=torch.Generator().manual_seed(0))
    stage = plan.select(Sources(lambda: scores, None, None), backend="torch")
    assert plan.units == [budget] and int((stage > 0).sum()) == budget
    kept = [int((stage[grid] > 0).sum()) for grid in image.grids]
    assert kept == shares


def test_a_video_keeps_something_of_every_frame():
    """Frames are grids like any others: what the families of video models build on."""
    image = grids(*[(8, 8)] * 12)
    policy = Policy(FAMILY, budget=30)
    assert [share.kept for share in policy.shares(image)] == [3] * 6 + [2] * 6
    with pytest.raises(
        ValueError,
        match="at least 12 for an image, .* 768 .*12 grids of 8 x 8 units",
    ):
        Policy(FAMILY, budget=11).count(image)
    assert Policy(FAMILY, budget=0.001).count(image) == 12


@pytest.mark.parametrize("extra", [0, 1])
def test_hidden_units_never_count(extra):
    """A tower's patch that the model does not show: the count is exact all the same."""
    image = tiled_image(6, 6)
    image = image._replace(positions=image.positions[1:])
    generator = torch.Generator().manual_seed(0)
    for budget in range(1, 36):
        policy = Policy(FAMILY, budget=budget)
        plan = policy.plan([image]).prepare(torch.device("cpu"))
        scores = torch.rand(36, generator=generator)
        scores[0] = (scores.max() + 1) * extra  # the best, or the worst
        stage = plan.select(Sources(lambda scores=scores: scores, None, None), backend="torch")
        assert int((stage[1:] > 0).sum()) == budget


class Norm(Method):
    """The units with the largest features."""

    needs = frozenset({"features"})

    def scores(self, evidence):
        return evidence.features.float().norm(dim=-1)


class RegionsOfNorm(Norm):
    """The same in regions and windows."""

    scope = "grid"
    has_ratio_mode = True

    def config(self, shape, count):
        return METHODS["hivtp"].config(shape, count)


class Brightness(Method):
    """The same for all units of an image: pixels are those of the image alone."""

    needs = frozenset({"pixels"})
    seen = ()

    def scores(self, evidence):
        Brightness.seen += (tuple(evidence.pixels.shape),)
        return evidence.pixels.mean().expand(len(evidence.units))


@pytest.mark.parametrize("method", [Norm(), RegionsOfNorm(), Brightness()], ids=lambda m: type(m))
@pytest.mark.parametrize("name", MINIATURES)
def test_a_method_of_ones_own(monkeypatch, name, method):
    """In every family, and taps nothing that it does not need."""
    monkeypatch.setitem(METHODS, "own", method)
    mini = MINIATURES[name]
    options = {**mini.options, "config": None, "budget": 80 if name == "llava_next" else 30}
    with hivtp_transformers.apply(mini.model, method="own", **options) as handle:
        assert handle._pruner.tower.layers == ()
        answer(mini.model, mini.inputs(1, 0, 2), tokens=1)
        assert handle.stats.kept == [options["budget"]] * 3


def test_features_are_the_towers_output(model, monkeypatch):
    monkeypatch.setitem(METHODS, "own", Norm())
    states = model.model.vision_tower(one()["pixel_values"], output_hidden_states=True)
    norms = states.hidden_states[-2][0, 1:].norm(dim=-1)
    with hivtp_transformers.apply(model, budget=50, method="own") as handle, torch.no_grad():
        handle.compact(**one())
    ((stage,),) = handle.stats.stages
    wanted = norms.topk(50).indices.sort().values
    assert torch.equal(stage.flatten().nonzero()[:, 0], wanted)


def test_ratio_mode_with_scores_of_ones_own(model, monkeypatch):
    monkeypatch.setitem(METHODS, "own", RegionsOfNorm())
    with hivtp_transformers.apply(model, method="own") as handle, torch.no_grad():
        handle.compact(**one())
    assert 252 <= handle.stats.kept[0] <= 288
    monkeypatch.setitem(METHODS, "own", Norm())
    with pytest.raises(ValueError, match="config must be None with method='own', .*: pass budget="):
        hivtp_transformers.apply(model, PruneConfig(), method="own")


def test_shares_are_remembered_for_the_image_itself():
    """A deep copy of a model has the numbers of objects that are gone, and others get these."""
    policy, image = Policy(FAMILY, budget=8), grids((4, 4), (4, 4))
    first = policy.plan([image])
    assert policy.plan([image]).units == first.units == [8]
    policy._known[id(image)] = grids((2, 2)), policy.shares(grids((9, 9)))
    assert [share.kept for share in policy._known_shares(image, "")] == [4, 4]
