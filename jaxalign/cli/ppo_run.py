"""What `jaxalign ppo` does: train every seed of every setting under `fit`, evaluate, report, keep the policies."""

import contextlib
import dataclasses
import itertools
import math
import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType
from rich.console import Console

from jaxalign import Algorithm, replicate
from jaxalign.cli.ppo import Ppo
from jaxalign.cli.ppo_presets import Settings, known, settings_of
from jaxalign.cli.ppo_report import write_report
from jaxalign.environments import Discrete, Environment
from jaxalign.rl import (
    ActorCritic,
    Episodes,
    PPOState,
    act_with,
    actor_critic,
    evaluate,
    intrinsic_curiosity,
    observed,
    ppo,
    ppo_optimizer,
    random_network_distillation,
    simhash,
    visit_counts,
    with_evaluation,
)
from jaxalign.runtime import fit
from jaxalign.runtime.chunks import named_leaves

LAST_EVALUATION = 8  # times the episodes of one on the way
HASH_BITS, BONUS_RATE = 16, 1e-3


def run(options: Ppo, console: Console) -> dict[str, Any]:
    """The whole job; returns what was measured."""
    if not options.resume and (options.out / "checkpoints").exists():
        raise FileExistsError(f"{options.out} holds a run: add --resume to go on with it, or choose another --out")
    settings = settings_of(options)
    use_all_cores()
    environment = known(options.env).make()
    model = actor_critic(environment, hidden=options.hidden)
    lanes = [*itertools.product(settings.learning_rate, settings.entropy, range(options.seeds))]
    rollouts = settings.steps // settings.rollout // options.evaluations * options.evaluations
    console.print(
        f"{options.env}: {len(lanes)} lanes ({options.seeds} seeds), {rollouts * settings.rollout:,} steps each"
    )
    state, metrics = fit(
        _lanes(options, settings, environment, model, lanes, rollouts),
        jax.random.key(options.seed),
        None,
        steps=options.evaluations,
        chunk=1,
        directory=options.out,
        resume=options.resume,
        checkpoint_every=1,
        fingerprint=_fingerprint(options, settings),
        progress=console,
    )
    policies: dict[str, Any] = {name: np.asarray(x) for name, x in named_leaves(state.params).items()}
    np.savez_compressed(options.out / "policy.npz", **policies)
    episodes = _evaluate_all(options, settings, environment, model, state)
    metrics["step"] = (1 + np.arange(options.evaluations)) * (rollouts // options.evaluations) * settings.rollout
    report, results = write_report(options, settings, metrics, episodes)
    report.print(console)
    console.print(f"Report: {options.out / 'report.html'}")
    return results


def use_all_cores() -> None:
    """A device for each core, unless it is decided already: small arrays keep one core busy at most."""
    if "JAX_NUM_CPU_DEVICES" in os.environ or "host_platform_device_count" in os.environ.get("XLA_FLAGS", ""):
        return
    with contextlib.suppress(RuntimeError):  # JAX has begun with the devices it has
        jax.config.update("jax_num_cpu_devices", os.cpu_count() or 1)


def _lanes(
    options: Ppo,
    settings: Settings,
    environment: Environment,
    model: ActorCritic,
    lanes: list[tuple[float, float, int]],
    rollouts: int,
) -> Algorithm:
    """All lanes as one Algorithm whose step is a stretch of training and an evaluation."""
    rates, entropies = (jnp.array([lane[i] for lane in lanes], jnp.float32) for i in (0, 1))

    def algorithm(rate: Any, entropy: Any) -> Algorithm:
        updates = rollouts * settings.epochs * settings.minibatches
        return ppo(
            environment, model, ppo_optimizer(rate, anneal_over=updates),
            incentive=_incentive(options, settings, environment),
            num_envs=settings.num_envs, num_steps=settings.num_steps, num_epochs=settings.epochs,
            num_minibatches=settings.minibatches, discount=settings.discount, gae_lambda=settings.gae_lambda,
            clip_epsilon=settings.clip, entropy_coefficient=entropy, target_kl=settings.target_kl,
            normalize_observations=settings.normalize, normalize_rewards=settings.normalize,
        )  # fmt: skip

    def evaluation(state: PPOState, key: Any) -> dict[str, Any]:
        episodes = _episodes(key, settings, environment, model, state, options.episodes)
        return {
            "evaluation/return": jnp.mean(episodes.returns),
            "evaluation/length": jnp.mean(episodes.lengths.astype(jnp.float32)),
        }

    def step(state: PPOState, hyper: tuple[Any, Any]) -> tuple[PPOState, dict[str, Any]]:
        evaluated = with_evaluation(algorithm(*hyper), evaluation, every=rollouts // options.evaluations)
        return evaluated.step(state, None)

    # One lane after another on each core of a CPU: side by side the small matrices gain nothing and compile longer.
    mode = "map" if jax.default_backend() == "cpu" else "vmap"
    devices = math.gcd(jax.device_count(), len(lanes))
    mesh = jax.make_mesh((devices,), ("sweep",), axis_types=(AxisType.Auto,), devices=jax.devices()[:devices])
    copies = replicate(Algorithm(algorithm(1e-3, 0.0).init, step), len(lanes), mode=mode, mesh=mesh)
    return Algorithm(jax.jit(copies.init), lambda state, _: copies.step(state, (rates, entropies)))


def _episodes(
    key: Any, settings: Settings, environment: Environment, model: ActorCritic, state: PPOState, count: int
) -> Episodes:
    act = act_with(observed(model, state), state.params)
    return evaluate(key, environment, act, episodes=count, max_steps=settings.max_steps)


def _evaluate_all(
    options: Ppo, settings: Settings, environment: Environment, model: ActorCritic, state: PPOState
) -> Episodes:
    """The last policies' Episodes [lanes, E], with starts that no lane has met."""

    def one(lane: tuple[PPOState, Any]) -> Episodes:
        return _episodes(lane[1], settings, environment, model, lane[0], LAST_EVALUATION * options.episodes)

    count = state.step.shape[0]
    keys = jax.random.split(jax.random.fold_in(jax.random.key(options.seed), 1), count)
    return jax.jit(lambda lanes: jax.lax.map(one, lanes))((state, keys))


def _incentive(options: Ppo, settings: Settings, environment: Environment) -> Any:
    """The bonus asked for; the seed's own key decides what a random network or hash looks like."""
    seen, done = environment.observation_space, environment.action_space
    coefficient = options.intrinsic_coefficient
    match options.intrinsic:
        case "rnd":
            return random_network_distillation(
                seen, optax.adam(BONUS_RATE), num_envs=settings.num_envs, coefficient=coefficient,
                discount=settings.discount,
            )  # fmt: skip
        case "icm":
            return intrinsic_curiosity(seen, done, optax.adam(BONUS_RATE), coefficient=coefficient)
        case "counts" if isinstance(seen, Discrete):
            return visit_counts(lambda steps: steps.next_observations, num_keys=seen.size, coefficient=coefficient)
        case "counts":
            code = simhash(jax.random.key(options.seed), tuple(seen.shape), bits=HASH_BITS)
            return visit_counts(
                lambda steps: code(steps.next_observations), num_keys=2**HASH_BITS, coefficient=coefficient
            )
    return None


def _fingerprint(options: Ppo, settings: Settings) -> dict[str, Any]:
    """What must be the same when a run is resumed."""
    free = {"out", "resume", *dataclasses.asdict(settings)}
    asked = {name: value for name, value in dataclasses.asdict(options).items() if name not in free}
    return asked | dataclasses.asdict(settings)
