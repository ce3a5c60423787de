"""Acting in a finite MDP through a faulty sensor: what a policy of single readings earns, and beliefs over states.

observation[s, o] is the probability that the sensor reads o in state s. The agent sees when the episode ends, so a
belief is always over states in which it still acts.
"""

import jax
import jax.numpy as jnp

from jaxalign.mdp.tabular import TabularMDP, action_reward
from jaxalign.mdp.transitions import push_forward, sample_next
from jaxalign.rl.faults import checked_rate
from jaxalign.types import Array, ArrayLike, Key


def sensor_faults(mdp: TabularMDP, *, rate: ArrayLike, noise: ArrayLike | None = None) -> Array:
    """A sensor that reads the state, or noise: observation[s, o] = (1 - rate) 1[s = o] + rate noise[s, o], [S, S].

    Args:
        rate: in [0, 1]; may be traced.
        noise: [S, S], the readings of a fault in each state; [S]: the same in all (one-hot: a sensor that drops to one
            reading); None: any state, uniformly.

    Raises ValueError on another shape and, outside jit, a rate outside [0, 1].
    """
    states = mdp.num_states
    rate = checked_rate("sensor_faults", rate)
    noise = jnp.full(states, 1.0 / states, mdp.initial.dtype) if noise is None else jnp.asarray(noise)
    if noise.shape not in ((states,), (states, states)):
        raise ValueError(f"sensor_faults: noise must be [S] or [S, S] with S={states}, got {noise.shape}")
    return (1.0 - rate) * jnp.eye(states) + rate * jnp.broadcast_to(noise, (states, states))


def policy_through_sensor(log_policy: Array, observation: Array) -> Array:
    """What a policy of readings does in each state: log sum_o observation[s, o] exp(log_policy[o, a]), [S, A].

    `policy_evaluation` of it is exactly what acting on single readings earns.
    log_policy: [S, A], given the reading; observation: [S, S].
    """
    policy = observation @ jnp.exp(log_policy)
    possible = policy > 0.0
    # Two wheres: the derivative of log 0 would be infinite.
    return jnp.where(possible, jnp.log(jnp.where(possible, policy, 1.0)), -jnp.inf)


def belief_update(mdp: TabularMDP, observation: Array, belief: Array, action: ArrayLike, reading: ArrayLike) -> Array:
    """Bayes' rule after an action and a reading: new[z] proportional to observation[z, reading] sum_s belief[s]
    P(z | s, action) over states z that are not terminal, [S].

    A reading that has no probability leaves what the action alone predicts; if all of that is terminal, `belief`.

    Args:
        observation: [S, S]; belief: [S], before the action.
        action, reading: [] integers (vmap for batches).
    """
    mass = belief[:, None] * jax.nn.one_hot(action, mdp.num_actions, dtype=belief.dtype)[None, :]
    predicted = jnp.where(mdp.terminal, 0.0, push_forward(mdp.transition, mass))
    predicted = _normalized(predicted, belief)
    return _normalized(predicted * observation[:, reading], predicted)


def qmdp_action(q: Array, belief: Array) -> Array:
    """argmax_a sum_s belief[s] q[s, a], [] int32: best if the state became known after this step.

    q: [S, A], the optimal values of the MDP with the state seen; belief: [..., S] gives [...].
    Littman, Cassandra & Kaelbling (1995), "Learning policies for partially observable environments". It never acts to
    learn the state.
    """
    return jnp.argmax(belief @ q, axis=-1).astype(jnp.int32)


def qmdp_returns(
    key: Key, mdp: TabularMDP, reward: ArrayLike, observation: Array, q: Array, *, num: int, length: int
) -> Array:
    """Discounted returns [num] of episodes in which QMDP acts on the belief filtered from faulty readings.

    Each episode starts from `initial`, its first reading included, and lasts `length` steps or to a terminal state.
    reward: [S], [S, A] or [S, A, S] (its mean over successors is paid); observation: [S, S]; q: [S, A].
    """
    reward = action_reward(mdp, reward)

    def episode(key: Key) -> Array:
        start_key, read_key, steps_key = jax.random.split(key, 3)
        state = jax.random.categorical(start_key, jnp.log(mdp.initial))
        reading = jax.random.categorical(read_key, jnp.log(observation[state]))
        belief = _normalized(mdp.initial * observation[:, reading], mdp.initial)

        def step(carry: tuple[Array, Array, Array], key: Key) -> tuple[tuple[Array, Array, Array], Array]:
            state, belief, weight = carry
            move_key, read_key = jax.random.split(key)
            action = qmdp_action(q, belief)
            earned = weight * reward[state, action]
            after = sample_next(move_key, mdp.transition, state, action).astype(state.dtype)
            after = jnp.where(mdp.terminal[state], state, after)
            reading = jax.random.categorical(read_key, jnp.log(observation[after]))
            return (after, belief_update(mdp, observation, belief, action, reading), weight * mdp.discount), earned

        carry = (state, belief, jnp.ones((), reward.dtype))
        _, earned = jax.lax.scan(step, carry, jax.random.split(steps_key, length))
        return jnp.sum(earned)

    return jax.vmap(episode)(jax.random.split(key, num))


def _normalized(mass: Array, otherwise: Array) -> Array:
    """mass [S] over its sum, or `otherwise` [S] where it is all 0."""
    total = jnp.sum(mass)
    return jnp.where(total > 0.0, mass / jnp.where(total > 0.0, total, 1.0), otherwise)
