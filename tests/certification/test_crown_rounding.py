"""Bounds that must hold in exact arithmetic, against rational numbers."""

from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign.certification.crown import crown_bounds


def exactly(layers, x):
    """relu layers (W [O, I], b [O]) at x [I] in rational arithmetic."""
    values = [Fraction(float(v)) for v in x]
    for i, (weight, bias) in enumerate(layers):
        rows = zip(np.asarray(weight).tolist(), np.asarray(bias).tolist(), strict=True)
        values = [sum((Fraction(w) * v for w, v in zip(row, values, strict=True)), Fraction(b)) for row, b in rows]
        if i < len(layers) - 1:
            values = [max(v, Fraction(0)) for v in values]
    return values


def network(layers):
    def fn(x):
        for weight, bias in layers[:-1]:
            x = jax.nn.relu(weight @ x + bias)
        return layers[-1][0] @ x + layers[-1][1]

    return fn


def broken(layers, x, sound):
    """How many exact outputs the bounds at the single point x leave out."""
    bounds = crown_bounds(network(layers), x, x, sound=sound)
    sides = zip(exactly(layers, x), np.asarray(bounds.lower), np.asarray(bounds.upper), strict=True)
    return sum(not Fraction(float(low)) <= value <= Fraction(float(high)) for value, low, high in sides)


def test_cancelling_weights_break_plain_bounds_and_not_sound_ones():
    """Sums of huge terms that cancel: float32 loses what is left, and exact values fall out of plain bounds."""
    rng = np.random.default_rng(0)
    plain = 0
    for _ in range(20):
        half, second = rng.normal(size=(4, 8)) * 1e4, np.tile(rng.normal(size=(2, 4)), 2)
        first = np.concatenate([half, -half]), rng.normal(size=8)
        layers = [[jnp.asarray(v, jnp.float32) for v in layer] for layer in (first, (second, np.ones(2)))]
        x = jnp.asarray(rng.normal(size=8), jnp.float32)
        plain += broken(layers, x, sound=False)
        assert broken(layers, x, sound=True) == 0
    assert plain > 0
