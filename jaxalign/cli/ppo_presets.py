"""The environments that `jaxalign ppo` knows by name, each with the settings that work for it."""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

from jaxalign import environments
from jaxalign.cli.ppo import Ppo
from jaxalign.environments import Environment
from jaxalign.interop import from_gymnasium
from jaxalign.mdp import side_effects
from jaxalign.mdp.safety_gridworlds import EPISODE

GYMNAX, GYMNASIUM = "gymnax:", "gymnasium:"


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
    """The box world of the safety gridworlds, paid by its reward alone; info has the hidden performance."""
    world = side_effects()
    return environments.tabular_environment(
        world.mdp, world.reward, measures={"performance": world.performance}, max_steps=EPISODE, name="side-effects"
    )


KNOWN: dict[str, Known] = {
    "cartpole": Known(
        environments.cartpole,
        Settings(
            steps=150_000, num_steps=32, epochs=20, minibatches=1, discount=0.98, gae_lambda=0.8, max_steps=500
        ),
    ),
    "acrobot": Known(
        environments.acrobot, Settings(num_envs=16, num_steps=64, gae_lambda=0.94, normalize=True, max_steps=500)
    ),
    "pendulum": Known(
        environments.pendulum,
        Settings(steps=300_000, num_envs=16, num_steps=128, epochs=10, minibatches=8, discount=0.9, max_steps=200),
    ),
    "bandit": Known(
        lambda: environments.bernoulli_bandit(np.array([[0.2, 0.8, 0.4], [0.7, 0.1, 0.3]])),
        Settings(steps=20_000, num_envs=16, num_steps=16, learning_rate=(1e-2,), max_steps=1),
    ),
    "deep-sea": Known(
        lambda: environments.deep_sea(10),
        Settings(steps=200_000, num_envs=8, num_steps=40, entropy=(0.01,), max_steps=10),
    ),
    "key-door": Known(
        lambda: environments.key_door(10),
        Settings(steps=200_000, num_envs=8, num_steps=64, entropy=(0.01,), max_steps=30),
    ),
    "side-effects": Known(side_effects_world, Settings(steps=100_000, num_steps=64, max_steps=EPISODE)),
}


def known(name: str) -> Known:
    """The environment of that name. Raises ValueError listing the names there are."""
    if name.startswith(GYMNAX):
        return Known(lambda: environments.from_gymnax(name.removeprefix(GYMNAX)), Settings(normalize=True))
    if name.startswith(GYMNASIUM):
        return Known(lambda: from_gymnasium(name.removeprefix(GYMNASIUM)), Settings(normalize=True))
    if name not in KNOWN:
        raise ValueError(f"--env {name}: there are {', '.join(KNOWN)}, {GYMNAX}NAME and {GYMNASIUM}NAME")
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
            f"--steps {settings.steps} are fewer than {options.evaluations} evaluations x {settings.rollout} steps of "
            "a rollout: ask for more steps or fewer --evaluations"
        )
    return settings
