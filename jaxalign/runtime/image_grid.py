"""Images side by side: clean ones, what an attack adds, and what comes of it."""

from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from jaxalign.runtime.figures import empty_figure
from jaxalign.types import ArrayLike

if TYPE_CHECKING:
    from matplotlib.figure import Figure

INCHES = 0.85  # of one image


def image_grid(
    rows: Mapping[str, ArrayLike],
    *,
    titles: Sequence[str] = (),
    signed: Collection[str] = (),
    bounds: tuple[float, float] = (0.0, 1.0),
    title: str = "",
    unit: str = "input units",
) -> "Figure":
    """A Matplotlib Figure with one row of N images for each entry, named at its left.

    Args:
        rows: images [N, H, W] or [N, H, W, C] by name, C 1 (grey) or 3 (red, green, blue), the same N in each.
        titles: N texts above the first row, such as "3 -> 8".
        signed: names of the rows that are differences. They share one colour scale, white at 0 and as far to either
            side as their largest magnitude; of several channels the one of largest magnitude is drawn.
        bounds: black and white of the other rows; what lies outside is drawn as these.
        unit: at the bar beside the signed rows.

    Raises ValueError naming a row of another shape, without images, or with NaN, and ImportError without Matplotlib.
    """
    images = {name: _checked(name, np.asarray(x, np.float64)) for name, x in rows.items()}
    counts = {name: len(x) for name, x in images.items()}
    if len(set(counts.values())) != 1:
        raise ValueError(f"image_grid: rows need one number of images in common, got {counts}")
    count = next(iter(counts.values()))
    if len(titles) not in (0, count):
        raise ValueError(f"image_grid: {len(titles)} titles for {count} images")
    if unknown := [name for name in signed if name not in images]:
        raise ValueError(f"image_grid: signed names {unknown[0]!r}, which is no row; there are {', '.join(images)}")
    differences = {name: _strongest_channel(images[name]) for name in images if name in signed}
    reach = max((float(np.abs(x).max()) for x in differences.values()), default=0.0) or 1.0

    figure = empty_figure(1.2 + INCHES * count, 0.4 + (INCHES + 0.1) * len(images))
    axes = figure.subplots(len(images), count, squeeze=False)
    for row, (name, pictures) in zip(axes, images.items(), strict=True):
        for i, panel in enumerate(row):
            panel.set_xticks([])
            panel.set_yticks([])
            panel.spines[:].set_linewidth(0.4)
            if name in differences:
                drawn = panel.imshow(differences[name][i], cmap="RdBu", vmin=-reach, vmax=reach)
            else:
                low, high = bounds
                panel.imshow(np.clip((pictures[i] - low) / (high - low), 0, 1), cmap="gray", vmin=0, vmax=1)
        row[0].set_ylabel(name, fontsize=8)
    for panel, text in zip(axes[0], titles, strict=False):
        panel.set_title(text, fontsize=7)
    if differences:
        beside = [panel for row, name in zip(axes, images, strict=True) if name in differences for panel in row]
        bar = figure.colorbar(drawn, ax=beside, shrink=0.9)
        bar.ax.tick_params(labelsize=6)
        bar.set_label(unit, fontsize=7)
    if title:
        figure.suptitle(title, fontsize=10)
    return figure


def _checked(name: str, x: np.ndarray) -> np.ndarray:
    """[N, H, W, C]."""
    x = x[..., None] if x.ndim == 3 else x
    if x.ndim != 4 or 0 in x.shape or x.shape[-1] not in (1, 3):
        raise ValueError(f"image_grid: {name} is {x.shape}, needs [N, H, W] or [N, H, W, C] with C 1 or 3")
    if not np.isfinite(x).all():
        raise ValueError(f"image_grid: {name} has NaN or infinite values")
    return x


def _strongest_channel(x: np.ndarray) -> np.ndarray:
    """[N, H, W, C] -> [N, H, W]: of each pixel the channel of largest magnitude, with its sign."""
    return np.take_along_axis(x, np.abs(x).argmax(axis=-1)[..., None], axis=-1)[..., 0]
