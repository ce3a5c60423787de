"""Square: it needs no gradient, keeps to ball and box, and breaks a linear classifier where that can be broken."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.robustness.square import SquareSearch, image_shape, square, square_sides
from jaxalign.robustness.survivors import as_rows

BATCH, SIDE, CLASSES = 5, 4, 2
SCALES = np.array([0.0, 0.9, 1.1], np.float32)
KEY = jax.random.key(0)

weights = np.random.default_rng(1).normal(size=(SIDE * SIDE, CLASSES)).astype(np.float32)
x = np.random.default_rng(2).uniform(0.3, 0.7, (BATCH, SIDE, SIDE)).astype(np.float32)
y = np.argmax(x.reshape(BATCH, -1) @ weights, axis=1)


def stepped(x):
    """A linear classifier of inputs rounded to thousandths: its gradient is 0 wherever there is one."""
    return jnp.round(x.reshape(BATCH, -1) * 1000) / 1000 @ weights


def distances():
    """The linf distance of each row of x from the nearest other class of the linear classifier, in closed form."""
    logits = x.reshape(BATCH, -1) @ weights
    gaps = logits[np.arange(BATCH), y][:, None] - logits
    sizes = np.abs(weights[:, y][:, :, None] - weights[:, None, :]).sum(axis=0)
    return np.min(np.where(np.arange(CLASSES)[None, :] == y[:, None], np.inf, gaps / np.maximum(sizes, 1e-9)), axis=1)


def test_sides_by_hand():
    def sides(i, queries, image):
        return tuple(int(s) for s in square_sides(jnp.asarray(i), queries, 0.8, image))

    # sqrt(0.8 * 784) = 25.04; the area is halved after 10, 50, 200 of 10000 queries, twice as soon in half as many
    assert [sides(i, 10000, (28, 28, 1)) for i in (0, 10, 11, 51, 9999)] == [(n, n) for n in (25, 25, 18, 13, 1)]
    assert sides(6, 5000, (28, 28, 3)) == (18, 18)
    assert sides(0, 10000, (4, 100, 1)) == (4, 4)
    assert sides(0, 10000, (1, 30, 1)) == (1, 24)
    assert image_shape(jnp.zeros((2, 5, 6))) == (5, 6, 1)
    assert image_shape({"a": jnp.zeros((2, 5, 6)), "b": jnp.zeros((2, 3))}) == (1, 33, 1)


def test_breaks_what_can_be_broken_without_a_gradient():
    assert not np.any(jax.grad(lambda x: stepped(x)[:, 0].sum())(x))
    over = lambda scale: square(KEY, stepped, x, y, scale * distances(), queries=400, bounds=None)  # noqa: E731
    result = jax.jit(jax.vmap(over))(SCALES)
    np.testing.assert_array_equal(result.success, np.broadcast_to(SCALES[:, None] > 1, (3, BATCH)))
    np.testing.assert_allclose(result.x_adv[0], x, atol=1e-7)
    moved = np.abs(np.asarray(result.x_adv) - x).max(axis=(2, 3))
    assert np.all(moved <= SCALES[:, None] * distances() + 1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(BATCH, SIDE, SIDE, 1), (BATCH, SIDE * SIDE)])
def test_l2_stays_on_the_sphere_or_in_it_and_breaks_the_classifier(shape):
    logits = x.reshape(BATCH, -1) @ weights
    away = np.argsort(logits, axis=1)[:, -2]
    normals = (weights[:, y] - weights[:, away]).T
    distance = np.sum(x.reshape(BATCH, -1) * normals, axis=1) / np.linalg.norm(normals, axis=1)

    def over(scale):
        return square(KEY, stepped, x.reshape(shape), y, scale * distance, norm="l2", queries=300)

    result = jax.jit(jax.vmap(over))(np.array([0.5, 3.0], np.float32))
    assert result.success[1].all()
    assert not result.success[0].any()
    x_adv = np.asarray(result.x_adv).reshape(2, BATCH, -1)
    size = np.linalg.norm(x_adv - x.reshape(1, BATCH, -1), axis=2)
    assert np.all(size <= np.array([[0.5], [3.0]]) * distance * (1 + 1e-5))
    assert x_adv.min() >= 0
    assert x_adv.max() <= 1


def test_a_proposal_changes_one_square_and_its_sign_is_one_per_channel():
    image = (6, 5, 2)
    search = SquareSearch(image=image, queries=1000)
    rows = as_rows(np.full((40, 6, 5, 2), 0.5, np.float32), np.zeros(40, int), 0.1, (0.0, 1.0))
    stripes = np.asarray(jax.jit(search.init)(KEY, rows).candidate).reshape(40, *image)
    np.testing.assert_allclose(np.abs(stripes - 0.5), 0.1, atol=1e-6)
    assert np.all(stripes == stripes[:, :1])
    sides = (jnp.asarray(2), jnp.asarray(2))
    proposal = np.asarray(jax.jit(search._stripes_in_a_square)(KEY, rows, rows.x, sides)).reshape(40, *image)
    changed = proposal != 0.5
    np.testing.assert_array_equal(changed.sum(axis=(1, 2)), 4)
    corners = {tuple(np.argwhere(c[..., 0])[0]) for c in changed}
    assert max(r for r, _ in corners) == 4  # all the way to the edge
    assert max(c for _, c in corners) == 3
    for channel in range(2):
        signs = [np.unique(np.sign(p[c[..., channel], channel] - 0.5)) for p, c in zip(proposal, changed, strict=True)]
        assert {len(s) for s in signs} == {1}
        assert {s[0] for s in signs} == {-1.0, 1.0}


def test_l1_is_refused():
    with pytest.raises(ValueError, match="square: norm"):
        square(KEY, stepped, x, y, 0.1, norm="l1")
