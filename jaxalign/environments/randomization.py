"""Domain randomisation: a family of environments, of which each episode draws its member."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from jaxalign.environments.protocol import Environment, TimeStep
from jaxalign.types import Key


class Randomized(NamedTuple):
    """The state of `randomized`. parameters: what the episode's environment was built from."""

    inner: Any
    parameters: Any


def randomized(build: Callable[[Any], Environment], draw: Callable[[Key], Any]) -> Environment:
    """An environment whose numbers are drawn anew at each reset and kept for the episode.

    Args:
        build: parameters -> Environment; under jit they are traced: `lambda p: cartpole(gravity=p)`.
        draw: key -> parameters, a pytree of arrays [...].

    The spaces shown are those of `build(draw(jax.random.key(0)))`; where limits depend on the parameters, each episode
    still checks actions by its own. Truncation and the like may be inside `build` or around the result.
    Tobin et al., arXiv:1703.06907.
    """
    example = build(draw(jax.random.key(0)))

    def reset(key: Key) -> tuple[Any, Randomized]:
        draw_key, reset_key = jax.random.split(key)
        parameters = draw(draw_key)
        observation, inner = build(parameters).reset(reset_key)
        return observation, Randomized(inner, parameters)

    def step(key: Key, state: Randomized, action: Any) -> TimeStep:
        new = build(state.parameters).step(key, state.inner, action)
        return new._replace(state=Randomized(new.state, state.parameters))

    return example.replace(reset=reset, step=step, name=f"randomized {example.name}")
