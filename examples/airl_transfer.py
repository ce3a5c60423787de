"""Which learned reward survives a change of the dynamics? AIRL with a reward of states, AIRL with actions, and GAIL.

An expert walks a 5 x 5 grid, with another reward in each seed. What was learned from it is taken to grids that move
differently: AIRL's rewards are planned for anew, GAIL has no reward left at its optimum, so its policy stays.
Printed is the return lost against the best policy there (all act greedily, discount 0.9): mean and 95% interval.
Run: python examples/airl_transfer.py   (half a minute on two cores)
"""

import jax
import jax.numpy as jnp
import optax

from jaxalign import sweep, train
from jaxalign.irl import airl, exact_rollout, expected_value_difference, gail, policy_mirror_descent, state_table
from jaxalign.mdp import gridworld, soft_value_iteration, sparse_transition, value_iteration
from jaxalign.statistics import bootstrap_interval

SIZE, SEEDS, STEPS, DISCOUNT = 5, 16, 600, 0.9
STATES, ACTIONS = SIZE * SIZE, 5
WALL = jnp.zeros((SIZE, SIZE), bool).at[SIZE // 2, :-1].set(True)  # with a door at its right end

grid = gridworld(SIZE, SIZE, discount=DISCOUNT)
home = grid.replace(transition=sparse_transition(grid.transition))


def remapped(moves):
    """The same grid where action a (up, right, down, left, stay) does what `moves[a]` did."""
    return grid.replace(transition=grid.transition.replace(probability=grid.transition.probability[jnp.array(moves)]))


WORLDS = {
    "at home": grid,
    "a new wall": gridworld(SIZE, SIZE, discount=DISCOUNT, walls=WALL),
    "no way up": remapped([4, 1, 2, 3, 4]),
    "controls turned": remapped([1, 2, 3, 0, 4]),
    "slippery": gridworld(SIZE, SIZE, discount=DISCOUNT, slip=0.5),
}


def run(_, key):
    """One seed: {method: return lost in each world}."""
    reward_key, states_key, actions_key, gail_key = jax.random.split(key, 4)
    reward = jax.random.normal(reward_key, (STATES,))
    expert = exact_rollout(home)(key, soft_value_iteration(home, reward).log_policy)
    of_states, of_actions = state_table(STATES), state_table(STATES, ACTIONS)

    def recover(key, network):
        learner = policy_mirror_descent(home, step_size=1.0)
        algorithm = airl(learner, network, of_states, optax.adam(0.05), discount=DISCOUNT, expert=expert)
        state, _ = train(algorithm, key, None, length=STEPS)
        return network.apply(state.params["reward"], jnp.arange(STATES))

    learner = policy_mirror_descent(home, step_size=0.1, temperature=0.0)
    imitator, _ = train(gail(learner, of_actions, optax.adam(0.1), expert=expert), gail_key, None, length=STEPS)
    rewards = {"AIRL, states": recover(states_key, of_states), "AIRL, actions": recover(actions_key, of_actions)}

    def lost(world):
        policies = {name: value_iteration(world, learned).policy for name, learned in rewards.items()}
        policies["GAIL"] = jax.nn.one_hot(jnp.argmax(imitator.policy, axis=1), ACTIONS)
        return {name: expected_value_difference(world, reward, jnp.log(policy)) for name, policy in policies.items()}

    return jax.vmap(lost)(jax.tree.map(lambda *leaves: jnp.stack(leaves), *WORLDS.values()))


if __name__ == "__main__":
    scores = sweep(run, None, jax.random.split(jax.random.key(0), SEEDS))
    print(f"{'return lost':17}" + "".join(f"{name:25}" for name in scores))
    for i, world in enumerate(WORLDS):
        cells = []
        for all_worlds in scores.values():
            lost = jnp.maximum(all_worlds[:, i], 0.0)  # rounding can take it a little below 0
            low, high = bootstrap_interval(jax.random.key(1), lost)
            cells.append(f"{float(lost.mean()):6.3f} [{float(low):.3f}, {float(high):.3f}]")
        print(f"{world:17}" + "".join(f"{cell:25}" for cell in cells))
