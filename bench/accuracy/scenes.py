"""Scenes to ask about: glyphs, decoys and texture panels on real photos, generated from a seed.

Scene `index` of a `split` is the same in every process. Photos, fonts and texture crops of the test
split never appear in training.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
import skimage.data
from PIL import Image, ImageDraw, ImageFont
from sklearn.datasets import load_sample_image

PATCH = 14
MOST_ALIKE = 3  # objects of one colour
IN_SIGHT = 3 * PATCH  # least visible height and width of a panel to ask about, in pixels
GRID = 24
GLYPHS = ("A", "H", "L", "O", "T", "X", "Z")
COLOURS = {
    "red": (214, 39, 40),
    "green": (44, 160, 60),
    "blue": (40, 90, 220),
    "yellow": (245, 215, 50),
    "purple": (150, 70, 190),
    "white": (245, 245, 245),
}
TEXTURES = ("brick", "grass", "gravel", "stripes", "checks", "dots", "waves")
PHOTO = "photo"  # the answer where there is no panel
QUADRANTS = ("top left", "top right", "bottom left", "bottom right")

_PHOTOS = {
    "train": (
        "astronaut", "camera", "coffee", "coins", "hubble_deep_field", "ihc", "moon",
        "motorcycle_left", "page", "rocket", "china",
    ),
    "test": ("chelsea", "flower", "retina", "cell"),
}  # fmt: skip
_FONTS = {
    "train": (
        "DejaVuSans", "DejaVuSans-Bold", "DejaVuSans-Oblique", "DejaVuSansMono",
        "DejaVuSansMono-Bold", "DejaVuSansMono-Oblique", "DejaVuSerif", "DejaVuSerif-Bold",
        "STIXGeneral", "cmb10", "cmr10", "cmss10", "cmtt10",
    ),
    "test": ("STIXGeneralBol", "DejaVuSans-BoldOblique"),
}  # fmt: skip
_LARGE = 96  # size at which glyphs are rendered before scaling down, in pixels
NO_LABEL = -100


class Placed(NamedTuple):
    """A glyph in a scene: its centre and longer side, in pixels."""

    glyph: int
    colour: int
    x: float
    y: float
    size: float


@dataclass
class Scene:
    """A scene and its ground truth.

    Attributes
    ----------
    image : ndarray
        uint8 `[side, side, 3]`.
    background : ndarray
        The scene without its objects.
    objects : list of Placed
    panels : list of int
        The texture in each quadrant of the whole grid, `len(TEXTURES)` where the photo shows, -1
        where too little is visible.
    patches : ndarray
        int64 `[5, grid, grid]`: glyph, colour and texture of each patch (the highest number of
        each means none), whether it contains the centre of an object, and its quadrant; `NO_LABEL`
        where that is ambiguous.
    offset : tuple of int
        Row and column of the first patch in the whole grid; a small scene is a window of it.
    """

    image: np.ndarray
    background: np.ndarray
    objects: list[Placed]
    panels: list[int]
    patches: np.ndarray
    offset: tuple[int, int]

    @property
    def quadrants(self) -> list[int]:
        """The quadrant of the whole grid that contains the centre of each object."""
        top, left = (PATCH * (o - GRID // 2) for o in self.offset)
        return [2 * (o.y + top >= 0) + (o.x + left >= 0) for o in self.objects]


def make_scene(split: str, index: int, grid: int = GRID, seed: int = 0) -> Scene:
    """Scene number `index`, with `grid` x `grid` patches."""
    rng = np.random.default_rng([seed, index, grid, ("train", "test").index(split)])
    side = grid * PATCH
    photo = _background(rng, split, side)
    top, left = (int(o) for o in rng.integers(GRID - grid + 1, size=2))
    panels, panel_map = _panels(rng, split, photo, (top, left))
    image = Image.fromarray(photo)
    _decoys(rng, image, count=rng.integers(0, 1 + 6 * grid // GRID))
    background = np.asarray(image)
    image = image.copy()
    ids = np.full((side, side), -1)
    objects = _objects(rng, split, image, ids, grid)
    light, noise = rng.uniform(0.85, 1.1), rng.normal(0, rng.uniform(0, 6), background.shape)
    shot, empty = (
        (pixels * light + noise).clip(0, 255).astype(np.uint8)
        for pixels in (np.asarray(image), background)
    )
    rows, columns = np.arange(grid)[:, None] + top, np.arange(grid) + left
    quadrant = 2 * (rows >= GRID // 2) + (columns >= GRID // 2)
    patches = np.stack([*_labels(ids, panel_map, objects, grid), quadrant])
    return Scene(shot, empty, objects, panels, patches, (top, left))


def _background(rng: np.random.Generator, split: str, side: int) -> np.ndarray:
    names = _PHOTOS[split]
    photo = _photo(names[rng.integers(len(names))])
    height, width = photo.shape[:2]
    # From a close-up to the whole photo, for scenes of any size.
    crop = int(min(height, width) * rng.uniform(0.35, 1.0) * min(1.0, 0.25 + side / 336))
    top, left = rng.integers(height - crop + 1), rng.integers(width - crop + 1)
    part = Image.fromarray(photo[top : top + crop, left : left + crop])
    part = part.resize((side, side), Image.Resampling.BILINEAR)
    return np.array(part.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if rng.random() < 0.5 else part)


def _panels(
    rng: np.random.Generator, split: str, photo: np.ndarray, offset: tuple[int, int]
) -> tuple[list[int], np.ndarray]:
    """Draw textures into some quadrants of the whole grid, in place in `photo`."""
    side, half = len(photo), GRID // 2 * PATCH
    panels, panel_map = [], np.full((side, side), len(TEXTURES))
    for quadrant in range(4):
        texture = len(TEXTURES) if rng.random() < 0.4 else int(rng.integers(len(TEXTURES)))
        sizes = [half, half]
        if texture < len(TEXTURES):
            sizes = [int(share * half) for share in rng.uniform(0.6, 0.98, 2)]
        slices = []
        for size, second, start in zip(sizes, divmod(quadrant, 2), offset, strict=True):
            at = second * half + int(rng.integers(half - size + 1)) - PATCH * start
            slices.append(slice(max(at, 0), max(min(at + size, side), 0)))
        place = tuple(slices)
        height, width = panel_map[place].shape
        panels.append(texture if min(height, width) >= IN_SIGHT else -1)
        if texture < len(TEXTURES) and height and width:
            drawn = _texture(rng, split, TEXTURES[texture], height, width)
            opacity = rng.uniform(0.75, 1.0)
            photo[place] = (photo[place] * (1 - opacity) + drawn * opacity).astype(np.uint8)
            panel_map[place] = texture
    return panels, panel_map


def _texture(
    rng: np.random.Generator, split: str, name: str, height: int, width: int
) -> np.ndarray:
    """A low-contrast texture, `[height, width, 3]`."""
    if name in ("brick", "grass", "gravel"):
        source = _photo(name)
        # Train and test use different halves of the picture.
        half = source[:, :300] if split == "train" else source[:, 320:]
        zoom = rng.uniform(0.8, 1.25)
        tall, wide = min(len(half), int(height * zoom)), min(half.shape[1], int(width * zoom))
        top, left = rng.integers(len(half) - tall + 1), rng.integers(half.shape[1] - wide + 1)
        part = Image.fromarray(half[top : top + tall, left : left + wide])
        grey = np.asarray(part.resize((width, height), Image.Resampling.BILINEAR))[..., 0] / 255.0
        grey = 0.5 + (grey - grey.mean()) * 1.2
    else:
        y, x = np.mgrid[:height, :width].astype(np.float32)
        period, phase = rng.uniform(9, 15), rng.uniform(0, 2 * math.pi, 2)
        u, v = 2 * math.pi * x / period + phase[0], 2 * math.pi * y / period + phase[1]
        if name == "stripes":
            wave = np.sign(np.sin(u + v if rng.random() < 0.5 else u - v))
        elif name == "checks":
            wave = np.sign(np.sin(u)) * np.sign(np.sin(v))
        elif name == "dots":
            wave = np.where(np.sin(u) + np.sin(v) > 0.9, 1.0, -0.4)
        else:
            wave = np.sign(np.sin(v + 2.2 * np.sin(u / 2)))
        grey = 0.5 + rng.uniform(0.12, 0.25) * wave
    light, dark = rng.uniform(140, 225, 3), rng.uniform(30, 110, 3)
    return (dark + (light - dark) * grey.clip(0, 1)[..., None]).clip(0, 255)


def _decoys(rng: np.random.Generator, image: Image.Image, count: int) -> None:
    """Draw bright blobs and strokes that attract attention but are never asked about."""
    draw = ImageDraw.Draw(image)
    for _ in range(count):
        x, y = rng.uniform(0, image.width, 2)
        size = rng.uniform(8, 34)
        colour = tuple(int(c) for c in rng.integers(0, 256, 3))
        if rng.random() < 0.5:
            draw.ellipse([x - size / 2, y - size / 3, x + size / 2, y + size / 3], fill=colour)
        else:
            ends = rng.normal((x, y), size, (3, 2))
            draw.line([tuple(end) for end in ends], fill=colour, width=int(rng.integers(2, 5)))


def _objects(
    rng: np.random.Generator, split: str, image: Image.Image, ids: np.ndarray, grid: int
) -> list[Placed]:
    """Draw glyphs where they do not overlap, each with its centre well inside one patch."""
    side = image.width
    wanted = (
        int(rng.integers(4, 9))
        if grid == GRID
        else max(1, round(grid / 3 + rng.uniform(-1.5, 1.5)) - 1)
    )
    objects: list[Placed] = []
    for _ in range(40 * wanted):
        if len(objects) == wanted:
            break
        size = rng.uniform(16, min(56, side * 0.9))
        # Centred in one patch, not on the border of several.
        x, y = PATCH * (rng.integers(grid, size=2) + rng.uniform(0.25, 0.75, 2))
        if min(x, y, side - x, side - y) < size / 2:
            continue
        crowded = any(max(abs(x - o.x), abs(y - o.y)) < (size + o.size) / 2 + 3 for o in objects)
        if crowded:
            continue
        glyph, colour = int(rng.integers(len(GLYPHS))), int(rng.integers(len(COLOURS)))
        # Often a colour that is used already, so that counts go beyond one.
        if objects and rng.random() < 0.4:
            colour = objects[rng.integers(len(objects))].colour
        if sum(o.colour == colour for o in objects) == MOST_ALIKE:
            continue
        placed = Placed(glyph, colour, x, y, size)
        _draw(rng, split, image, ids, placed, len(objects))
        objects.append(placed)
    return objects


def _draw(
    rng: np.random.Generator,
    split: str,
    image: Image.Image,
    ids: np.ndarray,
    placed: Placed,
    number: int,
) -> None:
    fonts = _FONTS[split]
    font, stroke = fonts[rng.integers(len(fonts))], int(rng.integers(1, 8))
    fill, outline = _glyph(GLYPHS[placed.glyph], font, stroke)
    angle = rng.uniform(-12, 12)
    scale = placed.size / max(outline.size)
    size = [max(3, round(s * scale)) for s in outline.size]
    masks = [
        m.rotate(angle, Image.Resampling.BILINEAR).resize(size, Image.Resampling.BOX)
        for m in (outline, fill)
    ]
    corner = (round(placed.x - size[0] / 2), round(placed.y - size[1] / 2))
    jitter = rng.integers(-18, 19, 3)
    colour = np.clip(np.array(list(COLOURS.values())[placed.colour]) + jitter, 0, 255)
    edge = rng.integers(0, 40, 3)
    for mask, paint in zip(masks, (edge, colour), strict=True):
        image.paste(tuple(int(c) for c in paint), corner, mask)
    rows = np.s_[max(corner[1], 0) : corner[1] + size[1], max(corner[0], 0) : corner[0] + size[0]]
    ids[rows] = number


def _labels(ids: np.ndarray, panel_map: np.ndarray, objects: list[Placed], grid: int) -> np.ndarray:
    def by_patch(pixels: np.ndarray) -> np.ndarray:
        return pixels.reshape(grid, PATCH, grid, PATCH).swapaxes(1, 2).reshape(grid, grid, -1)

    of_patch, area = by_patch(ids), PATCH * PATCH
    covered = (of_patch >= 0).sum(-1) / area
    glyph = np.where(covered > 0, NO_LABEL, len(GLYPHS))
    colour = np.where(covered > 0, NO_LABEL, len(COLOURS))
    centre = np.zeros((grid, grid), dtype=np.int64)
    at = (np.arange(grid) + 0.5) * PATCH
    for o in objects:
        row, column = (min(int(c / PATCH), grid - 1) for c in (o.y, o.x))
        # Only the middle of an object is labelled; its rim is ambiguous.
        mine = np.hypot((at[:, None] - o.y), (at - o.x)) < o.size / 4
        mine[row, column] = True
        glyph[mine], colour[mine] = o.glyph, o.colour
        centre[row, column] = 1
    panel = by_patch(panel_map)
    texture = np.where((panel == panel[..., :1]).all(-1), panel[..., 0], NO_LABEL)
    texture[covered > 0.6] = NO_LABEL
    return np.stack([glyph, colour, texture, centre])


@cache
def _photo(name: str) -> np.ndarray:
    """uint8 `[height, width, 3]`, scaled down to the size needed."""
    if name in ("china", "flower"):
        pixels = load_sample_image(f"{name}.jpg")
    else:
        (path,) = Path(skimage.data.__file__).parent.glob(f"{name}.*")
        pixels = np.asarray(Image.open(path).convert("RGB"))
    image = Image.fromarray(pixels)
    if min(image.size) > 512:
        scale = 512 / min(image.size)
        image = image.resize([round(s * scale) for s in image.size], Image.Resampling.BOX)
    return np.asarray(image)


@cache
def _glyph(glyph: str, font: str, weight: int) -> tuple[Image.Image, Image.Image]:
    """Masks of the glyph without and with its outline, cropped to the outline."""
    path = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / f"{font}.ttf"
    letters = ImageFont.truetype(str(path), _LARGE)
    masks = []
    for stroke in (weight, weight + 8):
        mask = Image.new("L", (2 * _LARGE, 2 * _LARGE))
        ImageDraw.Draw(mask).text(
            (_LARGE, _LARGE), glyph, 255, letters, anchor="mm", stroke_width=stroke
        )
        masks.append(mask)
    box = masks[1].getbbox()
    return masks[0].crop(box), masks[1].crop(box)
