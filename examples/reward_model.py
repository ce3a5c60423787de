"""A reward recovered from comparisons: an ensemble learns from noisy choices between trajectories of unequal length.

The chooser weighs three features of each step and errs as the Bradley-Terry model says. Training stops by itself; the
script prints the weights found beside the true ones, and how often and how surely the ensemble is right on new pairs.
Run: python examples/reward_model.py   (a few seconds)
"""

import jax
import jax.numpy as jnp
import optax

from jaxalign import Network, train, with_early_stopping
from jaxalign.preferences import (
    Comparisons,
    comparison_loss,
    ensemble_mean,
    ensemble_rewards,
    expected_calibration_error,
    reward_ensemble,
    trajectory_reward,
)
from jaxalign.statistics import bootstrap_interval

TRUE_WEIGHTS, MEMBERS, PAIRS, LENGTH, STEPS = (1.0, -0.5, 0.25), 5, 2000, 12, 400

linear = Network(
    init=lambda key: {"w": 0.1 * jax.random.normal(key, (len(TRUE_WEIGHTS),))},
    apply=lambda params, features: features @ params["w"],
)
reward = trajectory_reward(linear)


def compare(key, pairs):
    """Two trajectories of up to LENGTH steps, and which one a noisy chooser prefers: 0 the first, 1 the second."""
    feature_key, length_key, choice_key = jax.random.split(key, 3)
    features = jax.random.normal(feature_key, (2, pairs, LENGTH, len(TRUE_WEIGHTS)))
    lengths = jax.random.randint(length_key, (2, pairs), 1, LENGTH + 1)
    mask = jnp.arange(LENGTH)[None, None, :] < lengths[..., None]
    returns = jnp.sum((features @ jnp.array(TRUE_WEIGHTS)) * mask, axis=-1)
    outcome = jax.random.bernoulli(choice_key, jax.nn.sigmoid(returns[1] - returns[0])).astype(jnp.int32)
    return Comparisons(features[0], mask[0], features[1], mask[1], outcome=outcome, index=jnp.arange(pairs))


def rewards(params, pairs):
    """Both sides' rewards [MEMBERS, pairs]."""
    first = ensemble_rewards(reward, params, pairs.chosen, pairs.chosen_mask)
    return first, ensemble_rewards(reward, params, pairs.rejected, pairs.rejected_mask)


@jax.jit
def learn(key):
    """The ensemble's best parameters, and when they were found; rows are drawn 64 at a time."""
    data_key, validation_key, order_key, run_key = jax.random.split(key, 4)
    pairs, validation = compare(data_key, PAIRS), compare(validation_key, 500)
    algorithm = with_early_stopping(
        reward_ensemble(reward, optax.adam(0.03), size=MEMBERS),
        lambda state: jnp.mean(jax.vmap(loss_of(validation))(*rewards(state.params, validation))),
        every=20,
        patience=3,
    )
    rows = jax.random.randint(order_key, (STEPS, 64), 0, PAIRS)
    state, _ = train(algorithm, run_key, jax.tree.map(lambda x: x[rows], pairs))
    return state.best_params, state.best_step, state.taken


def loss_of(pairs):
    return lambda first, second: comparison_loss(first, second, outcome=pairs.outcome)


if __name__ == "__main__":
    params, best_step, taken = learn(jax.random.key(0))
    held_out = compare(jax.random.key(1), 1000)
    first, second = map(ensemble_mean, rewards(params, held_out))
    right = ((second > first) == (held_out.outcome == 1)).astype(jnp.float32)
    low, high = bootstrap_interval(jax.random.key(2), right)
    print(f"stopped after {int(taken)} of {STEPS} steps; best at step {int(best_step)}")
    for name, true, found in zip("abc", TRUE_WEIGHTS, params["w"].T, strict=True):
        print(f"weight {name}: true {true:+.2f}, found {float(found.mean()):+.2f} +- {float(found.std()):.2f}")
    print(f"right on new pairs: {float(right.mean()):.3f} [{float(low):.3f}, {float(high):.3f}]")
    sure = jax.nn.sigmoid(jnp.abs(second - first))
    print(f"expected calibration error: {float(expected_calibration_error(sure, right)):.3f}")
