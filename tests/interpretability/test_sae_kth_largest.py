"""The k-th largest by bisection against lax.top_k and NumPy, for every k in one program."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.interpretability.kth_largest import kth_largest


def awkward(columns=70):
    """Rows with ties, negative numbers, both zeros, infinities and a NaN."""
    x = np.random.default_rng(0).standard_normal((7, columns)).astype(np.float32)
    x[0, : columns // 2] = 1.0
    x[1] = -np.abs(x[1])
    x[2] = 0.0
    x[3, ::3] = -0.0
    x[4, :2] = np.inf, -np.inf
    x[5, 4] = np.nan
    x[6] *= 1e-42  # subnormal
    return jnp.asarray(x)


def test_every_k_equals_top_k_in_one_program():
    x, traces = awkward(), []

    @jax.jit
    def counted(x, k):
        traces.append(1)
        return kth_largest(x, k)

    ordered = np.asarray(jax.lax.top_k(x, 70)[0])
    found = np.stack([counted(x, k) for k in range(1, 71)], axis=1)
    np.testing.assert_array_equal(found.view(np.uint32) << 1, ordered.view(np.uint32) << 1)  # to the bit but for -0
    assert len(traces) == 1


def test_long_rows_against_numpy_and_one_k_for_each_row():
    x = np.random.default_rng(1).standard_normal((3, 9001)).astype(np.float32)
    k = jnp.array([1, 77, 9001])
    expected = [np.sort(row)[::-1][n - 1] for row, n in zip(x, [1, 77, 9001], strict=True)]
    np.testing.assert_array_equal(jax.jit(kth_largest)(x, k), expected)
    np.testing.assert_array_equal(jax.vmap(kth_largest)(jnp.asarray(x), k), expected)


@pytest.mark.parametrize("dtype", ["bfloat16", "float64"])
def test_other_widths(dtype):
    with jax.enable_x64(True):
        x = jnp.asarray(np.random.default_rng(2).standard_normal((2, 20)), dtype)
        found = kth_largest(x, 5)
        assert found.dtype == dtype
        np.testing.assert_array_equal(found, jax.lax.top_k(x, 5)[0][:, -1])


def test_k_outside_its_range_is_drawn_in_and_there_is_no_gradient():
    x = jnp.array([3.0, 1.0, 2.0])
    assert [float(kth_largest(x, k)) for k in (0, 1, 3, 9)] == [3.0, 3.0, 1.0, 1.0]
    assert not jax.grad(lambda x: kth_largest(x, 2))(x).any()


@pytest.mark.parametrize(("x", "message"), [(jnp.zeros((2, 0)), r"\(2, 0\)"), (jnp.arange(3), "int32")])
def test_bad_input_is_named(x, message):
    with pytest.raises(ValueError, match=message):
        kth_largest(x, 1)
