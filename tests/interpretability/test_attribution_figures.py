"""Pictures of attributions, faithfulness and ablation have their panels, curves and names."""

import numpy as np
import pytest

from jaxalign.interpretability.attribution_faithfulness import AttributionFaithfulness, FaithfulnessCurve
from jaxalign.interpretability.neuron_ablation import AblationEffect
from jaxalign.runtime.attribution_figures import ablation_figure, attribution_grid, faithfulness_figure

pytest.importorskip("matplotlib")
RNG = np.random.default_rng(0)


def test_attributions_of_each_image_have_its_own_scale():
    attributions = RNG.normal(size=(2, 4, 4, 1)) * np.array([1.0, 100.0])[:, None, None, None]
    rows = {"integrated gradients": attributions, "none": 0 * attributions}
    figure = attribution_grid(RNG.uniform(size=(2, 4, 4, 1)), rows)
    names = [axes.get_ylabel() for axes in figure.axes[::2]]
    assert names == ["image", "integrated\ngradients", "none", "share of the largest"]
    drawn = [np.asarray(axes.images[0].get_array()) for axes in figure.axes[2:4]]
    assert [np.abs(x).max() for x in drawn] == [1.0, 1.0]


def test_faithfulness_shows_both_curves_and_gains_by_method():
    values = RNG.uniform(size=(5, 3))
    curve = FaithfulnessCurve(np.array([0, 0.5, 1]), values, values.mean(axis=1))
    gain = np.array([0.5, 0.25, 0.75])
    check = AttributionFaithfulness(
        curve, curve._replace(value=values[:, ::-1]), values[:, 0], values[:, 1], gain, gain
    )
    figure = faithfulness_figure({"saliency": check, "occlusion": check}, unit="nats")
    deletion, insertion, gains = figure.axes
    np.testing.assert_allclose(deletion.lines[0].get_ydata(), values.mean(axis=0))
    np.testing.assert_allclose(insertion.lines[1].get_ydata(), values.mean(axis=0)[::-1])
    assert [text.get_text() for text in gains.get_yticklabels()] == ["saliency", "occlusion"]
    with pytest.raises(ValueError, match="no method"):
        faithfulness_figure({})


def test_ablation_has_a_panel_for_each_site():
    excess = np.array([[0.1, 0.0, 0.2], [0.3, 0.2, 0.4]])
    effect = AblationEffect(
        np.array([1, 4]), np.array([0.8, 0.5]), np.array([0.9, 0.8]), np.zeros(2), np.zeros(2), excess, excess,
        np.array([0.1, 0.2]),
    )  # fmt: skip
    figure = ablation_figure({"post_0": effect, "post_1": effect})
    assert [axes.get_title() for axes in figure.axes] == ["post_0", "post_1"]
    np.testing.assert_allclose(figure.axes[0].lines[0].get_ydata(), [0.8, 0.5])
    band = figure.axes[0].collections[0].get_paths()[0].vertices[:, 1]
    np.testing.assert_allclose([band.min(), band.max()], [0.4, 0.9])
    with pytest.raises(ValueError, match="no site"):
        ablation_figure({})
