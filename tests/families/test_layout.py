"""The model of an image by itself: positions, features of several levels, prompts of any rank."""

import hivtp_transformers
import pytest
import tiny_llava
import torch
from hivtp_transformers import families
from hivtp_transformers.families.llava import Llava
from hivtp_transformers.layout import Image, Layout, tiled_image
from hivtp_transformers.prompt import measure, shorten
from tiny_llava import handed_over, needs_features, one, three

# A row of units with a newline after each two, and an image whose first unit is not shown.
LINES = Image(torch.tensor([0, 1, -1, 2, 3, -1]), (torch.arange(4).view(2, 2),), units=4)
HIDDEN = Image(torch.tensor([1, 2, 3]), (torch.arange(4).view(2, 2),), units=4)


def test_positions_and_newlines():
    layout = Layout([LINES, HIDDEN], torch.device("cpu"))
    kept = layout.keep(torch.tensor([0, 1, 1, 0, 9, 0, 3, 2], dtype=torch.int8), [2, 2])
    assert kept.mask.tolist() == [False, True, True, True, False, True, False, True, True]
    assert kept.units.tolist() == [1, 2, 6, 7] and kept.counts == [4, 2]
    features = torch.tensor([[10.0], [20.0], [60.0], [70.0]])
    arranged = kept.arrange(features, torch.tensor([-1.0]))
    assert arranged.flatten().tolist() == [10, -1, 20, -1, 60, 70]


@pytest.mark.parametrize("stays", [False, [False, True]], ids=str)
def test_newlines_dropped(stays):
    layout = Layout([LINES, LINES], torch.device("cpu"), stays)
    stage = torch.tensor([1, 0, 0, 0, 0, 0, 0, 1], dtype=torch.int8)
    kept = layout.keep(stage, None)
    assert kept.counts == ([1, 1] if stays is False else [1, 3])
    assert kept.units.tolist() == [0, 7]


def test_what_a_grid_shows():
    assert LINES.newlines == 2 and HIDDEN.newlines == 0
    assert HIDDEN.shown(HIDDEN.grids[0]).tolist() == [[False, True], [True, True]]
    image = tiled_image(2, 3, tiles=2)
    assert [grid.tolist() for grid in image.grids] == [
        [[0, 1, 2], [3, 4, 5]],
        [[6, 7, 8], [9, 10, 11]],
    ]
    assert image.positions.tolist() == list(range(12)) and image.tiles == 2


def test_anything_per_token_is_shortened_in_its_last_dimension():
    """Positions in three or four rows, token types: what models with M-RoPE have."""
    ids = torch.tensor([[1, 9, 9, 2], [0, 3, 9, 9]])
    mask = torch.tensor([[1, 1, 1, 1], [0, 1, 1, 1]])
    positions = torch.arange(24).view(3, 2, 4)
    types = (ids == 9).long()
    prompts = measure(ids, mask, image_token=9)
    assert prompts.runs == [[2], [2]]
    given = {"input_ids": ids, "attention_mask": mask, "position_ids": positions, "types": types}
    out = shorten(given, prompts, torch.tensor([False, True, True, False]), 3, pad_token=0)
    assert out["input_ids"].tolist() == [[1, 9, 2], [0, 3, 9]]
    assert out["types"].tolist() == [[0, 1, 0], [0, 0, 1]]
    for axis, row in zip(out["position_ids"], positions, strict=True):
        assert axis[0].tolist() == row[0, [0, 2, 3]].tolist()
        assert axis[1, 1:].tolist() == row[1, [1, 2]].tolist()


@pytest.mark.parametrize(
    ("ids", "runs"),
    [
        ([9, 9, 1, 9], [2, 1]),
        ([1, 2, 3, 4], []),
        ([9, 9, 9, 9], [4]),
        ([1, 9, 2, 9], [1, 1]),
    ],
)
def test_runs_of_placeholders(ids, runs):
    assert measure(torch.tensor([ids]), None, image_token=9).runs == [runs]


class TwoLevels(Llava):
    """As DeepStack has them: a second tensor per unit, injected further up."""

    handed = None

    def features(self, model, hidden, images, units):
        (features,) = super().features(model, hidden, images, units)
        return features, units[:, None].float()

    def encoder_output(self, features, *deeper):
        type(self).handed = [len(image) for image in features], deeper
        return super().encoder_output(features)


@needs_features
def test_levels_follow_the_same_units(monkeypatch):
    monkeypatch.setitem(families.FAMILIES, "llava", TwoLevels)
    model = tiny_llava.build()
    with hivtp_transformers.apply(model, budget=100) as handle, torch.no_grad():
        handle.compact(**three())
        stages = handle.stats.stages
    counts, (deeper,) = TwoLevels.handed
    assert counts == [100] * 4
    for image, (own, (stage,)) in enumerate(zip(deeper, stages, strict=True)):
        units = stage.flatten().nonzero() + image * 576
        assert torch.equal(own, units.float())


def test_features_are_those_of_the_kept_units(model):
    encoded = model.get_image_features(one()["pixel_values"])
    (unpruned,) = getattr(encoded, "pooler_output", encoded)
    with hivtp_transformers.apply(model, budget=100) as handle, torch.no_grad():
        features = handed_over(handle.compact(**one()))
    ((stage,),) = handle.stats.stages
    torch.testing.assert_close(features, unpruned[stage.flatten() > 0], rtol=1e-4, atol=1e-4)
