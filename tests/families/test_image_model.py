"""One model of an image for every family: counts, stages, scores and answers for many sizes."""

import itertools
import math
import random

import hivtp_transformers
import numpy as np
import pytest
import reference
import tiny_onevision
import torch
from miniatures import MINIATURES
from tiny_llava import IMAGE_TOKEN, answer

pytestmark = pytest.mark.parity

# Height and width: strips of a pixel, icons, photos, screenshots.
SIZES = [
    (1, 1000), (1000, 1), (20, 20), (3000, 300), (300, 3000), (336, 336), (480, 640), (1344, 336),
    (333, 700), (33, 1500), (1080, 1920), (380, 300),
]  # fmt: skip
# A count, or a share; "most" is more than some images have, if they differ.
BUDGETS = [0.1, 0.33, 64, 75, "most"]
ALONE = [[size] for size in SIZES]
PAIRS = [SIZES[i : i + 2] for i in range(0, len(SIZES), 2)]
TOKENS = 3
# Of pictures and text, where with 0 two tokens are too close.
SEEDS = {MINIATURES["granite"]: 5, MINIATURES["internvl"]: 1}


class Batch:
    """Rows of images of a family, with scores, features and layout from the references."""

    def __init__(self, mini, rows, seed=0):
        self.mini, self.rows, self.inputs = mini, rows, mini.batch(*rows, seed=seed)
        self.known = mini.known(*rows)
        self.sizes = [size for row in rows for size in row]
        self.images = [[mini.image_of(size, len(row)) for size in row] for row in rows]
        with torch.no_grad():
            self.ids, own = zip(*mini.rows(self.inputs), strict=True)
            self.scores = [[mini.importance(image) for image in row] for row in own]
            self.features = [[mini.features(image) for image in row] for row in own]

    @property
    def flat(self):
        return [image for row in self.images for image in row]

    def stages(self, **rule):
        """`[units]` of each image, row by row."""
        return [
            [reference.stages(i, s, **rule) for i, s in zip(*row, strict=True)]
            for row in zip(self.images, self.scores, strict=True)
        ]

    @torch.no_grad()
    def answers(self, newline="keep", **rule):
        out = []
        for ids, features, images, stages in zip(
            self.ids, self.features, self.images, self.stages(newline=newline, **rule), strict=True
        ):
            pairs = zip(images, stages, strict=True)
            kept = [
                reference.positions(i, stage, i.newline(rule.get("budget"), newline))
                for i, stage in pairs
            ]
            embeddings, _ = reference.splice(self.mini.model, ids, features, kept)
            out.append(reference.continue_from(self.mini.model, embeddings, TOKENS))
        return torch.stack(out)


@pytest.fixture(scope="module", params=MINIATURES)
def mini(request):
    return MINIATURES[request.param]


@pytest.fixture(scope="module")
def alone(mini):
    """An image of each size in a row of its own."""
    return Batch(mini, ALONE, seed=SEEDS.get(mini, 0))


@pytest.fixture(scope="module")
def pairs(mini):
    """Two images of different sizes in each row."""
    return Batch(mini, PAIRS)


def has_newlines(batch):
    return any((image.positions < 0).any() for image in batch.flat)


def newlines(batch):
    return ["keep", "drop"] if has_newlines(batch) else ["keep"]


def named(budget, batch):
    """The budget; "most" in numbers: fewer than most images have, more than some."""
    if budget != "most":
        return budget
    return sorted(len(image.positions) for image in batch.flat)[len(batch.flat) // 2] - 1


def legal(budget, batch, newline="keep"):
    return all(image.kept(budget, newline) is not None for image in batch.flat)


def enough(budget, batch, newline="keep"):
    """The budget, or the smallest one that is legal for every image."""
    least = max(image.counts(newline)[0] for image in batch.flat)
    return budget if isinstance(budget, float) else max(budget, least)


def count(batch, **rule):
    return hivtp_transformers.token_count(batch.mini.model, batch.sizes, **rule, **batch.known)


def visual(ids):
    """Placeholders of each image in prompts `[rows, L]`."""
    return [
        len(list(run))
        for row in ids
        for is_image, run in itertools.groupby((row == IMAGE_TOKEN).tolist())
        if is_image
    ]


def test_the_reference_is_the_unpruned_model(mini):
    """With everything kept it gives the logits of the model as it comes."""
    inputs = mini.inputs(1, 0, 2)
    inputs["pixel_values"] = inputs["pixel_values"].nan_to_num()
    with torch.no_grad():
        logits = mini.model(**inputs).logits
        prompts = mini.prompts(inputs, budget=1_000_000)
        for row, prompt in zip(logits, prompts, strict=True):
            own = reference.logits(mini.model, prompt)
            torch.testing.assert_close(row[-len(own) :], own, rtol=1e-3, atol=1e-3)


def test_every_size_has_the_positions_of_the_model(alone):
    """What the model's own packing makes of each image is what the reference makes of it."""
    model, inputs = alone.mini.model, alone.inputs
    names = ("pixel_values", "image_sizes", "batch_num_images")
    with torch.no_grad():
        encoded = model.model.get_image_features(**{n: inputs[n] for n in names if n in inputs})
    own = torch.cat([f for row in alone.features for f in row])
    packed = getattr(encoded, "pooler_output", encoded)
    packed = torch.cat([features.view(-1, own.shape[1]) for features in packed])
    torch.testing.assert_close(packed, own, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("budget", BUDGETS)
def test_every_size(alone, budget):
    """Exact counts before and after, the same stages, and the same answers."""
    inputs, model = alone.inputs, alone.mini.model
    for newline in newlines(alone):
        rule = {"budget": enough(named(budget, alone), alone, newline), "newline": newline}
        counts = [image.kept(**rule) for image in alone.flat]
        assert count(alone, **rule) == counts
        with hivtp_transformers.apply(model, **rule) as handle:
            short = handle.compact(**inputs)
            assert handle.stats.kept == counts == visual(short["input_ids"])
            same_stages(handle.stats.stages, alone, rule)
            assert torch.equal(answer(model, short, tokens=TOKENS), alone.answers(**rule))


def same_stages(stages, batch, rule):
    """One int8 tensor per grid; a grid that is kept as a whole has no stage to speak of."""
    expected = [stage for row in batch.stages(**rule) for stage in row]
    for grids, image, stage in zip(stages, batch.flat, expected, strict=True):
        assert len(grids) == len(image.grids)
        for grid, numbers in zip(grids, image.grids, strict=True):
            assert grid.dtype == torch.int8 and grid.shape == numbers.shape
            shown, wanted = ~np.isin(numbers, image.hidden), stage[numbers]
            got = grid.cpu().numpy()
            if (wanted[shown] > 0).all():
                got, wanted = got > 0, wanted > 0
            assert (got[shown] == wanted[shown]).all()


def test_every_size_in_ratio_mode(alone):
    inputs, model = alone.inputs, alone.mini.model
    for newline in newlines(alone):
        with hivtp_transformers.apply(model, newline=newline) as handle:
            short = handle.compact(**inputs)
            most = count(alone, newline=newline)
            assert all(kept <= m for kept, m in zip(handle.stats.kept, most, strict=True))
            assert handle.stats.kept == visual(short["input_ids"])
            same_stages(handle.stats.stages, alone, {"newline": newline})
            assert torch.equal(answer(model, short, tokens=TOKENS), alone.answers(newline))


@pytest.mark.parametrize("budget", [0.33, 64])
def test_two_images_in_a_prompt(pairs, budget):
    """In LLaVA-OneVision they are one tile each."""
    inputs, model = pairs.inputs, pairs.mini.model
    for newline in newlines(pairs):
        rule = {"budget": enough(budget, pairs, newline), "newline": newline}
        counts = [image.kept(**rule) for image in pairs.flat]
        assert count(pairs, **rule) == counts
        with hivtp_transformers.apply(model, **rule) as handle:
            assert torch.equal(answer(model, inputs, tokens=TOKENS), pairs.answers(**rule))
            assert handle.stats.kept == counts


def test_more_than_everything(alone):
    """The prompt stays as it is, newlines included."""
    for newline in newlines(alone):
        rule = {"budget": 1_000_000, "newline": newline}
        counts = [len(image.positions) for image in alone.flat]
        assert count(alone, **rule) == counts
        with hivtp_transformers.apply(alone.mini.model, **rule) as handle:
            assert visual(handle.compact(**alone.inputs)["input_ids"]) == counts


def test_the_smallest_budget_is_named_and_works(alone):
    model = alone.mini.model
    for newline in newlines(alone):
        for size, image in zip(alone.sizes, alone.flat, strict=True):
            rule, (least, _) = (
                {"newline": newline, **alone.mini.known([size])},
                image.counts(newline),
            )
            assert hivtp_transformers.token_count(model, [size], budget=least, **rule) == [least]
            assert hivtp_transformers.token_count(model, [size], budget=1e-6, **rule) == [least]
            if least > 1:
                with pytest.raises(ValueError, match=f"budget must be at least {least} for image"):
                    hivtp_transformers.token_count(model, [size], budget=least - 1, **rule)
        leasts = [image.counts(newline)[0] for image in alone.flat]
        least, settings = max(leasts), {"max_new_tokens": 1, "do_sample": False}
        if least > 1:
            with hivtp_transformers.apply(model, budget=least - 1, newline=newline):
                with pytest.raises(ValueError, match=f"budget must be at least {least} for image"):
                    model.generate(**alone.inputs, **settings)
        with hivtp_transformers.apply(model, budget=least, newline=newline) as handle:
            model.generate(**alone.inputs, **settings)
            assert handle.stats.kept == [image.kept(least, newline) for image in alone.flat]


def test_scores(pairs):
    names = ("pixel_values", "image_sizes", "batch_num_images")
    pictures = {name: pairs.inputs[name] for name in names if name in pairs.inputs}
    with hivtp_transformers.apply(pairs.mini.model) as handle:
        scores = handle.scores(**pictures)
    expected = [torch.from_numpy(s) for row in pairs.scores for s in row]
    if pairs.mini is MINIATURES["internvl"]:  # without a prompt each tile is an image
        expected = [s for of_image in expected for s in of_image.split(36)]
    for own, wanted in zip(scores, expected, strict=True):
        assert own.dtype == torch.float32 and not own.requires_grad
        torch.testing.assert_close(own.double(), wanted, rtol=1e-3, atol=0)


def test_any_size_and_any_budget(mini):
    """Every budget is met exactly, or refused with the smallest one that is legal."""
    generator, model = random.Random(0), mini.model
    for _ in range(40):
        ratio = 10 ** generator.uniform(-1, 1)
        height = 10 ** generator.uniform(1, 3.3)
        size = max(1, int(height)), max(1, int(height * ratio))
        image = mini.image_of(size)
        newline = generator.choice(["keep", "drop"]) if (image.positions < 0).any() else "keep"
        _, most = image.counts(newline)
        for budget in (generator.randint(1, most + 9), generator.random(), generator.random() / 50):
            rule = {"budget": budget, "newline": newline, **mini.known([size])}
            kept = image.kept(budget, newline)
            try:
                assert hivtp_transformers.token_count(model, [size], **rule) == [kept], (size, rule)
            except ValueError as error:
                assert kept is None, (size, rule)
                assert f"budget must be at least {image.counts(newline)[0]} for" in str(error)


def test_shares_of_a_whole_number_are_not_rounded_down():
    """0.29 * 100 is 28.999999999999996 in binary."""
    image = reference.Image(np.arange(100), [np.arange(100).reshape(10, 10)])
    assert 0.29 * 100 < 29 and image.kept(0.29) == 29
    model = MINIATURES["llava"].model
    for percent in range(1, 100):
        expected = [math.floor(percent * 576 / 100)]
        assert hivtp_transformers.token_count(model, [(9, 9)], budget=percent / 100) == expected


@pytest.mark.parametrize("seed", range(3))
def test_apportionment(seed):
    """Shares add up, differ from proportion by less than one, and are never zero."""
    generator = random.Random(seed)
    for _ in range(300):
        areas = [
            generator.choice([1, 9, 36, 81, 576, 3000]) for _ in range(generator.randint(1, 9))
        ]
        count = generator.randint(len(areas), sum(areas))
        plain, shares = reference.apportion(count, areas), reference.share(count, areas)
        assert sum(plain) == sum(shares) == count
        for own, area in zip(plain, areas, strict=True):
            assert abs(own - count * area / sum(areas)) < 1
        assert all(1 <= own <= area for own, area in zip(shares, areas, strict=True))
        if 0 not in plain:
            assert shares == plain


def test_apportionment_by_hand():
    assert reference.apportion(3, [1, 1]) == [2, 1]
    assert reference.apportion(5, [1, 2, 1]) == [1, 3, 1]
    assert reference.share(3, [576, 1, 1]) == [1, 1, 1]
    assert reference.share(4, [300, 300, 1]) == [1, 2, 1]


def test_samples_of_several_images():
    """The counts depend on which images are together in a sample."""
    mini = MINIATURES["llava_onevision"]
    sizes, counts = [(480, 640), (380, 300), (300, 3000)], []
    for together in ([1, 1, 1], [2, 1], [1, 2], [3]):
        left = iter(sizes)
        images = [mini.image_of(next(left), many) for many in together for _ in range(many)]
        for budget in (0.5, 50, 1000):
            own = hivtp_transformers.token_count(
                mini.model, sizes, budget=budget, batch_num_images=together
            )
            assert own == [image.kept(budget) for image in images]
            counts.append(tuple(own))
    assert len(set(counts)) > 6
    assert hivtp_transformers.token_count(mini.model, sizes, budget=0.5) == list(counts[0])


def test_internvl_needs_its_processor():
    mini = MINIATURES["internvl"]
    with pytest.raises(ValueError, match="processor"):
        hivtp_transformers.token_count(mini.model, [(480, 640)], budget=0.5)


@pytest.mark.parametrize("rule", [{}, {"budget": 700}, {"budget": 0.01}], ids=str)
def test_a_grid_of_more_units_than_one_selection_takes(rule):
    """It is cut in halves, which share what the grid has."""
    model, size = tiny_onevision.build(grid=27, most=9), (1150, 1000)
    inputs = tiny_onevision.inputs_of(model, [size])
    ((_, ((tiles, _),)),) = tiny_onevision.rows_of(model, inputs)
    image = tiny_onevision.image_of(model, size, len(tiles))
    assert image.grids[1].size > 4096
    scores = tiny_onevision.importance(model, tiles, size)
    stage = reference.stages(image, scores, **rule)
    with hivtp_transformers.apply(model, **rule) as handle:
        kept = visual(handle.compact(**inputs)["input_ids"])
        assert kept == [int(reference.positions(image, stage).sum())]
        for grid, numbers in zip(handle.stats.stages[0], image.grids, strict=True):
            assert (grid.numpy() == stage[numbers]).all()
    if rule:
        own = hivtp_transformers.token_count(model, [size], **rule)
        assert own == [image.kept(rule["budget"])]
