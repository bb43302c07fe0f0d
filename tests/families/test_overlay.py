"""The picture of a selection: every unit in its place, in the colour of its stage."""

import sys
from types import SimpleNamespace

import hivtp_transformers
import numpy as np
import pytest
import tiny_internvl
import tiny_llava
import tiny_llava_next
import torch
from hivtp_transformers import overlay
from miniatures import MINIATURES
from PIL import Image

WIDTH, GAP, TITLE, FOOT = 600, 20, 40, 75  # pixels of the picture's parts


def panels(picture, sizes):
    """The left and right picture of each row, from the heights and widths of what they show."""
    top, rows = 0, []
    for height, width in sizes:
        own = round(WIDTH * height / width)
        lefts = (GAP, 2 * GAP + WIDTH)
        boxes = [(left, top + TITLE, left + WIDTH, top + TITLE + own) for left in lefts]
        rows.append([np.asarray(picture.crop(box)).astype(int) for box in boxes])
        top += TITLE + own + FOOT
    assert abs(top - picture.height) <= len(rows)
    return rows


def centres(panel, shape):
    """The colour in the middle of each patch, `[H, W, 3]`."""
    y, x = ((np.arange(n) + 0.5) * size / n for n, size in zip(shape, panel.shape, strict=False))
    return panel[y.astype(int)][:, x.astype(int)]


def red(height, width):
    """A photo on which patches that are kept stay red under a tint, and others fade."""
    return np.broadcast_to(np.array([255, 0, 0], np.uint8), (height, width, 3)).copy()


def kept(panel, shape):
    colours = centres(panel, shape)
    return colours[..., 0] - colours[..., 1] > 120


def test_llava_shows_the_middle_of_the_photo(model):
    photo = red(300, 500)
    photo[:, :100] = photo[:, 400:] = (0, 0, 255)  # what the processor cuts off
    with hivtp_transformers.apply(model, budget=100) as handle:
        tiny_llava.answer(model, tiny_llava.three(), tokens=1)
        for index in (0, 2, 3, -1):
            ((left, right),) = panels(handle.overlay(photo, index), [(300, 300)])
            stage = handle.stats.stages[index][0].numpy()
            assert np.array_equal(kept(left, (24, 24)), stage > 0)
            blue = left[..., 2] - left[..., 0] > 200
            assert not blue.any()
            assert right.std() > 10
            colours = centres(left, (24, 24))
            for number, name, _ in overlay.STAGES:
                if name != "filled":
                    assert len(np.unique(colours[stage == number], axis=0)) == 1
            assert not np.array_equal(colours[stage == 1][0], colours[stage == 2][0])


def test_the_heat_map_shows_the_scores(model):
    with hivtp_transformers.apply(model, budget=100) as handle:
        inputs = tiny_llava.one()
        tiny_llava.answer(model, inputs, tokens=1)
        (scores,) = handle.scores(inputs["pixel_values"])
        scores = scores.view(24, 24).numpy()
        ((_, right),) = panels(handle.overlay(np.zeros((90, 90, 3), np.uint8)), [(1, 1)])
    light = centres(right, (24, 24)).sum(-1)
    order = np.argsort(scores.flatten())
    assert light.flatten()[order[-50:]].mean() > 1.5 * light.flatten()[order[:50]].mean()


@pytest.mark.parametrize("size", [(300, 900), (700, 333)], ids=str)
@pytest.mark.parametrize("options", [{}, {"budget": 300}], ids=["ratio", "budget"])
def test_llava_next_shows_all_tiles(size, options):
    model = MINIATURES["llava_next"].model
    with hivtp_transformers.apply(model, **options) as handle:
        tiny_llava.answer(model, tiny_llava_next.inputs_of([(336, 336), size]), tokens=1)
        picture = handle.overlay(Image.fromarray(red(*size)), index=1)
        small, large = (stage.numpy() for stage in handle.stats.stages[1])
    (base, _), (rest, heat) = panels(picture, [size, size])
    assert np.array_equal(kept(base, (24, 24)), small > 0)
    assert np.array_equal(kept(rest, large.shape), large > 0)
    assert heat.std() > 10


@pytest.mark.parametrize("method", ["hivtp", "uniform"])
@pytest.mark.parametrize("name", MINIATURES)
def test_every_family_has_a_picture(name, method):
    mini = MINIATURES[name]
    options = {"budget": 80 if name == "llava_next" else 30, **mini.options}
    with hivtp_transformers.apply(mini.model, method=method, **options) as handle:
        tiny_llava.answer(mini.model, mini.inputs(1), tokens=1)
        picture = handle.overlay(red(120, 100))
        assert picture.mode == "RGB" and picture.width == 2 * WIDTH + 3 * GAP
        with pytest.raises(IndexError, match="one of the 1 images of the last call, got 1"):
            handle.overlay(red(9, 9), index=1)


def test_a_call_keeps_no_second_encoding(model):
    """The picture costs when it is asked for."""
    with hivtp_transformers.apply(model, budget=100) as handle:
        encode, calls = handle._pruner.tower.encode, []
        handle._pruner.tower.encode = lambda tiles: calls.append(len(tiles)) or encode(tiles)
        tiny_llava.answer(model, tiny_llava.one(), tokens=1)
        assert calls == [1]
        handle.overlay(red(9, 9))
        assert calls == [1, 1]


def test_refused_without_a_pruned_call(model):
    with hivtp_transformers.apply(model, budget=100) as handle:
        with pytest.raises(RuntimeError, match="overlay needs pruning to be applied and a call"):
            handle.overlay(red(9, 9))
        tiny_llava.answer(model, tiny_llava.one(), tokens=1)
    with pytest.raises(RuntimeError, match="overlay needs"):
        handle.overlay(red(9, 9))
    with hivtp_transformers.apply(model, budget=576) as handle:
        tiny_llava.answer(model, tiny_llava.one(), tokens=1)
        with pytest.raises(RuntimeError, match="overlay needs"):
            handle.overlay(red(9, 9))


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("raise ModuleNotFoundError(name='matplotlib')", "matplotlib is not installed"),
        ("import math; math.gone", "matplotlib does not load: AttributeError: module 'math' has"),
        ("raise SystemError('a\\nb')", "matplotlib does not load: SystemError: a b"),
    ],
)
def test_matplotlib_is_asked_for(model, monkeypatch, tmp_path, code, reason):
    monkeypatch.delitem(sys.modules, "hivtp_transformers.overlay")
    monkeypatch.delattr("hivtp_transformers.overlay")
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    (tmp_path / "matplotlib.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    with hivtp_transformers.apply(model, budget=100) as handle, torch.no_grad():
        model(**tiny_llava.one())
        with pytest.raises(ImportError, match=rf'pip install "hivtp_kernels\[demo\]": {reason}'):
            handle.overlay(red(9, 9))


@pytest.mark.parametrize(
    ("fit", "processor", "blue"),
    [
        (None, None, False),  # CLIP's: the middle
        ("crop", None, False),
        ("squeeze", None, True),
        ("pad", None, True),
        (None, SimpleNamespace(do_center_crop=False), True),
        (None, SimpleNamespace(image_processor=SimpleNamespace(do_center_crop=True)), False),
        (None, SimpleNamespace(do_pad=True, do_center_crop=True), True),
        ("crop", SimpleNamespace(do_pad=True), False),  # what the caller says counts
    ],
)
def test_the_part_of_the_photo_that_the_model_saw(model, fit, processor, blue):
    photo = red(300, 500)
    photo[:, :90] = photo[:, 410:] = (0, 0, 255)  # outside of the middle
    with hivtp_transformers.apply(model, budget=575) as handle:
        tiny_llava.answer(model, tiny_llava.one(), tokens=1)
        picture = handle.overlay(photo, fit=fit, processor=processor)
        shape = (300, 500) if fit == "squeeze" or (blue and processor and fit is None) else (1, 1)
        if getattr(processor, "do_pad", False):
            shape = (1, 1)
        ((left, _),) = panels(picture, [shape])
        ((stage,),) = handle.stats.stages
    assert (left[..., 2] - left[..., 0] > 150).any() == blue
    if fit == "pad":
        bars, middle = np.median(left[:110, :, 0]), np.median(left[130:470, 200:400, 0])
        assert bars < 100 < 200 < middle
    assert int((stage > 0).sum()) == 575


def test_an_unknown_fit_is_refused(model):
    with hivtp_transformers.apply(model, budget=100) as handle:
        tiny_llava.answer(model, tiny_llava.one(), tokens=1)
        with pytest.raises(ValueError, match="fit must be one of crop, squeeze, pad, got 'zoom'"):
            handle.overlay(red(9, 9), fit="zoom")


def test_a_fit_without_effect_is_refused():
    mini = MINIATURES["llava_next"]
    with hivtp_transformers.apply(mini.model, **mini.options) as handle:
        tiny_llava.answer(mini.model, mini.inputs(1), tokens=1)
        with pytest.raises(ValueError, match="fit must be None for llava_next, .* got 'pad'"):
            handle.overlay(red(9, 9), fit="pad")


@pytest.mark.parametrize("size", [(1, 1000), (1000, 1), (1, 1)], ids=str)
@pytest.mark.parametrize("name", ["llava", "llava_next", "internvl"])
def test_thin_photos(name, size):
    """A pixel high or wide: every unit is still there, in a picture of a sensible size."""
    mini = MINIATURES[name]
    options = {**mini.options, "config": None, "budget": 80 if name == "llava_next" else 30}
    with hivtp_transformers.apply(mini.model, **options) as handle:
        tiny_llava.answer(mini.model, mini.inputs(1), tokens=1)
        picture = handle.overlay(red(*size), fit="squeeze" if name == "llava" else None)
        (stages,) = handle.stats.stages
    assert picture.width == 2 * WIDTH + 3 * GAP
    assert picture.height <= len(stages) * (6 * WIDTH + TITLE + FOOT + 2)
    if len(stages) == 1:
        # Eight pixels for each unit, and no thinner than one to six.
        shape = stages[0].shape
        height, width = (max(pixels, 8 * n) for pixels, n in zip(size, shape, strict=True))
        ((left, _),) = panels(picture, [(min(max(height / width, 1 / 6), 6), 1)])
        assert np.array_equal(kept(left, shape), stages[0].numpy() > 0)


@pytest.mark.parametrize("tiles", [1, 3, 7])
def test_internvl_shows_its_tiles(tiles):
    """Each tile the part of the photo that it was cut from, and the whole behind them."""
    model = tiny_internvl.build()
    columns = max(tiles - 1, 1)
    shades = [255 * (i + 1) // columns for i in range(columns)]
    photo = np.concatenate([red(100, 100) // 255 * np.uint8(shade) for shade in shades], axis=1)
    with hivtp_transformers.apply(model, budget=0.9) as handle:
        tiny_llava.answer(model, tiny_internvl.inputs_of(model, [tiles]), tokens=1)
        picture = handle.overlay(photo)
        (stages,) = handle.stats.stages
    sizes = [(100, 100)] * (tiles - 1) + [photo.shape[:2]]
    for i, ((left, _), stage) in enumerate(zip(panels(picture, sizes), stages, strict=True)):
        shade = np.median(centres(left, (6, 6))[stage.numpy() > 0][:, 0])
        if i < tiles - 1:
            assert abs(shade - shades[i]) < 60
