"""The environments that `jaxalign ppo` knows by name, each with the settings that work for it."""

import dataclasses
from collections.abc import Callable
from typing import Any

from jaxalign import environments
from jaxalign.cli.ppo import Ppo
from jaxalign.environments import Environment

GYMNAX = "gymnax:"


@dataclasses.dataclass(frozen=True)
class Settings:
    """Everything PPO is told, the environment's own or as asked for; see `Ppo` for what each means."""

    steps: int = 200_000
    learning_rate: tuple[float, ...] = (1e-3,)
    entropy: tuple[float, ...] = (0.0,)
    num_envs: int = 8
    num_steps: int = 128
    epochs: int = 4
    minibatches: int = 4
    discount: float = 0.99
    gae_lambda: float = 0.95
    clip: float = 0.2
    target_kl: float | None = None
    normalize: bool = False
    max_steps: int = 1000
    """An evaluation's longest episode: a property of the environment."""

    @property
    def rollout(self) -> int:
        """Environment steps of a rollout."""
        return self.num_envs * self.num_steps


@dataclasses.dataclass(frozen=True)
class Known:
    """An environment with the settings that work for it."""

    make: Callable[[], Environment]
    settings: Settings


def side_effects_world() -> Environment:
    """The box world of the safety gridworlds, paid by its reward alone."""
    from jaxalign.mdp import side_effects

    world = side_effects()
    return environments.tabular_environment(world.mdp, world.reward)


KNOWN: dict[str, Known] = {
    "cartpole": Known(
        environments.cartpole,
        Settings(
            steps=150_000, num_steps=32, epochs=20, minibatches=1, discount=0.98, gae_lambda=0.8, max_steps=500
        ),
    ),
}


def known(name: str) -> Known:
    """The environment of that name. Raises ValueError listing the names there are."""
    if name.startswith(GYMNAX):
        return Known(lambda: _gymnax(name.removeprefix(GYMNAX)), Settings(normalize=True))
    if name not in KNOWN:
        raise ValueError(f"--env {name}: there are {', '.join(KNOWN)} and {GYMNAX}NAME")
    return KNOWN[name]


def settings_of(options: Ppo) -> Settings:
    """The environment's settings with what was asked for put in their place. Raises ValueError naming a bad option."""
    asked: dict[str, Any] = {
        field.name: value
        for field in dataclasses.fields(Settings)
        if (value := getattr(options, field.name, None)) not in (None, ())
    }
    settings = dataclasses.replace(known(options.env).settings, **asked)
    counts = {"seeds": options.seeds, "evaluations": options.evaluations, "episodes": options.episodes}
    counts |= {name: getattr(settings, name) for name in ("steps", "num_envs", "num_steps", "epochs", "minibatches")}
    for name, value in counts.items():
        if value < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {value}")
    for name in ("discount", "gae_lambda"):
        if not 0.0 <= getattr(settings, name) <= 1.0:
            raise ValueError(f"--{name.replace('_', '-')} must be in [0, 1], got {getattr(settings, name)}")
    if min(settings.learning_rate) <= 0 or settings.clip <= 0:
        raise ValueError("--learning-rate and --clip must be above 0")
    if settings.steps < settings.rollout * options.evaluations:
        raise ValueError(
            f"--steps {settings.steps} are fewer than {options.evaluations} evaluations x {settings.rollout} steps of a "
            "rollout: ask for more steps or fewer --evaluations"
        )
    return settings


def _gymnax(name: str) -> Environment:
    try:
        import gymnax
    except ImportError as error:
        raise ImportError(f'{GYMNAX}{name} needs gymnax: pip install "jaxalign[envs]"') from error
    if name not in gymnax.registered_envs:
        raise ValueError(f"gymnax has no environment {name!r}; it has {', '.join(gymnax.registered_envs)}")
    return environments.from_gymnax(*gymnax.make(name))
