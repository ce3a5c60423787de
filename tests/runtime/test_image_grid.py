"""Pictures of attacks and of accuracy against epsilon show the numbers they were given, on the scales they claim."""

import matplotlib.colors
import numpy as np
import pytest

from jaxalign.runtime.image_grid import image_grid
from jaxalign.runtime.robustness_figures import robustness_curves

CLEAN = np.linspace(0, 1, 2 * 3 * 4).reshape(2, 3, 4)
DELTA = np.where(CLEAN > 0.5, 0.1, -0.25)


def panels(figure):
    return [axes for axes in figure.axes if axes.images]


def test_a_grid_shows_each_row_on_its_own_scale():
    figure = image_grid(
        {"clean": CLEAN, "perturbation": DELTA[..., None], "adversarial": CLEAN + DELTA},
        titles=["3 -> 8", "1 -> 7"],
        signed=["perturbation"],
        title="Worst",
    )
    shown = panels(figure)
    assert len(shown) == 6
    assert [axes.get_title() for axes in shown] == ["3 -> 8", "1 -> 7", "", "", "", ""]
    assert [axes.get_ylabel() for axes in shown] == ["clean", "", "perturbation", "", "adversarial", ""]
    np.testing.assert_allclose(shown[1].images[0].get_array(), CLEAN[1])
    np.testing.assert_allclose(shown[2].images[0].get_array(), DELTA[0])
    assert shown[2].images[0].get_clim() == (-0.25, 0.25)  # white is 0
    np.testing.assert_allclose(shown[4].images[0].get_array(), np.clip(CLEAN + DELTA, 0, 1)[0])
    bars = [axes.get_ylabel() for axes in figure.axes if axes not in shown]
    assert bars == ["input units"]
    assert figure.get_suptitle() == "Worst"


def test_colour_images_keep_their_channels_and_differences_the_strongest():
    x = np.zeros((1, 2, 2, 3))
    x[..., 0], x[..., 2] = 0.2, -0.7
    figure = image_grid({"clean": x + 0.7, "difference": x}, signed=["difference"])
    clean, difference = panels(figure)
    np.testing.assert_allclose(clean.images[0].get_array()[0, 0], [0.9, 0.7, 0.0], atol=1e-12)
    np.testing.assert_array_equal(difference.images[0].get_array(), np.full((2, 2), -0.7))


@pytest.mark.parametrize(
    ("rows", "options", "reason"),
    [
        ({"clean": CLEAN[0]}, {}, r"clean is \(3, 4\)"),
        ({"clean": np.zeros((1, 2, 2, 4))}, {}, "C 1 or 3"),
        ({"clean": CLEAN * np.nan}, {}, "clean has NaN"),
        ({"clean": CLEAN, "after": CLEAN[:1]}, {}, r"one number of images in common, got \{'clean': 2, 'after': 1\}"),
        ({"clean": CLEAN}, {"titles": ["3"]}, "1 titles for 2 images"),
        ({"clean": CLEAN}, {"signed": ["delta"]}, "'delta', which is no row"),
    ],
)
def test_a_grid_names_what_it_cannot_draw(rows, options, reason):
    with pytest.raises(ValueError, match=reason):
        image_grid(rows, **options)


def test_curves_have_bands_levels_and_a_bold_worst_case():
    pgd = np.array([[0.9, 0.85, 0.95], [0.5, 0.4, 0.6], [np.nan] * 3])
    worst = pgd - [0.1, 0.1, 0.1]
    figure = robustness_curves(
        [0.1, 0.2, 0.3], {"pgd": pgd, "worst case": worst}, clean=0.97, chance=0.1, worst="worst case", norm="l2"
    )
    (axes,) = figure.axes
    lines = {line.get_label(): line for line in axes.get_lines()}
    assert list(lines) == ["pgd", "worst case", "clean", "chance"]
    np.testing.assert_array_equal(lines["pgd"].get_ydata(), pgd[:, 0])
    np.testing.assert_array_equal(lines["clean"].get_ydata(), [0.97, 0.97])
    assert lines["worst case"].get_linewidth() > lines["pgd"].get_linewidth()
    assert matplotlib.colors.to_hex(lines["worst case"].get_color()) == "#000000"
    band = axes.collections[0].get_paths()[0].vertices[:, 1]
    assert (np.nanmin(band), np.nanmax(band)) == (0.4, 0.95)
    assert "L2" in axes.get_xlabel()


@pytest.mark.parametrize(
    ("epsilons", "curves", "reason"),
    [
        ([0.2, 0.1], {"pgd": np.zeros((2, 3))}, "must be .E. and rise"),
        ([0.1], {}, "no curve"),
        ([0.1], {"pgd": np.zeros(3)}, r"pgd is \(3,\), needs \[1, 3\]"),
        ([0.1], {"pgd": [[50.0, 40.0, 60.0]]}, "pgd has 50, an accuracy is in"),
    ],
)
def test_curves_name_what_they_cannot_draw(epsilons, curves, reason):
    with pytest.raises(ValueError, match=reason):
        robustness_curves(epsilons, curves)
