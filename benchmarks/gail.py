"""How many environment steps a second do GAIL and AIRL with PPO learn from, against imitation with Stable-Baselines3?

CartPole with the sizes of imitation's own quick starts, the same work on every side: 8 environments of 2,048 steps a
round, PPO in 5 epochs of minibatches of 64, 8 (AIRL: 16) discriminator updates on 1,024 (2,048) rows of each side, tanh
networks of 64 x 64 for policy and value, 32 x 32 with ReLU in the discriminators; no gradient penalty and no absorbing
states, which imitation does not have. One run of ours is a whole training of `seeds` seeds in one program, one after
another; of the peer one round, of one seed. Compilation is apart. Quality, after as many rounds on each side: how long
the last policy balances (at most 500 steps; a random one 22), and how many metres it is from the expert's mark.

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

GAINS, MARK = (2.0, 4.0, 30.0, 6.0), 1.0


def cases(quick: bool) -> list[dict[str, Any]]:
    """One seed of GAIL and of AIRL against imitation, and several seeds at once; a case holds the demonstrations."""
    shared = {
        "num_envs": 8, "num_steps": 512 if quick else 2048, "num_epochs": 5, "batch_size": 64, "discount": 0.95,
        "learning_rate": 4e-4, "discriminator_learning_rate": 1e-3, "rounds": 3 if quick else 8, "mark": MARK,
        "seed": 0, **shown(episodes=5, length=500),
    }  # fmt: skip
    updates = {
        "gail": {"discriminator_steps": 8, "discriminator_batch": 1024},
        "airl": {"discriminator_steps": 16, "discriminator_batch": 2048},
    }
    return [
        {"name": f"{name}, {seeds} seed{'s' if seeds > 1 else ''}", "method": name, "seeds": seeds, **shared, **sizes}
        for name, sizes in updates.items()
        for seeds in (1, 2 if quick else 16)
    ]


def shown(*, episodes: int, length: int) -> dict[str, Any]:
    """The expert's episodes: observations [E, length + 1, 4] and actions [E, length], as lists."""

    def act(key: jax.Array, observation: jax.Array) -> jax.Array:
        right = jnp.asarray(GAINS) @ observation.at[0].add(-MARK)
        return jax.random.bernoulli(key, jax.nn.sigmoid(right)).astype(jnp.int32)

    rows = demonstrations(jax.random.key(0), cartpole(), act, episodes=episodes, max_steps=length)
    states, after = (np.asarray(x).reshape(episodes, length, 4) for x in (rows.states, rows.next_states))
    actions = np.asarray(rows.actions).reshape(episodes, length)
    return {"observations": np.concatenate([states, after[:, -1:]], axis=1).tolist(), "actions": actions.tolist()}


def run(case: dict[str, Any]) -> Measurement:
    """Environment steps per second of whole trainings."""
    world = cartpole()
    model = actor_critic(world)
    seen = jnp.asarray(case["observations"])
    actions = jnp.asarray(case["actions"], jnp.int32).reshape(-1)
    states, after = (x.reshape(-1, 4) for x in (seen[:, :-1], seen[:, 1:]))
    expert = Transitions(states, actions, after, jnp.zeros(actions.shape, bool))
    sizes = {name: case[name] for name in ("num_envs", "num_steps", "num_epochs", "discount")}
    learner = ppo_learner(
        world, model, ppo_optimizer(case["learning_rate"]), temperature=float(case["method"] == "airl"),
        num_minibatches=case["num_envs"] * case["num_steps"] // case["batch_size"], **sizes,
    )  # fmt: skip
    options = {"expert": expert, **{name: case[name] for name in ("discriminator_steps", "discriminator_batch")}}
    of_both, of_states = (
        discriminator_network(world, expert, activation=jax.nn.relu, of_actions=x) for x in (True, False)
    )
    optimizer = optax.adam(case["discriminator_learning_rate"])
    algorithm = (
        gail(learner, of_both, optimizer, **options)
        if case["method"] == "gail"
        else airl(learner, of_both, of_states, optimizer, discount=case["discount"], **options)
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
