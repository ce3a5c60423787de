"""Linear probes: what can be read from activations, held out, and against shuffled labels."""

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxalign.statistics import wilson_interval
from jaxalign.types import Array, ArrayLike, Key


class LinearProbe(NamedTuple):
    """A probe x -> x @ weights + bias, and how it did on the held-out part.

    weights, bias: [D, C], [C], in the units of x
    accuracy, low, high: scalars, the accuracy and Wilson's interval
    majority: accuracy of always guessing the training part's commonest class
    control: accuracy of the same procedure on labels that were shuffled; near `majority` unless something leaks
    """

    weights: Array
    bias: Array
    accuracy: Array
    low: Array
    high: Array
    majority: Array
    control: Array


def held_out_rows(key: Key, rows: int, held_out: float, *, caller: str) -> tuple[Array, Array]:
    """(train [N - M], test [M]): row numbers 0 .. N - 1 in a random order, M = round(held_out N) of them for testing.

    Raises ValueError, in the name of `caller`, if a part would be empty.
    """
    tested = round(held_out * rows)
    if not 1 <= tested < rows:
        raise ValueError(f"{caller}: held_out={held_out} of {rows} rows leaves a part empty")
    order = jax.random.permutation(key, rows)
    return order[tested:], order[:tested]


def fit_linear_probe(
    x: ArrayLike, labels: ArrayLike, *, num_classes: int, l2: ArrayLike = 1e-3, steps: int = 50
) -> tuple[Array, Array]:
    """Softmax regression: (weights [D, C], bias [C]) that minimise

        mean_n -log softmax(x_n weights + bias)[labels_n] + l2 / 2 sum_dc (std_d weights_dc)^2

    by `steps` of L-BFGS on columns scaled to deviation 1 (a constant column keeps weight 0). x is [N, D], labels [N] in
    [0, C).
    """
    x, labels = jnp.asarray(x), jnp.asarray(labels)
    mean, std = x.mean(axis=0), x.std(axis=0)
    varies = std > 1e-6 * jnp.abs(mean)
    std = jnp.where(varies, std, 1.0)
    scaled = jnp.where(varies[None], (x - mean[None]) / std[None], 0.0)

    def loss(params: tuple[Array, Array]) -> Array:
        weights, bias = params
        cross_entropy = optax.softmax_cross_entropy_with_integer_labels(scaled @ weights + bias[None], labels)
        return cross_entropy.mean() + 0.5 * l2 * jnp.sum(weights**2)

    optimizer = optax.lbfgs()
    value_and_grad = optax.value_and_grad_from_state(loss)

    def improve(carry: tuple, _: None) -> tuple[tuple, None]:
        params, state = carry
        value, grad = value_and_grad(params, state=state)
        updates, state = optimizer.update(grad, state, params, value=value, grad=grad, value_fn=loss)
        return (optax.apply_updates(params, updates), state), None

    start = (jnp.zeros((x.shape[1], num_classes), x.dtype), jnp.zeros(num_classes, x.dtype))
    ((weights, bias), _), _ = jax.lax.scan(improve, (start, optimizer.init(start)), length=steps)
    weights = weights / std[:, None]
    return weights, bias - mean @ weights


def linear_probe(
    key: Key,
    x: ArrayLike,
    labels: ArrayLike,
    *,
    num_classes: int,
    held_out: float = 0.3,
    l2: ArrayLike = 1e-3,
    steps: int = 50,
    confidence: ArrayLike = 0.95,
) -> LinearProbe:
    """Fit a softmax regression on a random part of the rows, test it on the rest, and again with labels shuffled.

    Alain and Bengio 2016 (arXiv 1610.01644); the control is Zhang and Bowman's (arXiv 1809.10040) and Hewitt and
    Liang's (arXiv 1909.03368) caution that a probe may learn by itself. `vmap` over x [L, N, D] probes every layer.

    Args:
        x: activations [N, D]; labels: [N] int in [0, num_classes).
        held_out: the share of rows to test on, drawn with `key`.
        l2, steps: see `fit_linear_probe`.
        confidence: of the interval (low, high).

    Raises ValueError if x and labels differ in length, a label is out of range, or a part would be empty.
    """
    x, labels = jnp.asarray(x), jnp.asarray(labels)
    chex.assert_rank([x, labels], [2, 1])
    chex.assert_equal_shape_prefix([x, labels], 1)
    if not isinstance(labels, jax.core.Tracer):
        least, most = np.min(np.asarray(labels)), np.max(np.asarray(labels))
        if not 0 <= least <= most < num_classes:
            raise ValueError(f"linear_probe: labels must lie in 0..{num_classes - 1}, got {least}..{most}")
    split_key, control_key = jax.random.split(key)
    train, test = held_out_rows(split_key, len(labels), held_out, caller="linear_probe")

    def probe(labels: Array) -> tuple[Array, Array, Array]:
        weights, bias = fit_linear_probe(x[train], labels[train], num_classes=num_classes, l2=l2, steps=steps)
        right = jnp.argmax(x[test] @ weights + bias[None], axis=1) == labels[test]
        return weights, bias, right.sum()

    # Both at once, so that the fit is compiled once.
    both = jax.vmap(probe)(jnp.stack([labels, jax.random.permutation(control_key, labels)]))
    (weights, bias, right), control = (leaf[0] for leaf in both), both[2][1]
    low, high = wilson_interval(right, len(test), confidence=confidence)
    commonest = jnp.argmax(jnp.bincount(labels[train], length=num_classes))
    majority = jnp.mean(labels[test] == commonest)
    return LinearProbe(weights, bias, right / len(test), low, high, majority, control / len(test))
