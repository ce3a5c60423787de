"""What `jaxalign rlhf` does: train from feedback and from the true reward, write down the answers, compare."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType
from rich.console import Console

from jaxalign import Algorithm, Network, replicate
from jaxalign.cli.ppo_run import use_all_cores as use_all_cores
from jaxalign.cli.rlhf import Rlhf, Settings, settings_of
from jaxalign.cli.rlhf_report import write_report
from jaxalign.environments import Environment, cartpole, flat_size, tabular_environment
from jaxalign.interop.feedback_log import PREFERENCE, SCORE, FeedbackLog
from jaxalign.mdp import arrival_reward, gridworld
from jaxalign.networks import MLP
from jaxalign.preferences.reward_ensemble import (
    ensemble_mean,
    ensemble_rewards,
    lower_confidence_bound,
    worst_case,
)
from jaxalign.preferences.reward_networks import trajectory_reward
from jaxalign.rl import ActorCritic, act_with, actor_critic, draw, evaluate, ppo, ppo_optimizer, with_evaluation
from jaxalign.rlhf.annotators import (
    Annotator,
    biased_annotator,
    boltzmann_annotator,
    intransitive_annotator,
    length_bias,
    myopic_annotator,
    noisy_annotator,
    return_scorer,
    segment_returns,
)
from jaxalign.rlhf.human_feedback import Scored, graded_segments, step_features
from jaxalign.rlhf.preference_rl import FeedbackState, preference_rl, score_rl
from jaxalign.runtime import fit
from jaxalign.runtime.chunks import named_leaves

MARK = 1.0  # metres
PITS = ((1, 1), (2, 3), (3, 1))


class Outcome(NamedTuple):
    """What the policies of S seeds came to, on E fresh episodes each.

    before, after: [S, E], returns of the policies as they began and at the end
    baseline: [S, E], of PPO with the true reward, or None
    true, predicted: [S, E], returns of held-out episodes from good to bad, and what the ensemble makes of them
    """

    before: np.ndarray
    after: np.ndarray
    baseline: np.ndarray | None
    true: np.ndarray
    predicted: np.ndarray


def run(options: Rlhf, console: Console) -> dict[str, Any]:
    """The whole job; returns what was measured."""
    settings = settings_of(options)
    if not options.resume and (options.out / "checkpoints").exists():
        raise FileExistsError(f"{options.out} holds a run: add --resume to go on with it, or choose another --out")
    use_all_cores()
    environment = ENVIRONMENTS[options.env]()
    model = actor_critic(environment)
    rewards = reward_network(environment, settings)
    algorithm = _copies(from_feedback(options, settings, environment, model, rewards), options.seeds)
    log = FeedbackLog(options.out / "feedback.jsonl")
    console.print(
        f"{options.env}: {options.seeds} seeds, {settings.rounds * settings.steps:,} steps and "
        f"{settings.rounds * settings.queries} answers each ({options.annotator})"
    )
    train = functools.partial(
        fit, key=jax.random.key(options.seed), batches=None, steps=settings.rounds, chunk=1, checkpoint_every=1,
        resume=options.resume, progress=console, fingerprint=_fingerprint(options, settings),
    )  # fmt: skip
    state, metrics = train(algorithm, directory=options.out, callbacks=[_Writer(log, options.annotator)])
    _keep(options, state)
    policies = {"before": algorithm.init(jax.random.key(options.seed)).params, "after": state.params}
    baseline_metrics = None
    if options.baseline:
        console.print("PPO with the true reward")
        true = _copies(from_reward(settings, environment, model), options.seeds)
        baseline, baseline_metrics = train(true, directory=options.out / "true-reward")
        policies["baseline"] = baseline.params
    outcome = _measure(options, settings, environment, model, rewards, policies, state.reward.params)
    for each in (metrics, baseline_metrics):
        if each is not None:
            each["step"] = (1 + np.arange(settings.rounds)) * settings.steps
    report, results = write_report(options, settings, metrics, baseline_metrics, outcome)
    report.print(console)
    console.print(f"Report: {options.out / 'report.html'}")
    return results


def at_the_mark() -> Environment:
    """CartPole that pays 1 - |x - 1| / 2 on arrival: balance, one metre to the right."""
    world = cartpole()

    def step(key: Any, state: Any, action: Any) -> Any:
        new = world.step(key, state, action)
        return new._replace(reward=1.0 - 0.5 * jnp.abs(new.observation[0] - MARK))

    return world.replace(step=step, name="cartpole-mark")


def around_the_pits() -> Environment:
    """A 5 x 5 grid: 1 for the goal in the corner, -1 for each step in a pit, -0.05 for any other; at most 50 steps."""
    grid = gridworld(5, 5, slip=0.1, goal=(4, 4), stay=False)
    pays = np.full((5, 5), -0.05, np.float32)
    pays[4, 4] = 1.0
    for pit in PITS:
        pays[pit] = -1.0
    return tabular_environment(
        grid, arrival_reward(grid, jnp.asarray(pays.reshape(-1))), max_steps=50, name="gridworld"
    )


ENVIRONMENTS = {"cartpole": cartpole, "cartpole-mark": at_the_mark, "gridworld": around_the_pits}


def reward_network(environment: Environment, settings: Settings) -> Network:
    """A reward for each step from observation, action and whether it ended the episode, summed over a segment."""
    width = flat_size(environment.observation_space) + flat_size(environment.action_space) + 1
    network = Network.from_linen(MLP((*settings.reward_hidden, 1), jnp.tanh), jnp.zeros((1, width)))
    return trajectory_reward(network)


def annotator_of(options: Rlhf, settings: Settings) -> Annotator:
    """The annotator that was asked for, one that compares."""
    rational, always = boltzmann_annotator(beta=settings.beta), boltzmann_annotator(beta=jnp.inf)
    return {
        "boltzmann": rational,
        "perfect": always,
        "noisy": noisy_annotator(always, flip_probability=options.flip, tie_threshold=options.tie),
        "biased": biased_annotator(rational, length_bias(options.bias)),
        "myopic": myopic_annotator(rational, discount=options.memory),
        "intransitive": intransitive_annotator(beta=settings.beta, strength=options.circle, period=options.period),
    }[options.annotator]


AGGREGATES: dict[str, Callable[[Any], Any]] = {
    "mean": ensemble_mean,
    "lcb": functools.partial(lower_confidence_bound, coefficient=1.0),
    "worst": worst_case,
}


def _ppo_options(settings: Settings) -> dict[str, Any]:
    return {
        "num_envs": settings.num_envs, "num_steps": settings.num_steps, "num_epochs": settings.epochs,
        "num_minibatches": settings.minibatches, "discount": settings.discount, "gae_lambda": settings.gae_lambda,
        "entropy_coefficient": settings.entropy,
    }  # fmt: skip


def _optimizer(settings: Settings) -> optax.GradientTransformation:
    updates = settings.rounds * settings.rollouts * settings.epochs * settings.minibatches
    return ppo_optimizer(settings.learning_rate, anneal_over=updates)


def from_feedback(
    options: Rlhf, settings: Settings, environment: Environment, model: ActorCritic, rewards: Network
) -> Algorithm:
    """One seed's learner: a step is a round of feedback."""
    common: dict[str, Any] = {
        "ensemble_size": options.ensemble, "segment_length": settings.segment, "queries_per_round": settings.queries,
        "select": options.select, "aggregate": AGGREGATES[options.aggregate], "rollouts_per_round": settings.rollouts,
        "reward_steps": settings.reward_steps, "capacity": settings.rounds * settings.queries, **_ppo_options(settings),
    }  # fmt: skip
    learners = environment, model, _optimizer(settings), rewards, optax.adam(settings.reward_rate)
    if options.annotator == "scores":
        return score_rl(*learners, scorer=return_scorer(noise=options.score_noise), **common)
    return preference_rl(*learners, annotator=annotator_of(options, settings), **common)


def from_reward(settings: Settings, environment: Environment, model: ActorCritic) -> Algorithm:
    """PPO with the true reward; a step is as many rollouts as a round has."""
    learner = ppo(environment, model, _optimizer(settings), **_ppo_options(settings))
    return with_evaluation(learner, lambda state, key: {}, every=settings.rollouts)


def _copies(algorithm: Algorithm, seeds: int) -> Algorithm:
    """All seeds as one Algorithm, spread over the devices."""
    # One seed after another on each core of a CPU: side by side the small matrices gain nothing and compile longer.
    mode = "map" if jax.default_backend() == "cpu" else "vmap"
    devices = math.gcd(jax.device_count(), seeds)
    mesh = jax.make_mesh((devices,), ("sweep",), axis_types=(AxisType.Auto,), devices=jax.devices()[:devices])
    copies = replicate(algorithm, seeds, mode=mode, mesh=mesh)
    return Algorithm(jax.jit(copies.init), copies.step)


class _Writer:
    """A callback of `fit` that writes down the answers the log does not have yet."""

    def __init__(self, log: FeedbackLog, annotator: str) -> None:
        self._log, self._annotator = log, annotator
        self._written = {row["first"] if row["kind"] == PREFERENCE else row["item"] for row in log.records()}

    def __call__(self, rounds: int, state: FeedbackState, metrics: dict[str, np.ndarray]) -> None:
        assert state.buffer is not None
        rows, count = state.buffer.rows, int(np.asarray(state.buffer.count)[0])
        answers = np.asarray(rows.scores if isinstance(rows, Scored) else rows.outcome)[:, :count]
        fresh = []
        for (seed, number), answer in np.ndenumerate(answers):
            first, second = (f"seed-{seed}/answer-{number}/{side}" for side in ("first", "second"))
            if first in self._written:
                continue
            self._written.add(first)
            about: dict[str, Any] = {"annotator": self._annotator, "round": rounds}
            if isinstance(rows, Scored):
                fresh.append({"kind": SCORE, "item": first, "score": float(answer), **about})
            else:
                fresh.append({"kind": PREFERENCE, "first": first, "second": second, "outcome": int(answer), **about})
        self._log.extend(fresh)


def _keep(options: Rlhf, state: FeedbackState) -> None:
    """Write the policies and reward networks, and the segments that the answers are about."""
    assert state.buffer is not None
    learned: dict[str, Any] = {
        name: np.asarray(x) for name, x in named_leaves({"policy": state.params, "reward": state.reward.params}).items()
    }
    np.savez_compressed(options.out / "learned.npz", **learned)
    rows: dict[str, Any] = {
        name: np.asarray(x) for name, x in state.buffer.rows._asdict().items() if x is not None and name != "index"
    }
    np.savez_compressed(options.out / "segments.npz", **rows)


def _measure(
    options: Rlhf, settings: Settings, environment: Environment, model: ActorCritic, rewards: Network,
    policies: dict[str, Any], ensembles: Any,
) -> Outcome:  # fmt: skip
    """Evaluate the policies, and the ensembles on episodes that no answer is about, with starts that nobody has met.

    policies: by name, leaves [S, ...]; a seed's all begin from the same starts, so that their differences are paired.
    """
    features = step_features(environment)

    def returns(key: Any, params: Any) -> Any:
        act = act_with(model, params)
        return evaluate(key, environment, act, episodes=options.episodes, max_steps=settings.max_steps).returns

    def held_out(key: Any, params: Any, ensemble: Any) -> tuple[Any, Any]:
        graded = graded_segments(
            key, environment, lambda key, seen: draw(key, model.policy(params, seen)), features,
            count=options.episodes, length=settings.max_steps,
        )  # fmt: skip
        each = ensemble_rewards(rewards, ensemble, graded.features, graded.mask)
        return segment_returns(graded.rewards, graded.mask), jnp.mean(each, axis=0)

    def one(lane: Any) -> tuple[Any, Any]:
        key, params, ensemble = lane
        returns_key, graded_key = jax.random.split(key)
        together = jax.tree.map(lambda *leaves: jnp.stack(leaves), *params.values())
        found = jax.lax.map(lambda x: returns(returns_key, x), together)
        # Named here: a dict comes out of a JAX function with its names in another order.
        return dict(zip(params, found, strict=True)), held_out(graded_key, params["after"], ensemble)

    keys = jax.random.split(jax.random.fold_in(jax.random.key(options.seed), 1), options.seeds)
    found, (true, predicted) = jax.device_get(jax.jit(lambda x: jax.lax.map(one, x))((keys, policies, ensembles)))
    return Outcome(found["before"], found["after"], found.get("baseline"), true, predicted)


def _fingerprint(options: Rlhf, settings: Settings) -> dict[str, Any]:
    """What must be the same when a run is resumed."""
    free = {"out", "resume", "baseline", "episodes", *dataclasses.asdict(settings)}
    asked: dict[str, Any] = {k: v for k, v in dataclasses.asdict(options).items() if k not in free}
    return asked | dataclasses.asdict(settings)
