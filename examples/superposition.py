"""Toy models of superposition: the sparser the features, the more of them share a dimension, at the corners of solids.

One program trains a model of 40 features in 10 dimensions at 16 sparsities, another one of 5 features in a plane. The
table shows how many features are represented (||W||_F^2), and which share of a dimension they have; the picture,
superposition.png, where they lie (Elhage et al. 2022).
Run: python examples/superposition.py   (two minutes on two cores)
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxalign import sweep, train
from jaxalign.interpretability.toy_superposition import POLYTOPES, feature_dimensionality, toy_model
from jaxalign.runtime.superposition_figure import superposition_figure

FEATURES, HIDDEN, POINTS, STEPS, BATCH = 40, 10, 16, 3000, 256
PLANE, PLANE_SPARSITIES, SEEDS = 5, (0.0, 0.8, 0.95), 4

sparsity = 1 - jnp.geomspace(1.0, 0.02, POINTS)
rate = optax.cosine_decay_schedule(1e-2, STEPS)


def learn(features, hidden, importance):
    """`run` for `sweep`: (directions [N, M], mean loss of the last tenth) at one sparsity."""

    def run(sparsity, key):
        model = toy_model(
            features, hidden, importance=importance, sparsity=sparsity, batch=BATCH, optimizer=optax.adam(rate)
        )
        state, metrics = train(model, key, None, length=STEPS)
        return state.params["W"], metrics["loss"][-STEPS // 10 :].mean()

    return jax.jit(lambda sparsities, keys: sweep(run, sparsities, keys))


w, _ = learn(FEATURES, HIDDEN, 1.0)(sparsity, jax.random.split(jax.random.key(0), 1))
w = np.asarray(w[:, 0])
print("sparsity  represented  share of a dimension: least, median, most")
for s, directions in zip(sparsity, w, strict=True):
    low, middle, high = np.quantile(feature_dimensionality(directions), [0.0, 0.5, 1.0])
    print(f"{float(s):8.3f}  {np.square(directions).sum():11.1f}  {low:.3f}, {middle:.3f}, {high:.3f}")

importance = 0.9 ** jnp.arange(PLANE)
corners, losses = learn(PLANE, 2, importance)(jnp.array(PLANE_SPARSITIES), jax.random.split(jax.random.key(1), SEEDS))
best = np.argmin(losses, axis=1)
planes = [(f"sparsity {s:g}", np.asarray(corners[i, best[i]])) for i, s in enumerate(PLANE_SPARSITIES)]
for title, plane in planes:
    shares = np.asarray(feature_dimensionality(plane))
    solid = min(POLYTOPES, key=lambda name: abs(POLYTOPES[name] - np.median(shares[shares > 0.05])))
    print(f"five features in a plane at {title}: {np.round(shares, 2)}, closest to: {solid}")

superposition_figure(1 - np.asarray(sparsity), w, planes=planes).savefig("superposition.png", dpi=150)
print("picture: superposition.png")
