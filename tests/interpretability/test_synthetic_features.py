"""The synthetic world: exact firing probabilities, strict hierarchy, exclusive siblings, the copula's correlations."""

import functools
import math

import jax
import numpy as np
import pytest

from jaxalign.interpretability.synthetic_features import (
    SYNTH_SAE_BENCH_16K,
    SYNTH_SAE_BENCH_SMALL,
    sample_features,
    synthetic_features,
    unit_directions,
    zipf_probabilities,
)

SAMPLES = 40000
draw = jax.jit(sample_features, static_argnums=2)


@pytest.fixture(scope="module")
def world():
    """Large deviations, so that magnitudes are often 0, and strong correlations."""
    build = functools.partial(
        synthetic_features, num_features=50, dim=16, roots=3, branching=2, depth=3, rank=6, correlation=0.4,
        min_probability=0.01, std_magnitude=(2.0, 1.0),
    )  # fmt: skip
    return jax.jit(build)(jax.random.key(0))


@pytest.fixture(scope="module")
def sample(world):
    x, f = draw(world, jax.random.key(1), SAMPLES)
    return np.asarray(x), np.asarray(f)


def z_scores(counts, probability):
    return (counts / SAMPLES - probability) / np.sqrt(probability * (1 - probability) / SAMPLES)


def test_marginal_probabilities_after_the_hierarchy(world, sample):
    z = z_scores((sample[1] > 0).sum(axis=0), np.asarray(world.probability))
    assert np.abs(z).max() < 4.5
    assert 0.6 < z.std() < 1.5


def test_children_fire_with_their_parent_and_never_two(world, sample):
    fires, parent = sample[1] > 0, np.asarray(world.parent)
    children = np.flatnonzero(parent >= 0)
    assert len(children) == 3 * (2 + 4 + 8)
    assert (fires[:, children] <= fires[:, parent[children]]).all()
    for family in np.unique(parent[children]):
        siblings = fires[:, parent == family].sum(axis=1)
        assert siblings.max() == 1
        assert world.probability[parent == family].sum() <= world.probability[family] + 1e-6
    assert parent[[0, 3, 4, 9, 21, 45]].tolist() == [-1, 0, 0, 3, 9, -1]


def test_activations_are_the_sum_of_features(world, sample):
    x, f = sample
    dictionary = np.asarray(world.dictionary, np.float64)
    np.testing.assert_allclose(np.linalg.norm(dictionary, axis=1), 1.0, rtol=1e-5)
    np.testing.assert_allclose(x, f @ dictionary + np.asarray(world.bias), atol=1e-3)
    assert np.linalg.norm(world.bias) == pytest.approx(1.0, rel=1e-5)


def test_magnitudes_are_rectified_normals(world, sample):
    values = sample[1][:, 0][sample[1][:, 0] > 0]
    mean, std = float(world.mean[0]), float(world.std[0])
    a = -mean / std
    density, tail = np.exp(-a * a / 2) / np.sqrt(2 * np.pi), 0.5 * math.erfc(a / 2**0.5)
    assert values.mean() == pytest.approx(mean + std * density / tail, abs=5 * std / np.sqrt(len(values)))


def test_roots_are_correlated_as_the_copula_says(world, sample):
    """P(both fire) of two roots is a bivariate normal's, with the rows of the factor as its correlation."""
    from scipy.stats import multivariate_normal, norm

    factor = np.asarray(world.factor, np.float64)
    alive = norm.cdf(np.asarray(world.mean / world.std))
    chosen = np.asarray(world.probability) / alive
    fires = sample[1] > 0
    for i, j in ((0, 1), (0, 2), (1, 2)):
        rho = factor[i] @ factor[j]
        limits = norm.ppf(chosen[[i, j]])
        both = multivariate_normal([0, 0], [[1, rho], [rho, 1]]).cdf(limits) * alive[i] * alive[j]
        assert abs(z_scores((fires[:, i] & fires[:, j]).sum(), both)) < 4.5
    rows = np.sum(factor**2, axis=1) + np.asarray(world.noise) ** 2
    np.testing.assert_allclose(rows, 1.0, atol=1e-5)


def test_two_worlds_at_once_and_a_share_of_firings_without_a_child():
    def run(world_key, key):
        world = synthetic_features(
            world_key, num_features=8, dim=8, roots=2, branching=3, depth=1, rank=2, correlation=0.0,
            max_probability=0.5, min_probability=0.2, family_share=0.5, std_magnitude=(0.0, 0.0), spread_steps=0,
        )  # fmt: skip
        return world.probability, sample_features(world, key, 64)

    keys = jax.random.split(jax.random.key(0), 4)
    probability, (x, f) = jax.jit(jax.vmap(run))(keys[:2], keys[2:])
    np.testing.assert_allclose(probability[:, 2:5].sum(axis=1), 0.5 * probability[:, 0], rtol=1e-5)
    wanted = zipf_probabilities(8, maximum=0.5, minimum=0.2)[:2]
    np.testing.assert_allclose(probability[:, :2], np.stack([wanted, wanted]), rtol=1e-6)
    np.testing.assert_allclose(f[:, :, 0][f[:, :, 0] > 0], 5.0)  # no deviation: the mean itself
    assert x.shape == f.shape == (2, 64, 8)
    assert np.abs(x[0] - x[1]).max() > 0.1


def test_zipf_by_hand():
    # Ranks 1..4 to the power -1: 1, 1/2, 1/3, 1/4; scaled to [0.1, 0.7].
    np.testing.assert_allclose(
        zipf_probabilities(4, exponent=1.0, maximum=0.7, minimum=0.1), [0.7, 0.3, 0.1 + 0.2 / 3, 0.1], rtol=1e-5
    )
    with pytest.raises(ValueError, match="two features or more, got 1"):
        zipf_probabilities(1)


def test_directions_are_orthonormal_or_a_tight_frame():
    spread = jax.jit(unit_directions, static_argnums=(1, 2), static_argnames="steps")
    few = spread(jax.random.key(0), 6, 10, steps=100)
    np.testing.assert_allclose(few @ few.T, np.eye(6), atol=1e-4)
    many = spread(jax.random.key(0), 24, 6, steps=100)
    np.testing.assert_allclose(many.T @ many, 4.0 * np.eye(6), atol=0.05)


def test_presets_have_the_publications_sizes():
    world = functools.partial(synthetic_features, **SYNTH_SAE_BENCH_16K, spread_steps=0)
    shape = jax.eval_shape(world, jax.random.key(0))
    assert shape.dictionary.shape == (16384, 768)
    assert shape.factor.shape == (128 + 128 * (1 + 4 + 16) + 16384 - 128 * 85, 25)
    # About 34 features of the published model fire at a time.
    assert 33 < float(jax.jit(lambda key: world(key).probability.sum())(jax.random.key(0))) < 36
    small = jax.eval_shape(functools.partial(synthetic_features, **SYNTH_SAE_BENCH_SMALL), jax.random.key(0))
    assert small.dictionary.shape == (256, 64)


def test_no_hierarchy_and_bad_sizes():
    loose = functools.partial(synthetic_features, num_features=5, dim=3, roots=2, branching=2, depth=0, rank=1)
    x, f = jax.eval_shape(lambda key: sample_features(loose(key), key, 4), jax.random.key(0))
    assert (x.shape, f.shape) == ((4, 3), (4, 5))
    with pytest.raises(ValueError, match="1 trees have 15 features, num_features is 9"):
        synthetic_features(jax.random.key(0), num_features=9, dim=4, roots=1, branching=2, depth=3)
    with pytest.raises(ValueError, match="rank must exceed depth 2, got 2"):
        synthetic_features(jax.random.key(0), num_features=9, dim=4, roots=1, branching=2, depth=2, rank=2)
