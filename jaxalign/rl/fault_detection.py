"""Finding out from what happens that something is broken, and falling back to a safe policy then.

The residual of a step is its log likelihood ratio log(P_faulty(z | s, a) / P_nominal(z | s, a)), in nats: on average
-KL(nominal || faulty) while all is well and KL(faulty || nominal) once it is not. A detector sums it up and alarms.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign.environments.protocol import Environment, TimeStep
from jaxalign.mdp.tabular import TabularMDP
from jaxalign.mdp.transitions import GridTransition, SparseTransition, Transition, sparse_transition
from jaxalign.types import Array, ArrayLike, Key

LogRatio = Callable[[Array, Array, Array], Array]  # (observation, action, next observation) -> [] nats
Policy = Callable[[Key, Array], Array]  # (key, observation) -> action


class Detector(NamedTuple):
    """A sequential test. init: () -> state; update: (state, log_ratio []) -> (state, alarm bool [])."""

    init: Callable[[], Any]
    update: Callable[[Any, Array], tuple[Any, Array]]


def cusum(*, threshold: ArrayLike) -> Detector:
    """Page's cumulative sum: score = max(0, score + log_ratio), an alarm while score >= threshold.

    The state is score, []. For independent residuals the mean time to a false alarm is at least exp(threshold), and a
    fault is found after about threshold / KL(faulty || nominal) steps, which no test with as few false alarms betters
    as the threshold grows. Page (1954); Lorden (1971), "Procedures for reacting to a change in distribution".

    threshold: > 0, nats; may be traced.
    """

    def update(score: Array, log_ratio: Array) -> tuple[Array, Array]:
        score = jnp.maximum(score + log_ratio, 0.0)
        return score, score >= threshold

    return Detector(lambda: jnp.zeros(()), update)


class Verdict(NamedTuple):
    """The state of a ratio test. score: [] nats; decision: int32 [], 1 faulty, -1 nominal, 0 not yet known."""

    score: Array
    decision: Array


def sequential_ratio_test(*, false_alarm: ArrayLike, missed: ArrayLike) -> Detector:
    """Wald's test of "faulty from the start" against "nominal": stops once the sum of log_ratio leaves (lower, upper).

    lower = log(missed / (1 - false_alarm)), upper = log((1 - missed) / false_alarm). For independent residuals the
    test then really alarms falsely at most false_alarm / (1 - missed) of the time and misses at most
    missed / (1 - false_alarm). The decision stays; for a fault that may come later take `cusum`.
    Wald (1945), "Sequential tests of statistical hypotheses".

    false_alarm, missed: in (0, 1), together below 1; may be traced. Raises ValueError, outside jit, where they are not.
    """
    numbers = (false_alarm, missed)
    if not any(isinstance(x, jax.core.Tracer) for x in numbers) and not (min(numbers) > 0.0 and sum(numbers) < 1.0):
        raise ValueError(f"sequential_ratio_test: false_alarm and missed must be positive, together < 1, got {numbers}")
    lower = jnp.log(missed / (1.0 - jnp.asarray(false_alarm, float)))
    upper = jnp.log((1.0 - jnp.asarray(missed, float)) / false_alarm)

    def update(state: Verdict, log_ratio: Array) -> tuple[Verdict, Array]:
        score = jnp.where(state.decision == 0, state.score + log_ratio, state.score)
        decision = (score >= upper).astype(jnp.int32) - (score <= lower).astype(jnp.int32)
        return Verdict(score, decision), decision == 1

    return Detector(lambda: Verdict(jnp.zeros(()), jnp.zeros((), jnp.int32)), update)


def transition_log_ratio(nominal: TabularMDP, faulty: TabularMDP) -> LogRatio:
    """(state, action, next_state) -> log P_faulty(next_state | state, action) - log P_nominal(...), [] nats.

    A probability below the smallest normal number counts as that, so the residual is finite, and 0 for a step that
    neither of the two can make. Raises ValueError if the two have other states or actions.
    """
    sizes = [(mdp.num_states, mdp.num_actions) for mdp in (nominal, faulty)]
    if sizes[0] != sizes[1]:
        raise ValueError(f"transition_log_ratio: nominal has (S, A) = {sizes[0]}, faulty {sizes[1]}")
    transitions = [
        sparse_transition(mdp.transition) if isinstance(mdp.transition, GridTransition) else mdp.transition
        for mdp in (nominal, faulty)
    ]

    def log_ratio(state: Array, action: Array, next_state: Array) -> Array:
        right, wrong = (_log_probability(transition, state, action, next_state) for transition in transitions)
        return wrong - right

    return log_ratio


class StatefulPolicy(NamedTuple):
    """A policy with memory. init: first observation -> memory; act: (memory, key, observation) -> (memory, action)."""

    init: Callable[[Array], Any]
    act: Callable[[Any, Key, Array], tuple[Any, Array]]


class Watch(NamedTuple):
    """The memory of `with_fallback`: the detector's state, whether it ever alarmed, and the step before, if any."""

    detector: Any
    alarmed: Array
    acted: Array
    observation: Array
    action: Array


def with_fallback(policy: Policy, safe_policy: Policy, detector: Detector, log_ratio: LogRatio) -> StatefulPolicy:
    """`policy` until the detector alarms, `safe_policy` from then on (the Simplex architecture).

    Before each action the detector is updated with log_ratio(observation before, action then, observation now). The
    safe policy may be a checkpoint of the same one: a function over older parameters.
    Sha (2001), "Using simplicity to control complexity", IEEE Software.

    policy, safe_policy: (key, observation [...]) -> action [...], of one shape and dtype.
    """

    def init(observation: Array) -> Watch:
        action = jax.eval_shape(policy, jax.random.key(0), observation)
        no = jnp.zeros((), bool)
        return Watch(detector.init(), no, no, jnp.asarray(observation), jnp.zeros(action.shape, action.dtype))

    def act(memory: Watch, key: Key, observation: Array) -> tuple[Watch, Array]:
        state, alarm = detector.update(memory.detector, log_ratio(memory.observation, memory.action, observation))
        state = jax.tree.map(lambda new, old: jnp.where(memory.acted, new, old), state, memory.detector)
        alarmed = memory.alarmed | (memory.acted & alarm)
        action = jnp.where(alarmed, safe_policy(key, observation), policy(key, observation))
        return Watch(state, alarmed, jnp.ones((), bool), jnp.asarray(observation), action), action

    return StatefulPolicy(init, act)


class Guarded(NamedTuple):
    """The state of `guarded`. inner: of the environment inside; observation: the last; detector: its state."""

    inner: Any
    observation: Array
    detector: Any
    alarmed: Array


def guarded(environment: Environment, safe_policy: Policy, detector: Detector, log_ratio: LogRatio) -> Environment:
    """The environment behind a guard: after an alarm `safe_policy` acts, whatever action is asked for.

    `with_fallback` seen from the other side, so that any policy can be trained or evaluated with it. info["fallback"],
    bool [], says that the safe policy acted in this step. Put it outside wrappers that inject faults, since it should
    see what the agent sees, and inside `auto_reset`: a new episode begins without an alarm.
    """

    def reset(key: Key) -> tuple[Any, Guarded]:
        observation, inner = environment.reset(key)
        return observation, Guarded(inner, observation, detector.init(), jnp.zeros((), bool))

    def step(key: Key, state: Guarded, action: Any) -> TimeStep:
        step_key, safe_key = jax.random.split(key)
        action = jnp.where(state.alarmed, safe_policy(safe_key, state.observation), action)
        new = environment.step(step_key, state.inner, action)
        watched, alarm = detector.update(state.detector, log_ratio(state.observation, action, new.observation))
        after = Guarded(new.state, new.observation, watched, state.alarmed | alarm)
        return new._replace(state=after, info=new.info | {"fallback": state.alarmed})

    return environment.replace(reset=reset, step=step)


def _log_probability(transition: Transition, state: Array, action: Array, next_state: Array) -> Array:
    if isinstance(transition, SparseTransition):
        places, probability = transition.next_state[state, action], transition.probability[state, action]
        chance = jnp.sum(jnp.where(places == next_state, probability, 0.0))
    else:
        chance = transition[state, action, next_state]
    return jnp.log(jnp.maximum(chance, float(np.finfo(chance.dtype).tiny)))
