"""Many runs as one program: sweeps over hyperparameters and seeds, and one Algorithm made of several lanes."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, jaxpr_as_fun
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxalign.algorithm import Algorithm, TrainState
from jaxalign.programs import largest_value
from jaxalign.types import Array, Key, Metrics

MODES = ("vmap", "map", "auto")

# On a CPU, batching pays while it amortises per-operation overhead and stops once a lane's arrays outgrow
# the cache: see benchmarks/sweep.py.
CPU_VMAP_MAX_ELEMENTS = 1 << 14


def sweep(
    run: Callable[[Any, Key], Any],
    hypers: Any,
    keys: Array,
    *,
    mesh: Mesh | None = None,
    mode: str = "auto",
) -> Any:
    """`run(hyper, key)` for every hyperparameter setting and every seed, traced and compiled once.

    Args:
        run: pure function of one setting and one key. A lambda made anew at each call is compiled anew.
        hypers: pytree whose leaves are [H], or None (then `run(None, key)`).
        keys: typed PRNG keys [S]; all settings see the same keys, so differences between settings are paired.
        mesh: spread the H*S lanes over its `sweep` axis; lanes are padded to a multiple of it and the padding
            is dropped. Lanes never communicate.
        mode: "vmap" runs lanes side by side; "map" one after another, in the memory of one; "auto" is "vmap" on
            accelerators, and on a CPU "map" where one lane's arrays already fill the cache.

    Returns the outputs with leading axes [H, S, ...], or [S, ...] if `hypers` is None.
    Raises ValueError if the leaves of `hypers` disagree on H, the sweep is empty, `mode` is unknown, or the mesh has no
    `sweep` axis.
    """
    if mode not in MODES:
        raise ValueError(f"sweep: mode must be one of {MODES}, got {mode!r}")
    if mesh is not None and "sweep" not in mesh.axis_names:
        raise ValueError(f"sweep: the mesh needs an axis named 'sweep', it has {mesh.axis_names}")
    leaves = [(jax.tree_util.keystr(path), jnp.shape(leaf)) for path, leaf in jax.tree.leaves_with_path(hypers)]
    if any(not shape for _, shape in leaves) or len({shape[0] for _, shape in leaves}) > 1:
        raise ValueError(f"sweep: leaves of `hypers` need one leading axis [H] in common, got {dict(leaves)}")
    if jnp.shape(keys)[:1] in ((), (0,)) or any(shape[0] == 0 for _, shape in leaves):
        raise ValueError(f"sweep: needs at least one setting and one key, got {dict(leaves)}, keys {jnp.shape(keys)}")
    return _sweep(run, mesh, mode, hypers, keys)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _sweep(run: Callable[[Any, Key], Any], mesh: Mesh | None, mode: str, hypers: Any, keys: Array) -> Any:
    seeds = keys.shape[0]
    leaves = jax.tree.leaves(hypers)
    shape = (leaves[0].shape[0], seeds) if leaves else (seeds,)
    lanes = math.prod(shape)
    devices = 1 if mesh is None else mesh.shape["sweep"]
    lane = jnp.arange(-(-lanes // devices) * devices) % lanes
    inputs = (jax.tree.map(lambda x: jnp.asarray(x)[lane // seeds], hypers), keys[lane % seeds])

    jaxpr, out_shape = jax.make_jaxpr(run, return_shape=True)(*jax.tree.map(lambda x: x[0], inputs))
    mode = _choose(jaxpr) if mode == "auto" else mode

    def one(lane_inputs: Any) -> list[Array]:
        return jaxpr_as_fun(jaxpr)(*jax.tree.leaves(lane_inputs))

    def all_lanes(lane_inputs: Any) -> list[Array]:
        return jax.vmap(one)(lane_inputs) if mode == "vmap" else jax.lax.map(one, lane_inputs)

    if mesh is not None:
        spec = PartitionSpec("sweep")
        all_lanes = jax.shard_map(all_lanes, mesh=mesh, in_specs=(spec,), out_specs=spec, check_vma=False)
    out = [x[:lanes].reshape(*shape, *x.shape[1:]) for x in all_lanes(inputs)]
    return jax.tree.structure(out_shape).unflatten(out)


def _choose(jaxpr: ClosedJaxpr) -> str:
    if jax.default_backend() != "cpu":
        return "vmap"
    return "vmap" if largest_value(jaxpr) <= CPU_VMAP_MAX_ELEMENTS else "map"


def replicate(algorithm: Algorithm, count: int, *, mode: str = "vmap", mesh: Mesh | None = None) -> Algorithm:
    """`count` independent copies of an Algorithm as one: states, batches and metrics gain a leading lane axis [count].

    Copies differ in their key, and so in what `init` draws; a batch of leaves [count, ...] gives each its own data.
    A TrainState's `frozen` leaves stay single and shared. `mode` is "vmap" or "map", as in `sweep`; `mesh` spreads the
    copies over its `sweep` axis, and `count` must be a multiple of that.
    Raises ValueError for another mode, or a count that does not divide.
    """
    if mode not in ("vmap", "map"):
        raise ValueError(f"replicate: mode must be 'vmap' or 'map', got {mode!r}")
    if mesh is not None and count % mesh.shape["sweep"]:
        raise ValueError(f"replicate: {count} copies do not divide over {mesh.shape['sweep']} devices")

    def init(key: Key) -> Any:
        keys = jax.random.split(key, count)
        shape = jax.eval_shape(algorithm.init, key)
        shared = isinstance(shape, TrainState) and shape.frozen is not None
        axes: Any = 0
        if shared:  # a TrainState or a subclass, whose own fields have a lane axis too
            axes = shape.replace(**{field.name: 0 for field in dataclasses.fields(shape)} | {"frozen": None})
        state = jax.vmap(algorithm.init, out_axes=axes)(keys)
        if mesh is None:
            return state
        # Where they will stay, so that the first step is compiled for the same placement as the others.
        spread = NamedSharding(mesh, PartitionSpec("sweep"))
        if not shared:
            return jax.lax.with_sharding_constraint(state, spread)
        lanes = jax.lax.with_sharding_constraint(state.replace(frozen=None), spread)
        return lanes.replace(frozen=state.frozen)

    def step(state: Any, batch: Any) -> tuple[Any, Metrics]:
        frozen = state.frozen if isinstance(state, TrainState) else None

        def all_lanes(lanes: Any, frozen: Any) -> tuple[Any, Metrics]:
            def one(lane: Any) -> tuple[Any, Metrics]:
                lane_state, lane_batch = lane
                if frozen is None:
                    return algorithm.step(lane_state, lane_batch)
                new, metrics = algorithm.step(lane_state.replace(frozen=frozen), lane_batch)
                return new.replace(frozen=None), metrics

            return jax.vmap(one)(lanes) if mode == "vmap" else jax.lax.map(one, lanes)

        lanes = (state if frozen is None else state.replace(frozen=None), batch)
        if mesh is None:
            new, metrics = all_lanes(lanes, frozen)
        else:
            spread, everywhere = PartitionSpec("sweep"), PartitionSpec()
            new, metrics = jax.shard_map(
                all_lanes, mesh=mesh, in_specs=(spread, everywhere), out_specs=spread, check_vma=False
            )(lanes, frozen)
        return (new if frozen is None else new.replace(frozen=frozen)), metrics

    return Algorithm(init, step)
