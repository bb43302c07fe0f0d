"""Pictures of a selection: which units are kept, and how they score."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.collections import PatchCollection
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from PIL import Image

if TYPE_CHECKING:
    from .families import Family

# Stage of `Selection.stage`, its name, and a colour that colour-blind readers can tell apart too.
STAGES = ((1, "global", "#E69F00"), (2, "local", "#56B4E9"), (3, "filled", "#009E73"))
FITS = ("crop", "squeeze", "pad")
_WIDTH, _GAP, _TITLE, _FOOT = 6.0, 0.2, 0.4, 0.75  # inches
_THINNEST = 6.0  # maximum aspect ratio of a panel; thinner photos are stretched
_PIXELS = 8  # minimum pixels per side of a unit


class Grid(NamedTuple):
    """What is drawn of one grid of an image.

    Attributes
    ----------
    photo : Image
        What the grid shows, however large.
    stage : ndarray
        int8 `[H, W]`, as `Selection.stage`; 0 if a unit was dropped.
    scores : ndarray
        `[H, W]`.
    """

    photo: Image.Image
    stage: np.ndarray
    scores: np.ndarray


def fit_of(fit: str | None, processor: Any, family: Family) -> str:
    """How the processor fitted a photo to a square, as `Family.views` takes it."""
    if not family.one_grid:
        if fit is not None:
            raise ValueError(
                f"fit must be None for {family.config.model_type}, whose tiles show all of the "
                f"photo, got {fit!r}"
            )
        return "squeeze"
    if fit is not None:
        if fit not in FITS:
            raise ValueError(f"fit must be one of {', '.join(FITS)}, got {fit!r}")
        return fit
    images = getattr(processor, "image_processor", processor)
    if images is None:
        return "crop" if family.tower_class.prefix else "squeeze"
    if getattr(images, "do_pad", False):
        return "pad"
    return "crop" if getattr(images, "do_center_crop", False) else "squeeze"


def draw(grids: list[Grid]) -> Image.Image:
    """A row for each grid: kept units framed by stage, and the scores as a heat map."""
    grids = [grid._replace(photo=_large_enough(grid)) for grid in grids]
    heights = [_WIDTH * _aspect(grid.photo) for grid in grids]
    width = 2 * _WIDTH + 3 * _GAP
    height = sum(heights) + len(grids) * (_TITLE + _FOOT)
    figure = Figure(figsize=(width, height), dpi=100, facecolor="white")
    top = 0.0
    for grid, own in zip(grids, heights, strict=True):
        places = []
        for column in range(2):
            left = _GAP + column * (_WIDTH + _GAP)
            bottom = height - top - _TITLE - own
            places.append((left / width, bottom / height, _WIDTH / width, own / height))
        photo = np.asarray(grid.photo.convert("RGB"))
        _draw_kept(_canvas(figure, places[0], photo), photo, grid.stage)
        _draw_scores(_canvas(figure, places[1], photo), photo, grid.scores)
        top += _TITLE + own + _FOOT
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return Image.open(buffer).convert("RGB")


def _large_enough(grid: Grid) -> Image.Image:
    """The photo, enlarged where a unit would have less than a few pixels."""
    (rows, columns), photo = grid.stage.shape, grid.photo
    size = max(photo.width, _PIXELS * columns), max(photo.height, _PIXELS * rows)
    return photo if size == photo.size else photo.resize(size, Image.Resampling.NEAREST)


def _aspect(photo: Image.Image) -> float:
    """Height over width of a panel."""
    return min(max(photo.height / photo.width, 1 / _THINNEST), _THINNEST)


def _draw_kept(axes: Axes, photo: np.ndarray, stage: np.ndarray) -> None:
    (rows, columns), (pixel_rows, pixel_columns) = stage.shape, photo.shape[:2]
    height, width = pixel_rows / rows, pixel_columns / columns
    y = np.arange(pixel_rows) * rows // pixel_rows
    x = np.arange(pixel_columns) * columns // pixel_columns
    faded = 0.25 * _grey(photo)[..., None] + 0.75 * 245
    shown = np.where((stage > 0)[y][:, x][..., None], photo, faded).astype(np.uint8)
    axes.imshow(shown, extent=_extent(photo), aspect="auto")

    legend = []
    for number, name, colour in STAGES:
        units = [
            Rectangle((column * width, row * height), width, height)
            for row, column in np.argwhere(stage == number)
        ]
        if not units:
            continue
        fill = PatchCollection(units, facecolor=colour, edgecolor="none", alpha=0.18)
        frame = PatchCollection(units, facecolor="none", edgecolor=colour, linewidth=1.1)
        axes.add_collection(fill)
        axes.add_collection(frame)
        legend.append(Patch(facecolor=colour, label=f"{name} ({len(units)})"))
    axes.set_title(f"{int((stage > 0).sum())} of {stage.size} units kept", fontsize=12)
    axes.legend(
        handles=legend, loc="upper center", bbox_to_anchor=(0.5, 0.0), ncols=len(STAGES),
        frameon=False, fontsize=11,
    )  # fmt: skip


def _draw_scores(axes: Axes, photo: np.ndarray, scores: np.ndarray) -> None:
    """In multiples of an even share; a method that goes by place alone has no scores."""
    shares = scores * scores.size / (scores.sum() or 1.0)
    axes.imshow(_grey(photo), cmap="gray", vmin=0, vmax=255, extent=_extent(photo), aspect="auto")
    # One outlier, as ViTs like to have, would leave all others one colour.
    low, high = np.percentile(shares, [1, 99])
    span = Normalize(low, high)
    axes.imshow(shares, cmap="inferno", norm=span, alpha=0.72, extent=_extent(photo), aspect="auto")
    axes.set_title("Scores", fontsize=12)
    panel = axes.get_window_extent()
    inch = panel.width / _WIDTH
    bar = axes.inset_axes((0.2, -0.3 * inch / panel.height, 0.6, 0.03))
    axes.figure.colorbar(
        ScalarMappable(span, cmap="inferno"), cax=bar, orientation="horizontal", extend="both",
        label="times an even share",
    )  # fmt: skip


def _canvas(figure: Figure, place: tuple[float, float, float, float], photo: np.ndarray) -> Axes:
    axes = figure.add_axes(place)
    axes.set_axis_off()
    axes.set_autoscale_on(False)
    axes.set(xlim=(0, photo.shape[1]), ylim=(photo.shape[0], 0))
    return axes


def _extent(photo: np.ndarray) -> tuple[int, int, int, int]:
    """Pixel `(y, x)` covers `[x, x + 1) x [y, y + 1)`, so that units begin at whole numbers."""
    return 0, photo.shape[1], photo.shape[0], 0


def _grey(photo: np.ndarray) -> np.ndarray:
    return photo @ np.array([0.299, 0.587, 0.114])
