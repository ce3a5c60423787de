"""Auto-PGD, FAB, Square and AutoAttack beside torchattacks on the same network, its weights shared through NumPy."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxalign.robustness.apgd import apgd
from jaxalign.robustness.auto_attack import auto_attack
from jaxalign.robustness.fab import fab
from jaxalign.robustness.square import square

torch = pytest.importorskip("torch")
torchattacks = pytest.importorskip("torchattacks")
datasets = pytest.importorskip("sklearn.datasets")

pytestmark = [pytest.mark.peer, pytest.mark.slow]
OPTIMIZED = True  # the attacks run for longer than they compile
KEY = jax.random.key(0)
ROWS = 400
RADII = {"linf": 0.08, "l2": 0.4}
NAMES = {"linf": "Linf", "l2": "L2"}


@pytest.fixture(scope="module")
def problem():
    """(classifier, the same in torch, digits [400, 8, 8, 1] in [0, 1], labels), trained on the other digits."""
    torch.set_num_threads(1)  # the network is too small for more
    digits = datasets.load_digits()
    x, y = (digits.images / 16).astype(np.float32)[..., None], digits.target
    rng = np.random.default_rng(0)
    sizes = (64, 64, 64, 10)
    params = [
        (jnp.asarray(rng.normal(size=s) * np.sqrt(2 / s[0]), jnp.float32), jnp.zeros(s[1]))
        for s in itertools.pairwise(sizes)
    ]

    def logits(params, x):
        h = x.reshape(x.shape[0], -1)
        for w, b in params[:-1]:
            h = jax.nn.relu(h @ w + b[None])
        return h @ params[-1][0] + params[-1][1][None]

    optimizer = optax.adam(2e-3)

    @jax.jit
    def step(carry, batch):
        params, state = carry
        x, y = batch
        # Noise in training, so that the radii below leave some rows standing.
        loss = lambda p: optax.softmax_cross_entropy_with_integer_labels(logits(p, x), y).mean()  # noqa: E731
        updates, state = optimizer.update(jax.grad(loss)(params), state)
        return (optax.apply_updates(params, updates), state), None

    order = rng.integers(ROWS, len(x), (1500, 64))
    noise = rng.normal(size=(*order.shape, 8, 8, 1)) * 0.2
    batches = (x[order] + noise.astype(np.float32), y[order])
    (params, _), _ = jax.lax.scan(step, (params, optimizer.init(params)), batches)

    layers = [torch.nn.Flatten()]
    for w, b in params:
        linear = torch.nn.Linear(*w.shape)
        linear.weight.data, linear.bias.data = torch.tensor(np.asarray(w).T.copy()), torch.tensor(np.asarray(b))
        layers += [linear, torch.nn.ReLU()]
    network = torch.nn.Sequential(*layers[:-1]).eval()
    x, y = x[:ROWS], y[:ROWS]
    apply = lambda x: logits(params, x)  # noqa: E731
    np.testing.assert_allclose(apply(x), network(torch.tensor(x)).detach(), atol=1e-4)
    return apply, network, x, y


def robust(result):
    return float(1 - np.mean(result.success))


def robust_of_peer(attack, network, x, y, norm):
    """The share of rows that torchattacks leaves standing, and whether it kept to the ball and the box."""
    images, labels = torch.tensor(x.transpose(0, 3, 1, 2)), torch.tensor(y)
    adversarial = attack(images, labels)
    delta = (adversarial - images).detach().flatten(1)
    size = delta.abs().max(1)[0] if norm == "linf" else delta.norm(dim=1)
    assert float(size.max()) <= RADII[norm] * (1 + 1e-4) + 1e-6
    with torch.no_grad():
        return float((network(adversarial).argmax(1) == labels).float().mean())


@pytest.mark.parametrize("norm", RADII)
def test_apgd_breaks_as_many_as_torchattacks(problem, norm):
    apply, network, x, y = problem
    for loss in ("ce", "dlr"):
        theirs = torchattacks.APGD(network, norm=NAMES[norm], eps=RADII[norm], steps=100, loss=loss)
        expected = robust_of_peer(theirs, network, x, y, norm)
        assert 0.2 < expected < 0.8
        found = robust(apgd(KEY, apply, x, y, RADII[norm], norm=norm, steps=100, loss=loss))
        assert abs(found - expected) <= 0.01, (loss, found, expected)


@pytest.mark.parametrize("norm", RADII)
def test_fab_and_square_are_no_weaker_than_torchattacks(problem, norm):
    apply, network, x, y = problem
    theirs = torchattacks.FAB(network, norm=NAMES[norm], eps=RADII[norm], steps=50)
    found = robust(fab(KEY, apply, x, y, RADII[norm], norm=norm, steps=50))
    assert found <= robust_of_peer(theirs, network, x, y, norm) + 0.01
    theirs = torchattacks.Square(network, norm=NAMES[norm], eps=RADII[norm], n_queries=1000)
    found = robust(square(KEY, apply, x, y, RADII[norm], norm=norm, queries=1000))
    assert found <= robust_of_peer(theirs, network, x, y, norm) + 0.02


@pytest.mark.parametrize("norm", RADII)
def test_auto_attack_agrees_with_torchattacks(problem, norm):
    apply, network, x, y = problem
    theirs = torchattacks.AutoAttack(network, norm=NAMES[norm], eps=RADII[norm], version="standard", seed=0)
    for attack in theirs._autoattack.attacks[:3]:
        attack.steps = 100  # as in the paper; torchattacks leaves them at 10
    expected = robust_of_peer(theirs, network, x, y, norm)
    found = robust(auto_attack(KEY, apply, x, y, RADII[norm], norm=norm))
    assert 0.2 < expected < 0.8
    assert abs(found - expected) <= 0.003, (found, expected)
