"""Which patches of an image each local prompt looked at, drawn over the image."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from fastprompt.errors import InputError
from fastprompt.report.style import INK, PALETTE, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PANEL_INCHES, GAP_INCHES, TITLE_INCHES = 1.84, 0.06, 0.22
PANEL_PIXELS = 512  # small pictures are enlarged smoothly, so that only the patches have hard edges
DIMMED = 0.45  # brightness left to what was not selected
TINT = 0.15  # share of the prompt's colour in a patch of full weight


def draw_selected_patches(
    image: Image.Image, selected: object, grid: tuple[int, int], titles: Sequence[str], image_title: str = "Image"
) -> Figure:
    """Draw what each local prompt selected: the plain image, then one panel a prompt.

    Selected patches keep their brightness, are tinted and outlined in the prompt's colour; the rest is grey and dark.

    Args:
        image: the square that the model sees, of any size: of a picture that is not square, what
            `ImageTransform.visible` makes of it, since some towers crop it and others squash it.
        selected: (N, P) array or tensor on the CPU; bool, or weights that are 0 where a patch was not selected.
            Weights are taken relative to the largest of their prompt; smaller ones are fainter.
        grid: rows and columns of patches, P = rows * columns.
        titles: one for each of the N prompts.
        image_title: title of the first panel.

    Returns:
        A figure with a transparent background; `figure.savefig(path, dpi=160)` writes it.

    Raises:
        InputError: the image is not square, shapes do not fit together, or a weight is negative or not a number.
    """
    weights = _weights(selected, grid, titles)
    if image.width != image.height:
        raise InputError(f"image must be the square that the model sees, got {image.width} x {image.height} pixels.")
    enlarged = image.convert("RGB").resize((PANEL_PIXELS, PANEL_PIXELS), Image.Resampling.LANCZOS)
    pixels = np.asarray(enlarged, dtype=np.float32) / 255
    figure = _figure_of_panels(len(weights) + 1)
    first, *others = figure.axes
    _draw_panel(first, pixels, grid, image_title)
    for index, (axes, weight, title) in enumerate(zip(others, weights, titles, strict=True)):
        color = PALETTE[index % len(PALETTE)]
        _draw_panel(axes, _highlighted(pixels, weight, color), grid, title)
        _outline(axes, weight > 0, color)
    return figure


def _weights(selected: object, grid: tuple[int, int], titles: Sequence[str]) -> NDArray[np.float32]:
    """(N, rows, columns), the largest of every prompt is 1."""
    weights = np.asarray(selected, dtype=np.float32)
    expected = (len(titles), grid[0] * grid[1])
    if weights.shape != expected:
        raise InputError(
            f"selected must be (N, P) = {expected} for {len(titles)} titles and a {grid[0]} x {grid[1]} grid, "
            f"got {weights.shape}."
        )
    if not (weights >= 0).all():
        raise InputError("selected must be bool or weights of at least 0, got a negative number or NaN.")
    largest = weights.max(axis=1, keepdims=True)
    return (weights / np.where(largest > 0, largest, 1)).reshape(-1, *grid)


def _figure_of_panels(count: int) -> Figure:
    """Square panels in a row, with room for titles above and for outlines around them."""
    width = count * (PANEL_INCHES + GAP_INCHES) + GAP_INCHES
    height = PANEL_INCHES + GAP_INCHES + TITLE_INCHES
    figure = new_figure(width, height)
    for index in range(count):
        left = GAP_INCHES + index * (PANEL_INCHES + GAP_INCHES)
        figure.add_axes((left / width, GAP_INCHES / height, PANEL_INCHES / width, PANEL_INCHES / height))
    return figure


def _highlighted(pixels: NDArray[np.float32], weight: NDArray[np.float32], color: str) -> NDArray[np.float32]:
    """Make pixels grey and dark where the weight is 0, tinted where it is 1, in between otherwise."""
    from matplotlib.colors import to_rgb

    rows, columns = (_patch_of_pixel(patches) for patches in weight.shape)
    strength = weight[rows[:, None], columns[None, :], None]
    tinted = (1 - TINT) * pixels + TINT * np.array(to_rgb(color), dtype=np.float32)
    dimmed = DIMMED * pixels.mean(axis=2, keepdims=True)
    return strength * tinted + (1 - strength) * dimmed


def _patch_of_pixel(patches: int) -> NDArray[np.int64]:
    """For every pixel along one side of a panel the patch that its middle lies in."""
    return ((np.arange(PANEL_PIXELS) + 0.5) * patches / PANEL_PIXELS).astype(np.int64)


def _draw_panel(axes: Axes, pixels: NDArray[np.float32], grid: tuple[int, int], title: str) -> None:
    """Draw pixels in patch coordinates: patch (r, c) covers r to r + 1 downwards and c to c + 1 to the right."""
    rows, columns = grid
    axes.imshow(pixels, extent=(0, columns, rows, 0), aspect=columns / rows)
    axes.set_axis_off()
    axes.set_title(title, fontsize=9, color=INK, pad=4, parse_math=False)  # a class may be called $x$


def _outline(axes: Axes, selected: NDArray[np.bool_], color: str) -> None:
    """Draw every edge between a selected and an unselected patch."""
    from matplotlib.collections import LineCollection

    padded = np.pad(selected, 1)
    across = np.argwhere(padded[1:, 1:-1] != padded[:-1, 1:-1])  # (row of the line, column)
    down = np.argwhere(padded[1:-1, 1:] != padded[1:-1, :-1])  # (row, column of the line)
    edges = [((c, r), (c + 1, r)) for r, c in across] + [((c, r), (c, r + 1)) for r, c in down]
    # A white line below the coloured one sets it off from pictures of its own colour.
    for width, line in ((3.0, "white"), (1.6, color)):
        axes.add_collection(
            LineCollection(edges, colors=line, linewidths=width, capstyle="round", clip_on=False), autolim=False
        )
