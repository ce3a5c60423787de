"""Certified training: its loss against NumPy's intervals, its limits, what it certifies and plain training does not."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference_crown as reference
import scipy.special

from jaxalign import Network, gradient_algorithm, sweep, train
from jaxalign.certification.certified_training import certified_training, worst_case_cross_entropy
from jaxalign.certification.sabr import small_box_centre
from jaxalign.robustness.attack_losses import cross_entropy


def dense(*sizes):
    """A ReLU network as a Network."""

    def init(key):
        keys = jax.random.split(key, len(sizes) - 1)
        pairs = zip(sizes, sizes[1:], keys, strict=False)
        return [(jax.random.normal(k, (i, o)) * np.sqrt(2 / i), 0.1 * jnp.ones(o)) for i, o, k in pairs]

    def apply(params, x):
        for w, b in params[:-1]:
            x = jax.nn.relu(x @ w + b[None])
        w, b = params[-1]
        return x @ w + b[None]

    return Network(init, apply)


RNG = np.random.default_rng(0)
NETWORK = dense(3, 5, 4, 3)
X, Y = RNG.uniform(0.0, 1.0, (6, 3)).astype(np.float32), np.array([0, 1, 2, 2, 1, 0])
SHALLOW = dense(3, 6, 3)
SGD = optax.sgd(0.1)
NOW = {"warm_up": 0, "ramp": 0}


def margins_of(params, x, y, epsilon, **options):
    """[B, C-1] by NumPy in float64: intervals, or with `intermediate` CROWN."""
    layers = [reference.dense(*pair) for pair in params]
    bound = reference.crown if options else reference.interval
    box = np.clip(x - epsilon, 0.0, 1.0), np.clip(x + epsilon, 0.0, 1.0)
    rows = [reference.margins(label, len(layers[-1][1])) for label in y]
    return np.array([bound(layers, *ends, row, **options)[0] for *ends, row in zip(*box, rows, strict=True)])


@jax.jit
def ibp_step(epsilon, kappa):
    algorithm = certified_training(NETWORK, SGD, epsilon=epsilon, kappa=kappa, **NOW)
    state = algorithm.init(jax.random.key(0))
    return state.params, *algorithm.step(state, (X, Y))


@jax.jit
def plain_step():
    def objective(params, batch, key):
        return cross_entropy(NETWORK.apply(params, batch[0]), batch[1]).mean(), {}

    algorithm = gradient_algorithm(NETWORK, objective, SGD)
    return algorithm.step(algorithm.init(jax.random.key(0)), (X, Y))


def test_the_loss_is_that_of_numpys_intervals():
    params, _, metrics = ibp_step(0.05, 0.25)
    margins = margins_of(params, X, Y, 0.05)
    logits = np.asarray(NETWORK.apply(params, X), np.float64)
    natural = -scipy.special.log_softmax(logits, axis=1)[np.arange(len(Y)), Y].mean()
    robust = np.log1p(np.exp(-margins).sum(axis=1)).mean()
    assert robust > natural + 0.05
    np.testing.assert_allclose(metrics["natural_loss"], natural, rtol=1e-5)
    np.testing.assert_allclose(metrics["robust_loss"], robust, rtol=1e-5)
    np.testing.assert_allclose(metrics["loss"], 0.25 * natural + 0.75 * robust, rtol=1e-5)
    np.testing.assert_allclose([metrics["epsilon"], metrics["kappa"]], [0.05, 0.25])
    np.testing.assert_allclose(metrics["certified_accuracy"], (margins > 0).all(axis=1).mean())


def test_worst_case_cross_entropy_by_hand():
    np.testing.assert_allclose(worst_case_cross_entropy(jnp.zeros((1, 3))), [np.log(4.0)], rtol=1e-6)
    np.testing.assert_allclose(worst_case_cross_entropy(jnp.array([[1.0, 2.0]])), [0.407606], rtol=1e-5)
    assert worst_case_cross_entropy(jnp.array([[-1e4, 1e4]])) == 1e4  # in the stable form


@pytest.mark.parametrize(("epsilon", "kappa"), [(0.0, 0.5), (0.2, 1.0)])
def test_radius_0_and_kappa_1_are_plain_training(epsilon, kappa):
    _, state, metrics = ibp_step(epsilon, kappa)
    plain, plain_metrics = plain_step()
    np.testing.assert_allclose(metrics["loss"], plain_metrics["loss"], rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), state.params, plain.params)


@pytest.fixture(scope="module")
def small_boxes():
    """A step of SABR by share; how often it was traced."""
    traces = []

    @jax.jit
    def step(share, epsilon, attack_step_size):
        traces.append(1)
        algorithm = certified_training(
            NETWORK, SGD, method="sabr", epsilon=epsilon, share=share, attack_step_size=attack_step_size, **NOW
        )
        metrics = algorithm.step(algorithm.init(jax.random.key(0)), (X, Y))[1]
        return {
            name: metrics[name] for name in ("natural_loss", "robust_loss", "box_accuracy")
        }  # no gradient is needed

    return step, traces


def test_a_small_box_as_large_as_the_ball_is_ibp(small_boxes):
    step, traces = small_boxes
    metrics = [step(share, 0.1, 0.5) for share in (0.0, 0.5, 1.0)]
    natural, *losses = metrics[0]["natural_loss"], *(found["robust_loss"] for found in metrics)
    assert natural < losses[0] < losses[1] < losses[2]
    expected = ibp_step(0.1, 0.5)[2]
    np.testing.assert_allclose(losses[2], expected["robust_loss"], rtol=1e-6)
    assert metrics[2]["box_accuracy"] == expected["certified_accuracy"]
    assert len(traces) == 1


def test_the_centre_of_a_small_box_by_hand():
    x, x_adv = jnp.array([[0.5, 0.5, 0.5, 0.02]]), jnp.array([[0.9, 0.45, 0.1, 0.0]])
    np.testing.assert_allclose(small_box_centre(x, x_adv, 0.4, share=0.25), [[0.8, 0.45, 0.2, 0.0]], rtol=1e-6)
    np.testing.assert_array_equal(small_box_centre(x, x_adv, 0.4, share=1.0), x)
    np.testing.assert_allclose(small_box_centre(x, x_adv, 0.4, share=0.0), x_adv, rtol=1e-6)


def test_crown_ibp_goes_from_crown_to_intervals():
    algorithm = certified_training(SHALLOW, SGD, method="crown-ibp", epsilon=0.2, kappa=0.0, warm_up=0, ramp=4)
    state = algorithm.init(jax.random.key(0))

    @jax.jit
    def at(count):
        return algorithm.step(state.replace(step=count), (X, Y))[1]["robust_loss"]

    crown = margins_of(state.params, X, Y, 0.05, intermediate="interval")
    interval = margins_of(state.params, X, Y, 0.05)
    assert not np.allclose(crown, interval)
    expected = np.log1p(np.exp(-(0.75 * crown + 0.25 * interval)).sum(axis=1)).mean()
    np.testing.assert_allclose(at(1), expected, rtol=1e-5)  # r = 1/4, so beta = 3/4
    at_end = np.log1p(np.exp(-margins_of(state.params, X, Y, 0.2)).sum(axis=1)).mean()
    np.testing.assert_allclose(at(4), at_end, rtol=1e-5)


SQUARES = dense(2, 24, 2)
RADIUS, POINTS, STEPS = 0.1, 60, 400


def stripes():
    """Points of the unit square in four stripes of alternating class, each at least 1.2 RADIUS from the other class."""
    rng = np.random.default_rng(1)
    stripe = np.arange(POINTS) % 3
    gap = 1.2 * RADIUS
    left, width = (
        np.array([0.0, 1 / 3 + gap, 2 / 3 + gap])[stripe],
        np.array([1 / 3 - gap, 1 / 3 - 2 * gap, 1 / 3 - gap]),
    )
    first = left + width[stripe] * rng.random(POINTS)
    return np.stack([first, rng.random(POINTS)], axis=1).astype(np.float32), stripe % 2


@pytest.fixture(scope="module")
def trained():
    x, y = stripes()
    traces = []

    def run(hyper, key):
        traces.append(1)
        algorithm = certified_training(
            SQUARES, optax.adam(3e-2), epsilon=hyper["epsilon"], kappa=hyper["kappa"], warm_up=100, ramp=200
        )
        batches = (jnp.broadcast_to(x, (STEPS, *x.shape)), jnp.broadcast_to(y, (STEPS, *y.shape)))
        state, metrics = train(algorithm, key, batches)
        return state.params, metrics

    hypers = {"epsilon": jnp.array([0.0, RADIUS]), "kappa": jnp.array([1.0, 0.3])}
    params, metrics = sweep(run, hypers, jax.random.split(jax.random.key(0), 2), mode="vmap")
    return params, metrics, traces


def test_it_certifies_what_plain_training_does_not(trained):
    params, metrics, traces = trained
    x, y = stripes()
    certified = np.empty((2, 2))
    for lane in np.ndindex(2, 2):
        margins = margins_of(jax.tree.map(lambda leaf, lane=lane: leaf[lane], params), x, y, RADIUS)
        certified[lane] = (margins > 0).all(axis=1).mean()
    assert len(traces) == 1
    np.testing.assert_array_equal(metrics["accuracy"][:, :, -1], 1.0)
    assert (certified[0] < 0.8).all()
    np.testing.assert_array_equal(certified[1], 1.0)
    np.testing.assert_array_equal(metrics["certified_accuracy"][1, :, -1], 1.0)


def test_the_schedule_is_the_states(trained):
    _, metrics, _ = trained
    places = np.array([0, 100, 200, 300, 399])
    np.testing.assert_allclose(metrics["epsilon"][1, 0, places], RADIUS * np.array([0, 0, 0.5, 1, 1]), rtol=1e-6)
    np.testing.assert_allclose(metrics["kappa"][1, 0, places], [1.0, 1.0, 0.65, 0.3, 0.3], rtol=1e-6)


@pytest.mark.parametrize("method", ["crown-ibp", "sabr"])
def test_dtypes_stay_in_x64(method):
    with jax.enable_x64(True):
        network = Network(lambda key: jax.tree.map(jnp.float64, SHALLOW.init(key)), SHALLOW.apply)
        algorithm = certified_training(network, SGD, method=method, epsilon=0.1)
        state = jax.eval_shape(algorithm.init, jax.random.key(0))
        after, metrics = jax.eval_shape(algorithm.step, state, (jnp.asarray(X, jnp.float64), jnp.asarray(Y)))
    assert jax.tree.all(jax.tree.map(lambda a, b: (a.shape, a.dtype) == (b.shape, b.dtype), state, after))
    assert all(name == "gradient_norm" or not leaf.weak_type for name, leaf in metrics.items())
    assert metrics["robust_loss"].dtype == metrics["epsilon"].dtype == np.float64


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "box"}, "method must be one of ibp, crown-ibp, sabr, got 'box'"),
        ({"epsilon": -0.1}, "epsilon must lie in .*, got -0.1"),
        ({"kappa": 1.5}, r"kappa must lie in \[0, 1\], got 1.5"),
        ({"ramp": float("nan")}, "ramp must lie in .*, got nan"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        certified_training(NETWORK, SGD, **({"epsilon": 0.1} | options))
