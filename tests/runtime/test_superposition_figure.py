"""The picture of superposition: what is drawn, and what is refused."""

import numpy as np
import pytest

from jaxalign.interpretability.toy_superposition import POLYTOPES, polytope
from jaxalign.runtime.superposition_figure import superposition_figure

pytest.importorskip("matplotlib")


def test_points_lines_and_planes():
    pentagon = polytope("pentagon")
    w = np.stack([np.vstack([np.eye(2), np.zeros((3, 2))]), pentagon])
    figure = superposition_figure([1.0, 0.1], w, planes=[("S = 0.9", pentagon)])
    plane, chart = figure.axes
    assert plane.get_title() == "S = 0.9"
    points, line = [each for each in chart.lines if each.get_label() in ("a feature", "dimensions per feature")]
    np.testing.assert_allclose(points.get_xdata(), [1.0] * 5 + [10.0] * 5)
    np.testing.assert_allclose(points.get_ydata(), [1, 1, 0, 0, 0] + [0.4] * 5, atol=1e-6)
    np.testing.assert_allclose(line.get_ydata(), [1.0, 0.4], atol=1e-6)
    assert {text.get_text() for text in chart.texts} == {f"{name}, {share:.3g}" for name, share in POLYTOPES.items()}
    assert len(superposition_figure([0.5], w[:1]).axes) == 1


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match=r"needs density \[K\] and w \[K, N, M\], got \(2,\), \(1, 5, 2\)"):
        superposition_figure([0.5, 0.1], np.ones((1, 5, 2)))
    with pytest.raises(ValueError, match=r"density must lie in \(0, 1\], got \[0\.0\]"):
        superposition_figure([0.0], np.ones((1, 5, 2)))
    with pytest.raises(ValueError, match=r"the plane 'P' must be \[n, 2\], got \(3, 3\)"):
        superposition_figure([0.5], np.ones((1, 5, 2)), planes=[("P", np.eye(3))])
