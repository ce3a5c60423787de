"""How many environment steps a second does adversarial IRL work through, against imitation's GAIL and AIRL?

One round: the policy walks `num` episodes of `length` steps on a gridworld, the discriminator takes its steps, the
policy improves. Demonstrations, rounds and discriminator steps are the same on both sides; the policy learner is not.
Ours makes one mirror descent step on the known dynamics, until there is a model-free learner to compare with; the peer
is PPO in Stable-Baselines3, the only kind of learner that imitation takes, on a batch environment in NumPy. So read the
rate together with the quality: `score` is the policy's exact return, 0 for a random policy and 1 for the expert's.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.measure import Measurement, measure
from jaxalign.irl import adversarial_training as adversarial
from jaxalign.irl.trajectories import Trajectories
from jaxalign.mdp import SparseTransition, TabularMDP, expected_return

DISCOUNT = 0.9


def cases(quick: bool) -> list[dict[str, Any]]:
    """GAIL and AIRL on a small grid and a larger one; the case holds the tables and the demonstrations."""
    settings = ((4, 8, 2, 2),) if quick else ((5, 16, 10, 10), (10, 64, 10, 10))
    return [
        {"name": f"{method}, {size} x {size} grid, {num} episodes", "method": method, "num": num, "length": 32,
         "rounds": rounds, "repeats": repeats, "discriminator_steps": 4, "discount": DISCOUNT, "seed": 0,
         **problem(size, num=100, length=32)}
        for size, num, rounds, repeats in settings
        for method in ("gail", "airl")
    ]  # fmt: skip


def problem(size: int, *, num: int, length: int) -> dict[str, Any]:
    """A grid without an end and a random reward: next_state [S, A], reward [S], `num` demonstrations, two returns."""
    rng = np.random.default_rng(0)
    y, x = np.divmod(np.arange(size * size), size)
    moves = ((-1, 0), (0, 1), (1, 0), (0, -1), (0, 0))
    after = [np.clip(y + down, 0, size - 1) * size + np.clip(x + right, 0, size - 1) for down, right in moves]
    next_state = np.stack(after, axis=1)
    reward, value = rng.normal(size=size * size), np.zeros(size * size)
    for _ in range(400):
        q = reward[:, None] + DISCOUNT * value[next_state]
        value = q.max(1) + np.log(np.exp(q - q.max(1, keepdims=True)).sum(1))
    policy = np.exp(q - value[:, None])
    states = [rng.integers(0, size * size, num)]
    actions = []
    for _ in range(length):
        actions.append((rng.random((num, 1)) > np.cumsum(policy[states[-1]], axis=1)).sum(1).clip(max=4))
        states.append(next_state[states[-1], actions[-1]])
    returns = [mean_return(next_state, reward, p) for p in (np.full_like(policy, 0.2), policy)]
    return {
        "next_state": next_state.tolist(), "reward": reward.tolist(), "random_return": returns[0],
        "expert_return": returns[1], "states": np.stack(states, 1).tolist(), "actions": np.stack(actions, 1).tolist(),
    }  # fmt: skip


def mean_return(next_state: np.ndarray, reward: np.ndarray, policy: np.ndarray) -> float:
    """The exact discounted return of a policy [S, A] from a uniform start."""
    states = len(reward)
    between = np.zeros((states, states))
    np.add.at(between, (np.arange(states)[:, None], next_state), policy)
    return float(np.linalg.solve(np.eye(states) - DISCOUNT * between, reward).mean())


def run(case: dict[str, Any]) -> Measurement:
    """Environment steps per second of `rounds` rounds in one compiled loop; training goes on from repeat to repeat."""
    next_state, reward = np.asarray(case["next_state"], np.int32), jnp.asarray(case["reward"])
    states, actions = next_state.shape
    transition = SparseTransition(next_state[:, :, None], np.ones((states, actions, 1), np.float32))
    mdp = TabularMDP(transition, np.full(states, 1.0 / states), np.zeros(states, bool), case["discount"])
    walked, taken = np.asarray(case["states"], np.int32), np.asarray(case["actions"], np.int32)
    # The last action is of no account: it only makes the row as long as that of the states.
    shown = Trajectories(walked, np.pad(taken, ((0, 0), (0, 1))), np.ones(walked.shape, bool))
    expert = adversarial.trajectory_transitions(mdp, Trajectories(*map(jnp.asarray, shown)))
    rollout = adversarial.sampled_rollout(mdp, num=case["num"], length=case["length"])
    about = {"expert": expert, "discriminator_steps": case["discriminator_steps"]}
    if case["method"] == "gail":
        learner = adversarial.policy_mirror_descent(mdp, step_size=0.2, temperature=0.0, rollout=rollout)
        algorithm = adversarial.gail(learner, adversarial.state_table(states, actions), optax.adam(0.05), **about)
    else:
        learner = adversarial.policy_mirror_descent(mdp, step_size=1.0, rollout=rollout)
        table = adversarial.state_table(states)
        algorithm = adversarial.airl(learner, table, table, optax.adam(0.05), discount=mdp.discount, **about)
    state = jax.jit(algorithm.init)(jax.random.key(case["seed"]))
    spread = case["expert_return"] - case["random_return"]

    def score(out: Any) -> dict[str, float]:
        found = expected_return(mdp, out[0].policy, reward)
        return {"score": float((found - case["random_return"]) / spread), "rounds": float(out[0].step)}

    return measure(
        lambda state: jax.lax.scan(algorithm.step, state, None, length=case["rounds"]),
        state,
        unit="environment steps",
        amount=case["rounds"] * case["num"] * case["length"],
        repeats=case["repeats"],
        advance=lambda args, out: (out[0],),
        quality=score,
    )
