"""Pictures of certificates show the numbers they were given, and refuse numbers that cannot be."""

import numpy as np
import pytest

from jaxalign.runtime.certification_figures import certified_and_attacked, radius_curve, radius_histogram

EPSILONS = [0.0, 0.1, 0.2]
CERTIFIED = np.array([[0.9, 0.8, 0.95], [0.6, 0.5, 0.7], [0.1, 0.05, 0.2]])
ATTACKED = np.array([[0.9, 0.8, 0.95], [0.7, 0.6, 0.8], [0.5, 0.4, 0.6]])


def test_the_gap_lies_between_what_is_certified_and_what_attacks_leave():
    axes = certified_and_attacked(EPSILONS, CERTIFIED, ATTACKED, title="Digits").axes[0]
    drawn = {line.get_label(): line.get_ydata() for line in axes.lines}
    np.testing.assert_array_equal(drawn["certified: proven right"], CERTIFIED[:, 0])
    np.testing.assert_array_equal(drawn["attacked: not broken"], ATTACKED[:, 0])
    gap = next(area for area in axes.collections if area.get_label() == "gap: neither")
    corners = {tuple(np.round(corner, 9)) for corner in gap.get_paths()[0].vertices}
    sides = (CERTIFIED[:, 0], ATTACKED[:, 0])
    assert {(x, y) for side in sides for x, y in zip(EPSILONS, side, strict=True)} <= corners
    assert axes.get_xlabel() == "epsilon (L∞, input units)"
    assert axes.get_title() == "Digits"


def test_a_histogram_counts_every_image_once():
    axes = radius_histogram([0.0, 0.0, 0.05, 0.11, 0.2], maximum=0.2).axes[0]
    heights = [patch.get_height() for patch in axes.patches]
    assert sum(heights) == 5
    assert sorted(h for h in heights if h) == [1, 1, 1, 2]
    assert axes.lines[0].get_xdata()[0] == 0.11
    assert {text.get_text() for text in axes.get_legend().get_texts()} >= {"certified (3)", "none (2)"}
    assert not radius_histogram([0.0], maximum=1.0).axes[0].lines


def test_a_curve_over_radii():
    axes = radius_curve(EPSILONS, CERTIFIED).axes[0]
    np.testing.assert_array_equal(axes.lines[0].get_ydata(), CERTIFIED[:, 0])
    assert axes.get_xlabel() == "radius (L2, input units)"


@pytest.mark.parametrize(
    ("draw", "message"),
    [
        (lambda: certified_and_attacked([0.1, 0.1], CERTIFIED[:2], ATTACKED[:2]), r"rise, got \[0\.1, 0\.1\]"),
        (lambda: certified_and_attacked(EPSILONS, CERTIFIED[:2], ATTACKED), r"certified is \(2, 3\), needs \[3, 3\]"),
        (lambda: certified_and_attacked(EPSILONS, CERTIFIED, ATTACKED * 2), r"attacked must lie in \[0, 1\], got 1\.8"),
        (lambda: certified_and_attacked(EPSILONS, ATTACKED, CERTIFIED), "at epsilon 0.1 more is certified than"),
        (lambda: radius_histogram([0.3], maximum=0.2), r"in \[0, 0\.2\], got \(1,\) from 0\.3"),
        (lambda: radius_histogram([], maximum=0.2), r"got \(0,\)"),
        (lambda: radius_curve([0.2, 0.1], CERTIFIED[:2]), "rising"),
    ],
)
def test_numbers_that_cannot_be_are_refused(draw, message):
    with pytest.raises(ValueError, match=message):
        draw()
