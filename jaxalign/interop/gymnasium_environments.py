"""Gymnasium environments, which live and change on the host, behind the protocol of pure functions.

A state holds no world, only the number of one: a handle, and how many steps were taken in it. Each step needs the state
that the one before returned, so calls come in order by their data alone, under jit, scan and vmap, without the ordered
callbacks that vmap refuses. What a host cannot do is go back: a state that was stepped already, or whose world was
given to another episode, is refused with an error that says so.
"""

import collections
import threading
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import io_callback

from jaxalign.environments.protocol import Box, Discrete, Environment, Space, TimeStep, valid_action
from jaxalign.types import Array, Key


class HostState(NamedTuple):
    """handle: [] int32, which episode on the host; steps: [] int32, taken in it."""

    handle: Array
    steps: Array


def from_gymnasium(make: str | Callable[[], Any], *, pool: int = 64) -> Environment:
    """Host environments as an Environment: they can be jitted, scanned, vmapped, `batched`, but not rewound.

    Args:
        make: an id for `gymnasium.make`, or a function that makes an environment with Discrete or Box spaces.
        pool: how many worlds may be alive at once, made as they are needed. A reset takes the one that has waited
            longest for a step, so a batch of N needs 2 N: all N reset together where one episode ends.

    Time limits are the host's wrappers'. A reset's key seeds the host environment, which draws the rest itself: the
    same key and actions give the same episode. An action outside its space is not passed on: it pays NaN and leaves the
    world as it is. A step of a whole batch is one call to the host, where its members step one by one. JAX cannot vmap
    a `cond` that calls the host: use `batched` in place of a vmapped `auto_reset`, and lax.map (`sweep(mode="map")`)
    over seeds.

    Raises ImportError for an id without gymnasium, and ValueError naming a space that is neither Discrete nor a Box
    [...]. While running (as JAX's runtime error, with the message): an observation that is not of the space's shape,
    a step from a state whose world was given away, or from one that was stepped already.
    """
    worlds = _Worlds(_maker(make), pool)
    name, seen, actions = worlds.name, worlds.observations.space, worlds.actions.space
    observation = jax.ShapeDtypeStruct(seen.shape, seen.dtype)
    number, flag = jax.ShapeDtypeStruct((), np.int32), jax.ShapeDtypeStruct((), np.bool_)

    def reset(key: Key) -> tuple[Array, HostState]:
        seed = jax.random.randint(key, (), 0, np.iinfo(np.int32).max)
        first, handle = _host_call(worlds.reset, (observation, number), seed)
        return first, HostState(handle, jnp.zeros((), jnp.int32))

    def step(key: Key, state: HostState, action: Any) -> TimeStep:
        valid = valid_action(name, actions, action)
        given = (observation, jax.ShapeDtypeStruct((), jnp.zeros(()).dtype), flag, flag, number)
        new = _host_call(worlds.step, given, state.handle, state.steps, jnp.asarray(action), valid)
        after, reward, terminated, truncated, steps = new
        return TimeStep(after, HostState(state.handle, steps), reward, terminated, truncated, {})

    return Environment(reset, step, seen, actions, name)


def _host_call(host: Callable[..., tuple[Any, ...]], result: tuple[Any, ...], *args: Array) -> tuple[Any, ...]:
    """host(*args) for one environment, as a callback that, vmapped, is one call for the whole batch.

    JAX's own rule would call back for each member. result: shapes and types of what `host` returns; args[0] is [].
    """

    def each(*args: Any) -> tuple[np.ndarray, ...]:
        members = [np.asarray(x) for x in args]
        places = list(np.ndindex(members[0].shape))
        given = [host(*(x[place] for x in members)) for place in places]
        columns = zip(result, zip(*given, strict=True), strict=True)
        return tuple(np.stack(xs).astype(r.dtype).reshape((*members[0].shape, *r.shape)) for r, xs in columns)

    @jax.custom_batching.custom_vmap
    def call(*args: Array) -> tuple[Any, ...]:
        several = [jax.ShapeDtypeStruct((*args[0].shape, *r.shape), r.dtype) for r in result]
        return io_callback(each, tuple(several), *args)

    @call.def_vmap
    def _(size: int, batched: Any, *args: Array) -> tuple[Any, Any]:
        wide = [x if has else jnp.broadcast_to(x, (size, *x.shape)) for x, has in zip(args, batched, strict=True)]
        out = call(*wide)
        return out, jax.tree.map(lambda _: True, out)

    return call(*args)


class _Converted(NamedTuple):
    """A host's space [...] in the protocol's terms, and the number that its integers start with."""

    space: Space
    start: int


class _World(NamedTuple):
    """A host environment, the steps taken since its reset, and what was last seen of it."""

    environment: Any
    steps: int
    observation: np.ndarray


class _Worlds:
    """The host's side: worlds by handle, the one that waited longest first."""

    def __init__(self, make: Callable[[], Any], pool: int) -> None:
        if pool < 1:
            raise ValueError(f"from_gymnasium: pool must be at least 1, got {pool}")
        first = make()
        spec = getattr(first, "spec", None)
        self.name = spec.id if spec is not None else type(first).__name__
        self.observations = _converted(self.name, "observes", first.observation_space)
        self.actions = _converted(self.name, "takes", first.action_space)
        self._make, self._pool, self._spare = make, pool, [first]
        self._alive: collections.OrderedDict[int, _World] = collections.OrderedDict()
        self._handles = 0
        self._lock = threading.Lock()  # XLA calls back from several threads

    def reset(self, seed: np.ndarray) -> tuple[Any, ...]:
        with self._lock:
            if self._spare:
                environment = self._spare.pop()
            elif len(self._alive) >= self._pool:
                environment = self._alive.popitem(last=False)[1].environment
            else:
                environment = self._make()
            observation = self._seen(environment.reset(seed=int(seed))[0])
            handle, self._handles = self._handles, (self._handles + 1) % np.iinfo(np.int32).max
            self._alive[handle] = _World(environment, 0, observation)
            return observation, handle

    def step(self, handle: np.ndarray, steps: np.ndarray, action: np.ndarray, valid: np.ndarray) -> tuple[Any, ...]:
        with self._lock:
            episode = int(handle)
            world = self._alive.get(episode)
            if world is None:
                raise RuntimeError(
                    f"from_gymnasium: episode {episode} of {self.name} was given up for a newer one; "
                    f"raise pool={self._pool} (a batch of N needs 2 N)"
                )
            if world.steps != steps:
                raise RuntimeError(
                    f"from_gymnasium: {self.name} was asked for a step from after step {steps} of episode {episode}, "
                    f"but is after step {world.steps}, and a host environment cannot go back"
                )
            self._alive.move_to_end(episode)
            if not valid:
                self._alive[episode] = world._replace(steps=world.steps + 1)
                return world.observation, np.nan, False, False, world.steps + 1
            taken = int(action) + self.actions.start if isinstance(self.actions.space, Discrete) else action
            raw, reward, terminated, truncated, _ = world.environment.step(taken)
            observation = self._seen(raw)
            self._alive[episode] = _World(world.environment, world.steps + 1, observation)
            # A reward may come as an array [1], as the classic pendulum's does for some actions.
            return observation, np.asarray(reward).reshape(()), terminated, truncated, world.steps + 1

    def _seen(self, observation: Any) -> np.ndarray:
        space, start = self.observations
        given = np.asarray(observation)
        if given.shape != tuple(space.shape) or given.dtype == object:
            raise ValueError(
                f"from_gymnasium: {self.name} gave an observation {list(given.shape)} of {given.dtype}, "
                f"its space says {list(space.shape)} of {np.dtype(space.dtype)}"
            )
        return (given - start if start else given).astype(space.dtype)


def _maker(make: str | Callable[[], Any]) -> Callable[[], Any]:
    if callable(make):
        return make
    try:
        import gymnasium
    except ImportError as error:
        raise ImportError('from_gymnasium needs gymnasium: pip install "jaxalign[envs]"') from error
    return lambda: gymnasium.make(make)


def _converted(name: str, what: str, space: Any) -> _Converted:
    """By the class's name: an environment made by hand may use a gymnasium of its own."""
    kind = type(space).__name__
    if kind == "Discrete":
        return _Converted(Discrete(int(space.n)), int(space.start))
    if kind == "Box":
        dtype = jax.dtypes.canonicalize_dtype(space.dtype)
        return _Converted(Box(space.low.astype(dtype), space.high.astype(dtype), tuple(space.shape), dtype), 0)
    raise ValueError(f"from_gymnasium: {name} {what} a {kind} space; only Discrete and Box are supported")
