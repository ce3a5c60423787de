"""Demonstrations: counts by hand, samples against occupancies, padding, and what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.irl.trajectories import (
    Trajectories,
    check_trajectories,
    feature_expectations,
    pad_trajectories,
    sample_trajectories,
    timed_visit_counts,
    visit_counts,
)
from jaxalign.mdp import TabularMDP, gridworld, occupancy_measure, random_mdp

S, A = 5, 3
MDP = random_mdp(jax.random.key(0), S, A, discount=0.7).replace(terminal=np.arange(S) == 4)
TWO = pad_trajectories([([0, 1, 1], [2, 0, 0]), ([3, 4], [1, 1])])


def test_padding_by_hand():
    np.testing.assert_array_equal(TWO.states, [[0, 1, 1], [3, 4, 0]])
    np.testing.assert_array_equal(TWO.actions, [[2, 0, 0], [1, 1, 0]])
    np.testing.assert_array_equal(TWO.mask, [[True, True, True], [True, True, False]])


def test_counts_by_hand():
    # Means over two trajectories; state 4 is terminal, so nothing is counted there.
    counts = visit_counts(MDP, TWO, discount=0.5)
    np.testing.assert_allclose(counts[0], [0, 0, 0.5])
    np.testing.assert_allclose(counts[1], [(0.5 + 0.25) / 2, 0, 0])
    np.testing.assert_allclose(counts[3], [0, 0.5, 0])
    np.testing.assert_allclose(counts.sum(), 0.5 + 0.375 + 0.5)
    np.testing.assert_allclose(visit_counts(MDP, TWO).sum(), 4 / 2)
    timed = timed_visit_counts(MDP, TWO, horizon=4)
    assert timed.shape == (4, S, A)
    np.testing.assert_allclose(jnp.einsum("t,tsa->sa", 0.5 ** jnp.arange(4.0), timed), counts)


def test_feature_expectations_by_hand_and_by_loops():
    features = jnp.array([[1.0, 0.0], [0.0, 1.0], [9.0, 9.0], [2.0, 2.0], [4.0, 0.0]])
    np.testing.assert_allclose(feature_expectations(features, TWO, discount=0.5), [(1 + 2 + 2) / 2, (0.75 + 2) / 2])
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        states, actions = rng.integers(0, S, (7, 6)), rng.integers(0, A, (7, 6))
        many, features = Trajectories(states, actions, rng.random((7, 6)) < 0.7), rng.normal(size=(S, 4))
        mean, counts = np.zeros(4), np.zeros((S, A))
        for n, t in np.ndindex(7, 6):
            if many.mask[n, t]:
                mean += 0.9**t * features[states[n, t]] / 7
                counts[states[n, t], actions[n, t]] += (states[n, t] != 4) * 0.9**t / 7
        found = jax.jit(lambda f, g: feature_expectations(f, many, discount=g))(features, 0.9)
        np.testing.assert_allclose(found, mean, rtol=1e-12)
        wide = jax.tree.map(lambda x: x.astype(jnp.float64) if x.dtype == jnp.float32 else x, MDP)
        counted = jax.jit(lambda g: visit_counts(wide, many, discount=g))(0.9)
        assert counted.dtype == jnp.float64
        np.testing.assert_allclose(counted, counts, rtol=1e-12)


def test_counts_do_not_see_the_padding():
    spoiled = TWO._replace(states=TWO.states.at[1, 2].set(77), actions=TWO.actions.at[1, 2].set(-5))
    np.testing.assert_array_equal(visit_counts(MDP, spoiled), visit_counts(MDP, TWO))
    features = jnp.arange(10.0).reshape(S, 2)
    one, other = (feature_expectations(features, x, discount=0.9) for x in (spoiled, TWO))
    np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize(
    "mdp",
    [
        MDP,
        random_mdp(jax.random.key(3), S, A, branching=2, discount=0.7),
        gridworld(2, 3, slip=0.3, goal=5, discount=0.7),
    ],
    ids=["dense", "sparse", "grid"],
)
def test_samples_visit_as_the_occupancy_says(mdp):
    log_policy = jax.nn.log_softmax(jax.random.normal(jax.random.key(1), (mdp.num_states, mdp.num_actions)))
    num, length = 4000, 30  # 0.7^30 = 2e-5 is cut off
    sample = jax.jit(lambda key: sample_trajectories(key, mdp, log_policy, num=num, length=length))
    found = sample(jax.random.key(2))
    check_trajectories(mdp, found)
    occupancy = np.asarray(occupancy_measure(mdp, log_policy))
    # A pair is visited at most 1 / (1 - discount) times, so a mean of `num` deviates by sqrt(d / (1 - g) / num).
    deviation = np.sqrt(occupancy / 0.3 / num)
    counts = visit_counts(mdp, found, discount=0.7)
    assert (np.abs(counts - occupancy) <= 5 * deviation + 1e-4).all()
    again, other = sample(jax.random.key(2)), sample(jax.random.key(4))
    np.testing.assert_array_equal(found.states, again.states)
    assert not np.array_equal(found.states, other.states)


def test_trajectories_end_on_entering_a_terminal_state():
    found = sample_trajectories(jax.random.key(0), MDP, jnp.zeros((S, A)), num=200, length=12)
    states, mask = np.asarray(found.states), np.asarray(found.mask)
    np.testing.assert_array_equal(mask, states != 4)
    assert (mask[:, :-1] >= mask[:, 1:]).all()
    assert 0.05 < (~mask[:, 0]).mean() < 0.4  # a fifth starts there and never acts
    assert not mask.all()


def test_policies_that_change_with_time_are_followed():
    p = np.zeros((2, 2, 2))
    p[:, 0, 0] = p[:, 1, 1] = 1.0  # action a leads to state a
    mdp = TabularMDP(p, [1.0, 0.0], [False, False], 0.9)
    with np.errstate(divide="ignore"):
        log_policy = jnp.log(jnp.array([[[0.0, 1.0]] * 2, [[0.0, 1.0]] * 2, [[1.0, 0.0]] * 2, [[0.0, 1.0]] * 2]))
    found = sample_trajectories(jax.random.key(0), mdp, log_policy, num=3, length=4)
    np.testing.assert_array_equal(found.actions, [[1, 1, 0, 1]] * 3)
    np.testing.assert_array_equal(found.states, [[0, 1, 1, 0]] * 3)


def test_sampling_maps_over_policies():
    logits = jax.random.normal(jax.random.key(5), (3, S, A))
    sample = lambda policy: sample_trajectories(jax.random.key(6), MDP, policy, num=4, length=5)  # noqa: E731
    together = jax.vmap(sample)(logits)
    for i in range(3):
        np.testing.assert_array_equal(together.actions[i], sample(logits[i]).actions)


def trajectories(**changes):
    return TWO._replace(**{name: jnp.asarray(value) for name, value in changes.items()})


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (trajectories(states=[[0, 1, 5], [3, 4, 0]]), r"states\[0, 2\] is 5, not in 0\.\.4"),
        (trajectories(states=[[0, -1, 1], [3, 4, 0]]), r"states\[0, 1\] is -1"),
        (trajectories(actions=[[0, 0, 0], [3, 0, 0]]), r"actions\[1, 0\] is 3, not in 0\.\.2"),
        (trajectories(mask=np.zeros((2, 3), bool)), "empty demonstrations"),
        (Trajectories(*(jnp.zeros((0, 3), x.dtype) for x in TWO)), "empty demonstrations"),
        (trajectories(mask=np.ones((2, 2), bool)), r"must all be \[N, T\]"),
        (Trajectories(*(x[0] for x in TWO)), r"must all be \[N, T\]"),
        (trajectories(states=np.zeros((2, 3))), "must be integers and mask bool"),
        (trajectories(mask=np.ones((2, 3))), "must be integers and mask bool"),
    ],
)
def test_bad_trajectories_are_named(bad, message):
    for call in (check_trajectories, visit_counts):
        with pytest.raises(ValueError, match=f"trajectories.*{message}"):
            call(MDP, bad)


def test_other_bad_input_is_named():
    with pytest.raises(ValueError, match=r"trajectories: states\[1, 0\] is 3, not in 0\.\.2"):
        feature_expectations(jnp.ones((3, 2)), TWO, discount=0.9)
    with pytest.raises(ValueError, match="3 steps, more than horizon=2"):
        timed_visit_counts(MDP, TWO, horizon=2)
    with pytest.raises(ValueError, match="log_policy must be"):
        sample_trajectories(jax.random.key(0), MDP, jnp.zeros((3, S, A)), num=2, length=4)
    for demonstrations, message in (
        ([], "demonstrations: there are none"),
        ([([0], [1]), ([], [])], r"demonstrations\[1\]: .* non-empty"),
        ([([0, 1], [1])], r"demonstrations\[0\]: .* equally long"),
        ([([0.0], [1])], r"demonstrations\[0\]: states and actions must be integers"),
        ([([[0]], [[1]])], r"demonstrations\[0\]"),
    ):
        with pytest.raises(ValueError, match=message):
            pad_trajectories(demonstrations)
