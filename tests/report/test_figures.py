import numpy as np
import pytest
import torch
from matplotlib.colors import to_rgb
from PIL import Image

from fastprompt.data import ImageTransform
from fastprompt.errors import InputError
from fastprompt.report import TrainingCurve, draw_selected_patches, draw_training_curves
from fastprompt.report.heatmap import DIMMED, TINT
from fastprompt.report.style import PALETTE

GREEN = (40, 200, 80)


def patch_colors(figure, axes_index, grid):
    """The mean colour in the middle of every patch of a panel, as drawn: (rows, columns, 3), 0 to 1."""
    figure.set_dpi(100)
    figure.canvas.draw()
    drawn = np.asarray(figure.canvas.buffer_rgba())[..., :3] / 255
    axes = figure.axes[axes_index]
    colors = np.empty((*grid, 3))
    for row in range(grid[0]):
        for column in range(grid[1]):
            x, y = axes.transData.transform((column + 0.5, row + 0.5))
            x, y = round(x), round(drawn.shape[0] - y)
            colors[row, column] = drawn[y - 2 : y + 3, x - 2 : x + 3].mean(axis=(0, 1))
    return colors


def selection(grid, *patches):
    selected = torch.zeros(len(patches), grid[0] * grid[1], dtype=torch.bool)
    for prompt, indices in enumerate(patches):
        selected[prompt, list(indices)] = True
    return selected


def tinted(pixel, prompt):
    return (1 - TINT) * np.array(pixel) + TINT * np.array(to_rgb(PALETTE[prompt]))


@pytest.mark.parametrize("side", [32, 128, 600])
@pytest.mark.parametrize("grid", [(7, 7), (4, 6)])
def test_only_selected_patches_are_tinted_and_the_rest_is_dark(side, grid):
    patches = ([0, 5], [7, 8, 9, 20])
    figure = draw_selected_patches(Image.new("RGB", (side, side), GREEN), selection(grid, *patches), grid, ["a", "b"])
    pixel = np.array(GREEN) / 255
    np.testing.assert_allclose(patch_colors(figure, 0, grid), np.broadcast_to(pixel, (*grid, 3)), atol=0.01)
    for prompt, indices in enumerate(patches):
        expected = np.full((grid[0] * grid[1], 3), DIMMED * pixel.mean())
        expected[list(indices)] = tinted(pixel, prompt)
        np.testing.assert_allclose(patch_colors(figure, prompt + 1, grid), expected.reshape(*grid, 3), atol=0.01)


@pytest.mark.parametrize(("resize_mode", "left"), [("shortest", GREEN), ("squash", (255, 0, 0))])
def test_what_the_tower_sees_is_drawn(resize_mode, left):
    """Red, green, blue and red stripes, of which a tower that crops sees the two in the middle."""
    image = Image.new("RGB", (200, 100), "red")
    image.paste(GREEN, (50, 0, 100, 100))
    image.paste((0, 0, 255), (100, 0, 150, 100))
    seen = ImageTransform(64, (0.5,) * 3, (0.5,) * 3, resize_mode=resize_mode).visible(image)
    columns = 2 if resize_mode == "shortest" else 4
    colors = patch_colors(draw_selected_patches(seen, selection((2, columns)), (2, columns), []), 0, (2, columns))
    stripes = [left, (0, 0, 255)] if columns == 2 else [left, GREEN, (0, 0, 255), left]
    np.testing.assert_allclose(colors, np.broadcast_to(np.array(stripes) / 255, (2, columns, 3)), atol=0.01)
    with pytest.raises(InputError, match="image must be the square that the model sees, got 200 x 100 pixels"):
        draw_selected_patches(image, selection((2, 2)), (2, 2), [])


def test_weights_are_relative_to_the_largest_of_their_prompt():
    weights = np.array([[0.0, 0.2, 0.1, 0.0]])
    figure = draw_selected_patches(Image.new("RGB", (64, 64), GREEN), weights, (2, 2), ["a"])
    pixel = np.array(GREEN) / 255
    dark, bright = np.full(3, DIMMED * pixel.mean()), tinted(pixel, 0)
    colors = patch_colors(figure, 1, (2, 2)).reshape(4, 3)
    np.testing.assert_allclose(colors, [dark, bright, (dark + bright) / 2, dark], atol=0.01)


def test_outline_runs_around_the_selected_patches_only():
    figure = draw_selected_patches(Image.new("RGB", (64, 64), GREEN), selection((3, 3), [4, 5]), (3, 3), ["a"])
    segments = {tuple(sorted(map(tuple, segment))) for segment in figure.axes[1].collections[0].get_segments()}
    assert segments == {
        ((1, 1), (2, 1)), ((2, 1), (3, 1)), ((1, 2), (2, 2)), ((2, 2), (3, 2)), ((1, 1), (1, 2)), ((3, 1), (3, 2)),
    }  # fmt: skip


def test_titles_are_drawn():
    figure = draw_selected_patches(Image.new("RGB", (64, 64)), selection((2, 2), [0], [1]), (2, 2), ["k = 1", "k = 2"])
    assert [axes.get_title() for axes in figure.axes] == ["Image", "k = 1", "k = 2"]


@pytest.mark.parametrize(
    ("selected", "message"),
    [
        (np.ones((1, 5)), r"\(1, 4\) for 1 titles and a 2 x 2 grid, got \(1, 5\)"),
        (np.ones((2, 4)), r"got \(2, 4\)"),
        (np.array([[0, -1, 0, 1]]), "negative number or NaN"),
        (np.array([[0, np.nan, 0, 1]]), "negative number or NaN"),
    ],
)
def test_bad_selection_is_one_sentence(selected, message):
    with pytest.raises(InputError, match=message):
        draw_selected_patches(Image.new("RGB", (64, 64)), selected, (2, 2), ["a"])


def test_curves_show_mean_and_sample_deviation():
    figure = draw_training_curves(
        [
            TrainingCurve("Zero-shot", (), [[0.5], [0.6]]),
            TrainingCurve("GalLoP", [[3.0, 2.0], [1.0, 1.0]], [[0.6, 0.8], [0.8, 0.8]]),
        ],
        "Test accuracy (%)",
    )
    loss, accuracy = figure.axes
    assert accuracy.get_title(loc="left") == "Test accuracy (%)"
    assert [line.get_label() for line in loss.lines] == ["GalLoP"]
    assert loss.lines[0].get_xydata().tolist() == [[1, 2], [2, 1.5]]
    band = loss.collections[0].get_paths()[0].vertices
    assert {round(y, 4) for x, y in band if x == 1} == {round(2 - 2**0.5, 4), round(2 + 2**0.5, 4)}
    level, line = accuracy.lines
    assert level.get_ydata() == pytest.approx([55, 55])
    assert line.get_ydata() == pytest.approx([70, 80])
    assert level.get_color() == PALETTE[0] and line.get_color() == loss.lines[0].get_color() == PALETTE[1]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["Zero-shot", "GalLoP"]


def test_one_seed_has_no_band():
    figure = draw_training_curves([TrainingCurve("CoOp", [[2.0, 1.0]], [[0.1, 0.2]])])
    assert not figure.axes[0].collections


def test_bad_curves_are_one_sentence():
    with pytest.raises(InputError, match=r"The loss of CoOp must have the same number of epochs .* got \[1, 2\]"):
        draw_training_curves([TrainingCurve("CoOp", [[1.0, 2.0], [1.0]], ())])
    with pytest.raises(InputError, match="got none"):
        draw_training_curves([])


@pytest.mark.parametrize("name", [r"$\frac$", "$x", "a$b$c"])
def test_a_class_name_is_no_formula(name, tmp_path):
    figure = draw_selected_patches(Image.new("RGB", (64, 64), GREEN), selection((2, 2)), (2, 2), [], name)
    figure.savefig(tmp_path / "map.png")
    assert figure.axes[0].get_title() == name
