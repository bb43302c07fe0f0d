"""Pictures of a selection: which patches are kept, and how they score."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.collections import PatchCollection
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from torch import Tensor

from hivtp_kernels import Selection

# Stage of `Selection.stage`, its name, and a colour that colour-blind readers can tell apart too.
STAGES = ((1, "global", "#E69F00"), (2, "local", "#56B4E9"), (3, "filled", "#009E73"))
_INCHES = 7.0


def as_seen(pixel_values: Tensor, mean: Sequence[float], std: Sequence[float]) -> np.ndarray:
    """The photo as the vision tower sees it: `[3, height, width]` back to uint8 in `[H, W, 3]`."""
    pixels = pixel_values.float().cpu()
    pixels = pixels * torch.tensor(std)[:, None, None] + torch.tensor(mean)[:, None, None]
    return (pixels.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()


def draw_kept(photo: np.ndarray, selection: Selection, path: Path) -> None:
    """Write the photo with its kept patches framed by stage and the others faded.

    `photo` is uint8 `[height, width, 3]`, `selection` that of this one image. Synchronises.
    """
    figure, axes = _canvas(photo, space_below=0.5)
    rows, columns = selection.grid
    height, width = photo.shape[0] / rows, photo.shape[1] / columns
    count = int(selection.counts[0])
    indices = selection.indices[0, :count].cpu().numpy()
    stages = selection.stage[0, :count].cpu().numpy()

    mask = np.zeros(rows * columns, dtype=bool)
    mask[indices] = True
    kept = mask.reshape(rows, columns)
    y = np.arange(photo.shape[0]) * rows // photo.shape[0]
    x = np.arange(photo.shape[1]) * columns // photo.shape[1]
    faded = 0.25 * _grey(photo)[..., None] + 0.75 * 245
    shown = np.where(kept[y][:, x][..., None], photo, faded).astype(np.uint8)
    axes.imshow(shown, extent=_extent(photo))

    legend = []
    for stage, name, colour in STAGES:
        patches = [
            Rectangle((i % columns * width, i // columns * height), width, height)
            for i in indices[stages == stage]
        ]
        if not patches:
            continue
        fill = PatchCollection(patches, facecolor=colour, edgecolor="none", alpha=0.18)
        frame = PatchCollection(patches, facecolor="none", edgecolor=colour, linewidth=1.1)
        axes.add_collection(fill)
        axes.add_collection(frame)
        legend.append(Patch(facecolor=colour, label=f"{name} ({len(patches)})"))
    axes.set_title(f"{count} of {rows * columns} patches kept", fontsize=12)
    figure.legend(handles=legend, loc="lower center", ncols=len(legend), frameon=False, fontsize=11)
    figure.savefig(path)


def draw_scores(photo: np.ndarray, scores: Tensor, grid: tuple[int, int], path: Path) -> None:
    """Write the scores as a heat map over the photo, in multiples of an even share.

    `photo` is uint8 `[height, width, 3]`, `scores` fp32 `[H * W]` of this image. Synchronises.
    """
    figure, axes = _canvas(photo, space_below=0.8)
    shares = (scores * scores.numel() / scores.sum()).cpu().numpy().reshape(grid)
    axes.imshow(_grey(photo), cmap="gray", vmin=0, vmax=255, extent=_extent(photo))
    # One outlier, as ViTs like to have, would leave all others one colour.
    low, high = np.percentile(shares, [1, 99])
    span = Normalize(low, high)
    axes.imshow(shares, cmap="inferno", norm=span, alpha=0.72, extent=_extent(photo))
    axes.set_title("Attention that each patch receives", fontsize=12)
    inch = 1 / figure.get_figheight()
    bar = figure.add_axes((0.2, 0.55 * inch, 0.6, 0.15 * inch))
    figure.colorbar(
        ScalarMappable(span, cmap="inferno"),
        cax=bar,
        orientation="horizontal",
        extend="both",
        label="times an even share",
    )
    figure.savefig(path)


def _canvas(photo: np.ndarray, space_below: float) -> tuple[Figure, Axes]:
    """A figure that holds the photo with room for a title and `space_below` inches."""
    margin, title = 0.2, 0.45
    height = _INCHES * photo.shape[0] / photo.shape[1]
    size = (_INCHES + 2 * margin, height + title + space_below)
    figure = Figure(figsize=size, dpi=120, facecolor="white")
    axes = figure.add_axes(
        (margin / size[0], space_below / size[1], _INCHES / size[0], height / size[1])
    )
    axes.set_axis_off()
    axes.set_autoscale_on(False)
    axes.set(xlim=(0, photo.shape[1]), ylim=(photo.shape[0], 0))
    return figure, axes


def _extent(photo: np.ndarray) -> tuple[int, int, int, int]:
    """Pixel `(y, x)` covers `[x, x + 1) x [y, y + 1)`, so that patches begin at whole numbers."""
    return 0, photo.shape[1], photo.shape[0], 0


def _grey(photo: np.ndarray) -> np.ndarray:
    return photo @ np.array([0.299, 0.587, 0.114])
