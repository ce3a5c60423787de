"""Distance scores against pyod and scikit-learn on the same features: the same scores, ranking and AUROC."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.robustness.ood import fit_mahalanobis, knn_score, mahalanobis_score
from jaxalign.robustness.ood_metrics import auroc, false_positive_rate_at

pytest.importorskip("pyod")
metrics = pytest.importorskip("sklearn.metrics")

pytestmark = pytest.mark.peer


@pytest.fixture(scope="module")
def features():
    """(train [500, 16], labels [500], inside [200, 16], outside [150, 16]) of four correlated classes."""
    rng = np.random.default_rng(0)
    centres, mixing = 2 * rng.normal(size=(4, 16)), rng.normal(size=(16, 16)) / 4
    labels = np.arange(700) % 4
    known = (centres[labels] + rng.normal(size=(700, 16)) @ mixing).astype(np.float32)
    between = (centres[np.arange(150) % 4] + 0.3 * centres[np.arange(150) % 3]) / 1.3
    outside = (between + rng.normal(size=(150, 16)) @ mixing).astype(np.float32)
    return known[:500], labels[:500], known[500:], outside


def assert_agree(ours, theirs, tolerance):
    """Scores [350], the first 200 of them inside, from us and from a peer."""
    np.testing.assert_allclose(ours, theirs, rtol=tolerance)
    order = np.argsort(theirs)
    # Ours, in their order, never falls by more than rounding.
    assert (np.diff(np.asarray(ours)[order]) > -tolerance * np.abs(theirs[order][1:])).all()
    area = metrics.roc_auc_score(np.arange(350) >= 200, theirs)
    assert 0 < area < 1  # neither is trivial
    np.testing.assert_allclose(auroc(ours[:200], ours[200:]), area, atol=1e-4)


@pytest.mark.parametrize("k", [1, 10])
@pytest.mark.parametrize("normalize", [True, False])
def test_knn_is_pyods_with_the_largest_distance(features, k, normalize):
    from pyod.models.knn import KNN

    train, _, inside, outside = features
    points = np.concatenate([inside, outside])
    unit = [x / np.linalg.norm(x, axis=1, keepdims=True) if normalize else x for x in (train, points)]
    theirs = KNN(n_neighbors=k, method="largest").fit(unit[0]).decision_function(unit[1])
    assert_agree(knn_score(train, points, k=k, normalize=normalize, chunk=128), theirs, 1e-4)


def test_mahalanobis_is_scikit_learns(features):
    covariance = pytest.importorskip("sklearn.covariance")
    train, labels, inside, outside = features
    points = np.concatenate([inside, outside])
    means = np.stack([train[labels == c].mean(axis=0) for c in range(4)])
    for shrinkage in (0.0, 0.2):
        peer = covariance.ShrunkCovariance(shrinkage=shrinkage, assume_centered=True).fit(train - means[labels])
        theirs = np.min([peer.mahalanobis(points - mean) for mean in means], axis=0)
        model = fit_mahalanobis(train, labels, num_classes=4, shrinkage=shrinkage)
        assert_agree(jax.jit(mahalanobis_score)(model, points), theirs, 1e-3)


def test_detection_measures_are_scikit_learns():
    rng = np.random.default_rng(1)
    inside, outside = np.round(rng.normal(size=300), 1), np.round(rng.normal(size=200) + 1, 1)  # with ties
    labels, scores = np.repeat([0, 1], [300, 200]), np.concatenate([inside, outside])
    np.testing.assert_allclose(auroc(inside, outside), metrics.roc_auc_score(labels, scores), rtol=1e-6)
    # Positive there is what lies inside.
    false, true, _ = metrics.roc_curve(1 - labels, -scores, drop_intermediate=False)
    expected = false[np.argmax(true >= 0.95)]
    np.testing.assert_allclose(false_positive_rate_at(jnp.asarray(inside), jnp.asarray(outside)), expected, rtol=1e-6)
