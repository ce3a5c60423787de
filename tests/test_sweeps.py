"""sweep: one trace, the same numbers in every mode and on every mesh, lanes in the right places."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType

from jaxalign import Network, gradient_algorithm, replicate, sweep


def describe(hyper, key):
    """A run whose output tells which lane it was."""
    noise = jax.random.uniform(key)
    return {"sum": hyper["a"] + 10 * hyper["b"] + noise, "pair": jnp.stack([hyper["a"], noise])}


HYPERS = {"a": jnp.array([1.0, 2.0, 3.0]), "b": jnp.array([0.0, 1.0, 2.0])}


@pytest.mark.parametrize("mode", ["vmap", "map", "auto"])
def test_every_setting_meets_every_seed(mode):
    keys = jax.random.split(jax.random.key(0), 4)
    out = sweep(describe, HYPERS, keys, mode=mode)
    noise = jax.vmap(jax.random.uniform)(keys)
    expected = (HYPERS["a"] + 10 * HYPERS["b"])[:, None] + noise[None, :]
    np.testing.assert_allclose(out["sum"], expected, rtol=1e-6)
    assert out["pair"].shape == (3, 4, 2)


def test_without_hypers_there_is_no_hyper_axis():
    keys = jax.random.split(jax.random.key(0), 4)
    out = sweep(lambda hyper, key: jax.random.normal(key, (2,)), None, keys)
    assert out.shape == (4, 2)


@pytest.mark.parametrize("mode", ["vmap", "map", "auto"])
@pytest.mark.parametrize("mesh_size", [None, 1, 4])
def test_one_trace_whatever_the_sizes(mode, mesh_size):
    traces = []

    def run(hyper, key):
        traces.append(1)
        return hyper * jax.random.uniform(key)

    mesh = None
    if mesh_size:
        mesh = jax.make_mesh((mesh_size,), ("sweep",), axis_types=(AxisType.Auto,), devices=jax.devices()[:mesh_size])
    sweep(run, jnp.arange(5.0), jax.random.split(jax.random.key(0), 3), mode=mode, mesh=mesh)
    assert len(traces) == 1
    sweep(run, jnp.arange(5.0) + 1, jax.random.split(jax.random.key(1), 3), mode=mode, mesh=mesh)
    assert len(traces) == 1


@pytest.mark.parametrize("mode", ["vmap", "map"])
def test_uneven_lanes_over_a_mesh_equal_one_device_without_collectives(mode):
    if jax.device_count() < 4:
        pytest.skip("needs 4 devices: XLA_FLAGS=--xla_force_host_platform_device_count=4")
    mesh = jax.make_mesh((4,), ("sweep",), axis_types=(AxisType.Auto,))
    keys = jax.random.split(jax.random.key(0), 3)
    sharded = sweep(describe, HYPERS, keys, mesh=mesh, mode=mode)
    np.testing.assert_allclose(sharded["sum"], sweep(describe, HYPERS, keys, mode=mode)["sum"], rtol=1e-6)
    from jaxalign.sweeps import _sweep

    text = _sweep.lower(describe, mesh, mode, HYPERS, keys).compile().as_text()
    assert not any(word in text for word in ("all-reduce", "collective-permute", "all-to-all", "reduce-scatter"))


def test_auto_maps_what_fills_the_cache_on_a_cpu():
    from jaxalign.sweeps import CPU_VMAP_MAX_ELEMENTS, _choose

    def jaxpr(size):
        return jax.make_jaxpr(lambda x: jax.lax.fori_loop(0, 3, lambda i, s: s + jnp.ones(size).sum(), x))(0.0)

    assert _choose(jaxpr(8)) == "vmap"
    if jax.default_backend() == "cpu":
        assert _choose(jaxpr(CPU_VMAP_MAX_ELEMENTS + 1)) == "map"


def test_sweeps_compose_with_jit_and_grad():
    keys = jax.random.split(jax.random.key(0), 2)

    @jax.jit
    def total(scale):
        return sweep(lambda hyper, key: scale * hyper**2, jnp.array([1.0, 2.0]), keys).sum()

    assert float(jax.grad(total)(3.0)) == pytest.approx(2 * (1 + 4))


def test_errors_name_the_argument():
    keys = jax.random.split(jax.random.key(0), 2)
    with pytest.raises(ValueError, match="mode must be one of"):
        sweep(describe, HYPERS, keys, mode="pmap")
    with pytest.raises(ValueError, match=r"'b'.*\(2,\)"):
        sweep(describe, {"a": jnp.zeros(3), "b": jnp.zeros(2)}, keys)
    with pytest.raises(ValueError, match="at least one"):
        sweep(describe, HYPERS, keys[:0])
    mesh = jax.make_mesh((1,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:1])
    with pytest.raises(ValueError, match="'sweep'"):
        sweep(describe, HYPERS, keys, mesh=mesh)


def test_copies_spread_over_devices_are_the_same_copies_and_compiled_once():
    network = Network(lambda key: {"w": jax.random.normal(key, (3,))}, lambda params, x: params["w"] * x)

    def objective(params, batch, key):
        return jnp.sum((network.apply(params, batch) - 1.0) ** 2), {}

    frozen = {"trainable": lambda name: name == "w"}
    inner = gradient_algorithm(network, objective, optax.adam(0.1), **frozen)
    mesh = jax.make_mesh((2,), ("sweep",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])
    batch = jnp.arange(4.0)
    found = {}
    for name, options in (("one", {}), ("two", {"mesh": mesh})):
        copies, traces = replicate(inner, 4, mode="map", **options), []

        def counted(state, batch, copies=copies, traces=traces):
            traces.append(1)
            return copies.step(state, batch)

        step, state = jax.jit(counted), jax.jit(copies.init)(jax.random.key(0))
        for _ in range(3):
            state, metrics = step(state, batch)
        assert len(traces) == 1
        found[name] = (state.params["w"], metrics["loss"])
    jax.tree.map(np.testing.assert_array_equal, *found.values())
    assert len(found["two"][0].sharding.device_set) == 2
    with pytest.raises(ValueError, match="3 copies do not divide over 2 devices"):
        replicate(inner, 3, mesh=mesh)
