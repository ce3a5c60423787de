"""Toy models of superposition: more sparse features than dimensions, and how much of a dimension each gets.

After Elhage et al. 2022, "Toy Models of Superposition" (transformer-circuits.pub/2022/toy_model).
"""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxalign.algorithm import Algorithm, Network, gradient_algorithm
from jaxalign.types import Array, ArrayLike, Key, Metrics, Params

# The dimensionality of each feature where they lie at the corners of a regular polytope: its dimensions / its corners.
POLYTOPES = {
    "orthogonal": 1.0,
    "tetrahedron": 3 / 4,
    "triangle": 2 / 3,
    "antipodal pair": 1 / 2,
    "pentagon": 2 / 5,
    "square antiprism": 3 / 8,
}


def toy_features(key: Key, batch: int, num_features: int, *, sparsity: ArrayLike) -> Array:
    """x [B, N], each entry 0 with probability `sparsity`, else uniform in [0, 1)."""
    on_key, value_key = jax.random.split(key)
    on = jax.random.bernoulli(on_key, 1.0 - jnp.asarray(sparsity), (batch, num_features))
    return jnp.where(on, jax.random.uniform(value_key, (batch, num_features)), 0.0)


def toy_output(params: Params, x: ArrayLike) -> Array:
    """relu(W^T W x + b) [B, N] of x [B, N], with the rows `params["W"]` [N, M] being the features' directions."""
    w = params["W"]
    return jax.nn.relu(x @ w @ w.T + params["b"][None])


def toy_model(
    num_features: int,
    num_hidden: int,
    *,
    importance: ArrayLike = 1.0,
    sparsity: ArrayLike = 0.0,
    batch: int = 1024,
    optimizer: optax.GradientTransformation | None = None,
) -> Algorithm:
    """N features squeezed through M < N dimensions and read back through a relu, as an Algorithm that draws its data.

    loss = mean over B of sum_i importance_i (x_i - relu(W^T W x + b)_i)^2 (section 2, "The ReLU Output Model").

    Args:
        num_features, num_hidden: N and M. `params["W"]` is [N, M], `params["b"]` [N].
        importance: scalar or [N]; 0.7^i, say.
        sparsity: S, the probability that a feature is 0; may be traced, so that `sweep` runs all of them at once.
        batch: samples drawn per step.
        optimizer: Adam at 1e-3 if not given.

    `step` takes None for a batch. Metrics: loss, gradient_norm, `features` = ||W||_F^2, about how many are represented.
    """
    weight = jnp.broadcast_to(jnp.asarray(importance, jnp.result_type(float)), (num_features,))

    def init(key: Key) -> Params:
        scale = jnp.sqrt(2.0 / (num_features + num_hidden))
        return {"W": scale * jax.random.normal(key, (num_features, num_hidden)), "b": jnp.zeros(num_features)}

    def objective(params: Params, _: None, key: Key) -> tuple[Array, Metrics]:
        x = toy_features(key, batch, num_features, sparsity=sparsity)
        loss = jnp.mean(jnp.sum(weight[None] * (x - toy_output(params, x)) ** 2, axis=1))
        return loss, {"features": jnp.sum(params["W"] ** 2)}

    network = Network(init, toy_output)
    return gradient_algorithm(network, objective, optax.adam(1e-3) if optimizer is None else optimizer)


def feature_dimensionality(w: ArrayLike) -> Array:
    """[N], D_i = ||W_i||^2 / sum_j (W_i_hat . W_j)^2: the share of a dimension that feature i has to itself.

    Args:
        w: [N, M], feature i's direction W_i in row i; W_i_hat = W_i / ||W_i||.

    A feature that is not represented, W_i = 0, has 0. The sum over i is at most M ("The Geometry of Superposition").
    """
    w = jnp.asarray(w)
    chex.assert_rank(w, 2)
    gram = w @ w.T
    square = jnp.diagonal(gram)
    # ||W_i||^4 / sum_j (W_i . W_j)^2: no division by the length, so that W_i = 0 has a gradient.
    overlap = jnp.sum(gram**2, axis=1)
    return jnp.where(square > 0, square**2 / jnp.where(overlap > 0, overlap, 1.0), 0.0)


def polytope(name: str) -> np.ndarray:
    """The corners [N, M], at distance 1 from the middle, of a solid in POLYTOPES ("orthogonal": the two axes)."""

    def ring(corners: int, turn: float = 0.0) -> np.ndarray:
        angle = 2 * np.pi * (np.arange(corners) + turn) / corners
        return np.stack([np.cos(angle), np.sin(angle)], axis=1)

    if name == "orthogonal":
        return np.eye(2)
    if name == "antipodal pair":
        return np.array([[1.0], [-1.0]])
    if name in ("triangle", "pentagon"):
        return ring(3 if name == "triangle" else 5)
    if name == "tetrahedron":
        return np.array([[1, 1, 1], [1, -1, -1], [-1, 1, -1], [-1, -1, 1]]) / np.sqrt(3)
    if name == "square antiprism":
        # The height at which the corners form a tight frame, as every other solid here does.
        rings = [np.hstack([np.sqrt(2 / 3) * ring(4, turn), np.full((4, 1), z)]) for turn, z in ((0, 1), (0.5, -1))]
        return np.vstack([part * [1, 1, np.sqrt(1 / 3)] for part in rings])
    raise ValueError(f"polytope: unknown {name!r}; there are {', '.join(POLYTOPES)}")
