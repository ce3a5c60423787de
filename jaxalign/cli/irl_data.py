"""What `jaxalign irl` learns from: a world, each seed's demonstrations as visit counts, and those held out."""

import hashlib
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign.cli.irl import Irl
from jaxalign.interop import World, load_world, read_demonstrations
from jaxalign.irl import Trajectories, sample_trajectories, visit_counts
from jaxalign.mdp import TabularMDP, objectworld, soft_value_iteration, value_iteration
from jaxalign.types import Array


class Prepared(NamedTuple):
    """world: World; counts [seeds, S, A] and held_out [S, A]: visits summed over demonstrations; notes: a line about
    each; digest: of all that was read."""

    world: World
    counts: np.ndarray
    held_out: np.ndarray
    notes: list[str]
    digest: str


def prepare(options: Irl) -> Prepared:
    """Load or make the world and the demonstrations the options ask for."""
    world, about = _world(options)
    states, actions = world.mdp.num_states, world.mdp.num_actions
    notes = [f"World: {about}, {states} states, {actions} actions, discount {float(world.mdp.discount):g}"]
    digest = hashlib.sha256()
    for path in (options.world, options.demonstrations):
        digest.update(b"-" if path is None else path.read_bytes())
    if options.demonstrations is not None:
        counts, held_out, note = _from_file(options, world)
    elif world.reward is not None:
        counts, held_out, note = _drawn(options, world)
    else:
        raise ValueError(f"{options.world} has no `reward` to draw demonstrations from: give --demonstrations")
    return Prepared(world, counts, held_out, [*notes, note], digest.hexdigest()[:16])


def policy_of(options: Irl, mdp: TabularMDP, reward: Array) -> Array:
    """log P(a | s) [S, A] of the demonstrator that the method assumes, given its reward."""
    if options.method == "maxent":
        return soft_value_iteration(mdp, reward, temperature=options.temperature).log_policy
    return jax.nn.log_softmax(value_iteration(mdp, reward).q / options.temperature, axis=-1)


def _world(options: Irl) -> tuple[World, str]:
    if options.world is not None:
        return load_world(options.world), options.world.name
    size = options.size
    build = jax.jit(lambda key: objectworld(key, size, size, num_objects=max(2, size * size // 10)))
    made = build(jax.random.key(options.seed))
    return World(made.mdp, np.asarray(made.features), np.asarray(made.reward), (size, size)), "an Objectworld"


def _drawn(options: Irl, world: World) -> tuple[np.ndarray, np.ndarray, str]:
    """Every seed its own demonstrations of the soft-optimal policy, and one held-out set."""
    num, held = options.num_demonstrations, max(1, options.num_demonstrations // 2)

    @jax.jit
    def visits(world_mdp: Any, reward: Any, keys: Any) -> tuple[Any, Any]:
        log_policy = policy_of(options, world_mdp, reward)

        def draw(key: Any, num: int) -> Any:
            drawn = sample_trajectories(key, world_mdp, log_policy, num=num, length=options.length)
            return num * visit_counts(world_mdp, drawn)

        return jax.lax.map(lambda key: draw(key, num), keys[:-1]), draw(keys[-1], held)

    keys = jax.random.split(jax.random.fold_in(jax.random.key(options.seed), 1), options.seeds + 1)
    counts, held_out = jax.device_get(visits(world.mdp, jnp.asarray(world.reward), keys))
    note = (
        f"Each of {options.seeds} seeds draws {num} demonstrations of {options.length} steps from a demonstrator of "
        f"temperature {options.temperature:g}; {held} more are held out"
    )
    return counts, held_out, note


def _from_file(options: Irl, world: World) -> tuple[np.ndarray, np.ndarray, str]:
    """The file's demonstrations, some held out; with several seeds each resamples the rest with replacement."""
    assert options.demonstrations is not None
    all_of_them = read_demonstrations(options.demonstrations, mdp=world.mdp)
    total = len(all_of_them.states)
    held = round(options.held_out * total)
    if not 1 <= held < total:
        raise ValueError(
            f"--held-out {options.held_out:g} of {total} demonstrations leaves none to learn from or none to test on"
        )
    rng = np.random.default_rng(options.seed)
    order = rng.permutation(total)

    def visits(rows: np.ndarray) -> np.ndarray:
        return len(rows) * np.asarray(visit_counts(world.mdp, Trajectories(*(x[rows] for x in all_of_them))))

    training = order[held:]
    samples = [training] if options.seeds == 1 else [rng.choice(training, training.size) for _ in range(options.seeds)]
    how = "all of them" if options.seeds == 1 else f"{options.seeds} resamples with replacement, one a seed"
    note = f"{total - held} demonstrations of {options.demonstrations.name} to learn from ({how}), {held} held out"
    return np.stack([visits(rows) for rows in samples]), visits(order[:held]), note


def step_count(options: Irl) -> int:
    """Gradient steps, or warm-up steps and samples together."""
    if options.method == "maxent":
        return 300 if options.steps is None else options.steps
    return 2 * (500 if options.steps is None else options.steps)


def check_options(options: Irl) -> None:
    """Raise ValueError for a number no run can have."""
    for name in ("size", "num_demonstrations", "length", "temperature", "prior_scale", "steps", "learning_rate",
                 "chains", "seeds", "checkpoint_every"):  # fmt: skip
        value = getattr(options, name)
        if value is not None and not (value > 0 and math.isfinite(value)):
            raise ValueError(f"--{name.replace('_', '-')} must be positive, got {value}")
    if not 0.0 < options.held_out < 1.0:
        raise ValueError(f"--held-out must be in (0, 1), got {options.held_out}")
    if options.method == "bayesian" and options.reward != "states":
        raise ValueError("--reward is for --method maxent; the posterior is over a number for each state")
