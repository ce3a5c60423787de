"""(I - M)^-1 b by doubling: by hand, against LAPACK in float64, its derivatives, its limits, on several devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

import jaxalign
from jaxalign.mdp import discounted_sum


@pytest.fixture(scope="module")
def system():
    matrix = jax.nn.softmax(2.0 * jax.random.normal(jax.random.key(0), (6, 6)), axis=-1)
    return matrix, jax.random.normal(jax.random.key(1), (6,))


def test_by_hand():
    np.testing.assert_allclose(discounted_sum(jnp.array([[0.9]]), jnp.array([1.0])), [10.0], rtol=1e-6)
    chain = jnp.array([[0.0, 0.5], [0.0, 0.0]])
    np.testing.assert_allclose(discounted_sum(chain, jnp.array([1.0, 4.0])), [3.0, 4.0])
    np.testing.assert_array_equal(discounted_sum(jnp.zeros((2, 2)), jnp.array([1.0, -2.0])), [1.0, -2.0])


@pytest.mark.parametrize("discount", [0.0, 0.5, 0.99, 0.9999])
def test_against_lapack(system, discount):
    matrix, right = (np.asarray(x, np.float64) for x in system)
    exact = np.linalg.solve(np.eye(6) - discount * matrix, right)
    tolerance = 2e-6 / (1.0 - discount)  # how much a rounded matrix alone can move the sum
    np.testing.assert_allclose(discounted_sum(discount * system[0], system[1]), exact, rtol=tolerance)
    with jax.enable_x64(True):
        ours = discounted_sum(jnp.asarray(discount * matrix), jnp.asarray(right))
        np.testing.assert_allclose(ours, exact, rtol=1e-10)


def test_a_sum_without_end_is_infinite_where_it_has_none():
    loops = jnp.array([[1.0, 0.0, 0.0], [0.0, 0.0, 0.0], [0.0, 0.0, 1.0]])
    np.testing.assert_array_equal(discounted_sum(loops, jnp.array([-1.0, 2.0, 0.0])), [-np.inf, 2.0, 0.0])


def test_derivatives_are_those_of_the_solve(system):
    with jax.enable_x64(True):
        matrix, right = (0.8 * jnp.asarray(system[0], float), jnp.asarray(system[1], float))
        direct = lambda m, b: jnp.linalg.solve(jnp.eye(6) - m, b)  # noqa: E731
        for mode in (jax.jacrev, jax.jacfwd):
            ours, theirs = (mode(f, argnums=(0, 1))(matrix, right) for f in (discounted_sum, direct))
            for x, y in zip(ours, theirs, strict=True):
                np.testing.assert_allclose(x, y, rtol=1e-8, atol=1e-9)
        ours, theirs = (jax.hessian(lambda m, f=f: f(m, right).sum())(matrix) for f in (discounted_sum, direct))
        np.testing.assert_allclose(ours, theirs, rtol=1e-8, atol=1e-8)


def test_many_at_once_on_several_devices(system):
    """LAPACK's solve waits for ever here: batches of it on devices that share their threads."""
    matrix, right = system
    mesh = Mesh(np.array(jax.devices()), ("sweep",))
    assert len(mesh.devices) > 1

    def run(discount, key):
        noise = 0.1 * jax.random.normal(key, (16, 6))
        return jax.vmap(lambda b: discounted_sum(discount * matrix, b))(right[None] + noise)

    discounts, keys = jnp.array([0.5, 0.9]), jax.random.split(jax.random.key(2), 4)
    together = jaxalign.sweep(run, discounts, keys, mesh=mesh)
    np.testing.assert_allclose(together, jaxalign.sweep(run, discounts, keys), rtol=1e-5)
