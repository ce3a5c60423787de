"""A small run with checkpoints, for the tests that kill it: `small_run.py DIRECTORY STEPS SECONDS_PER_BATCH`."""

import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxalign
from jaxalign.runtime import fit

FEATURES, TARGETS, ROWS = 6, 3, 8
TRUTH = np.random.default_rng(7).normal(size=(FEATURES, TARGETS)).astype(np.float32)


def regression(learning_rate: float = 0.05) -> jaxalign.Algorithm:
    """Linear regression with noise from the state's key, so a key that is not restored shows."""
    network = jaxalign.Network(lambda key: {"w": jax.random.normal(key, (FEATURES, TARGETS))}, lambda p, x: x @ p["w"])

    def objective(params, batch, key):
        x, y = batch
        noise = 0.1 * jax.random.normal(key, y.shape)
        error = network.apply(params, x) - y - noise
        return jnp.mean(error**2), {"largest": jnp.max(jnp.abs(error))}

    return jaxalign.gradient_algorithm(network, objective, optax.adam(learning_rate))


def batch(step: int, rows: int = ROWS) -> tuple[np.ndarray, np.ndarray]:
    """A pure function of the step."""
    x = np.random.default_rng((3, step)).normal(size=(rows, FEATURES)).astype(np.float32)
    return x, x @ TRUTH


def main() -> None:
    directory, steps, pause = Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])

    def slow_batch(step: int):
        time.sleep(pause)
        return batch(step)

    fit(
        regression(),
        jax.random.key(11),
        slow_batch,
        steps=steps,
        directory=directory,
        resume=True,
        chunk=5,
        checkpoint_every=10,
        progress=False,
        tensorboard=False,
    )


if __name__ == "__main__":
    main()
