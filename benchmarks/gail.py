"""How many environment steps a second do GAIL and AIRL with PPO learn from, against imitation with Stable-Baselines3?

CartPole, the same work on every side: environments, steps of a rollout, epochs, minibatches, discriminator updates and
their batches, tanh networks of 64 x 64 for policy and value and two layers of 64 in the discriminators; no gradient
penalty and no absorbing states, which imitation does not have. One run of ours is a whole training of `seeds` seeds in
one program, one after another; of the peer one round, of one seed. Compilation is apart. Quality, after as many rounds
on each side: how long the last policy balances (at most 500 steps; a random one 22), and how many metres from the mark.

The expert pushes right with probability sigmoid(gains (observation - mark)), with which it never falls.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.measure import Measurement, measure
from jaxalign import sweep, train
from jaxalign.environments import cartpole
from jaxalign.irl import Transitions, airl, gail
from jaxalign.rl import act_with, actor_critic, demonstrations, discriminator_network, ppo_learner, ppo_optimizer

GAINS, MARK, DISCOUNT = (2.0, 4.0, 30.0, 6.0), 1.0, 0.99


def cases(quick: bool) -> list[dict[str, Any]]:
    """One seed of GAIL and of AIRL against imitation, and several seeds at once; a case holds the demonstrations."""
    shared = {
        "num_envs": 8, "num_steps": 128 if quick else 512, "num_epochs": 4, "num_minibatches": 4 if quick else 16,
        "rounds": 3 if quick else 24, "discriminator_steps": 16, "discriminator_batch": 256, "discount": DISCOUNT,
        "learning_rate": 1e-3, "mark": MARK, "seed": 0, **shown(episodes=4, length=500),
    }  # fmt: skip
    several = 2 if quick else 16
    return [
        {"name": f"{method}, {seeds} seed{'s' if seeds > 1 else ''}", "method": method, "seeds": seeds, **shared}
        for method in ("gail", "airl")
        for seeds in (1, several)
    ]


def shown(*, episodes: int, length: int) -> dict[str, Any]:
    """The expert's episodes: observations [E, length + 1, 4] and actions [E, length], as lists."""

    def act(key: jax.Array, observation: jax.Array) -> jax.Array:
        right = jnp.asarray(GAINS) @ observation.at[0].add(-MARK)
        return jax.random.bernoulli(key, jax.nn.sigmoid(right)).astype(jnp.int32)

    rows = demonstrations(jax.random.key(0), cartpole(), act, episodes=episodes, max_steps=length)
    states, after = (np.asarray(x).reshape(episodes, length, 4) for x in (rows.states, rows.next_states))
    observations = np.concatenate([states, after[:, -1:]], axis=1)
    return {"observations": observations.tolist(), "actions": np.asarray(rows.actions).reshape(episodes, length).tolist()}


def run(case: dict[str, Any]) -> Measurement:
    """Environment steps per second of whole trainings."""
    world = cartpole()
    model = actor_critic(world)
    seen = jnp.asarray(case["observations"])
    actions = jnp.asarray(case["actions"], jnp.int32).reshape(-1)
    states, after = (x.reshape(-1, 4) for x in (seen[:, :-1], seen[:, 1:]))
    expert = Transitions(states, actions, after, jnp.zeros(actions.shape, bool))
    sizes = {name: case[name] for name in ("num_envs", "num_steps", "num_epochs", "num_minibatches", "discount")}
    learner = ppo_learner(
        world, model, ppo_optimizer(case["learning_rate"]), temperature=float(case["method"] == "airl"), **sizes
    )
    options = {name: case[name] for name in ("discriminator_steps", "discriminator_batch")}
    of_both, of_states = (discriminator_network(world, expert, hidden=(64, 64), of_actions=x) for x in (True, False))
    optimizer = optax.adam(case["learning_rate"])
    algorithm = (
        gail(learner, of_both, optimizer, expert=expert, **options)
        if case["method"] == "gail"
        else airl(learner, of_both, of_states, optimizer, discount=case["discount"], expert=expert, **options)
    )

    def one(_: None, key: jax.Array) -> Any:
        state, _ = train(algorithm, key, None, length=case["rounds"])
        return state.policy.params

    def score(params: Any) -> dict[str, float]:
        def of_lane(lane: Any) -> tuple[jax.Array, jax.Array]:
            rows = demonstrations(jax.random.key(1), world, act_with(model, lane), episodes=32, max_steps=500)
            away = jnp.abs(rows.next_states[:, 0] - case["mark"])
            return jnp.sum(rows.weights) / 32, jnp.sum(rows.weights * away) / jnp.sum(rows.weights)

        steps, away = jax.jit(lambda lanes: jax.lax.map(of_lane, lanes))(params)
        return {"steps balanced": float(jnp.mean(steps)), "metres from mark": float(jnp.mean(away))}

    return measure(
        lambda keys: sweep(one, None, keys),
        jax.random.split(jax.random.key(case["seed"]), case["seeds"]),
        unit="environment steps",
        amount=case["seeds"] * case["rounds"] * case["num_envs"] * case["num_steps"],
        warmup=0,
        repeats=3,
        quality=score,
    )
