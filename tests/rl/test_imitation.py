"""Demonstrations, behavioural cloning, and PPO as GAIL's and AIRL's learner: the plumbing by hand, then what is learned."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxalign import train
from jaxalign.environments import Box, Discrete, Environment, TimeStep, batched, cartpole
from jaxalign.irl import Transitions, airl, gail
from jaxalign.rl.actor_critic import act_with, actor_critic
from jaxalign.rl.imitation import (
    absorbing_transitions,
    as_transitions,
    behavioural_cloning,
    demonstrations,
    discriminator_network,
    ppo_learner,
)
from jaxalign.rl.ppo import ppo_optimizer, ppo_parts
from jaxalign.rl.rollout import collect

SIZES = {"num_envs": 3, "num_steps": 8, "num_epochs": 2, "num_minibatches": 2, "discount": 0.9}


def corridor(pays=lambda place: place):
    """Walk right (1) or stay (0) from 0: ends at 3, cut off after 5 steps. Observes [place, time]; pays on arrival."""

    def reset(key):
        return jnp.zeros(2), jnp.zeros(2)

    def step(key, state, action):
        new = state + jnp.stack([action, 1]).astype(jnp.float32)
        return TimeStep(new, new, pays(new[0]), new[0] >= 3, new[1] >= 5, {})

    return Environment(reset, step, Box(-np.inf, np.inf, (2,)), Discrete(2), "corridor")


def model():
    return actor_critic(corridor(), hidden=(4,))


def learner(world=None, **options):
    return ppo_learner(world or corridor(), model(), ppo_optimizer(1e-2), **SIZES, **options)


def equal(a, b):
    return all((np.asarray(x) == np.asarray(y)).all() for x, y in zip(*map(jax.tree.leaves, (a, b)), strict=True))


# Steps as transitions


def test_rows_are_in_time_order_with_true_successors_and_cut_off_is_not_terminated():
    """Environment 0 walks (and ends at once at 3), environment 1 stays (and is cut off at 5)."""
    world = batched(corridor(), 2)
    act = lambda key, seen: (jnp.array([1, 0]), jnp.array([-1.0, -2.0]))  # noqa: E731
    start = world.reset(jax.random.key(0))
    _, steps = collect(jax.random.key(1), world, act, *start, num_steps=6)
    rows = as_transitions(steps)
    walker, stayer = ((jax.tree.map(lambda x, i=i: x[i::2], rows)) for i in (0, 1))
    assert walker.states[:, 0].tolist() == [0, 1, 2, 0, 1, 2]
    assert walker.next_states[:, 0].tolist() == [1, 2, 3, 1, 2, 3]
    assert walker.terminated.tolist() == [False, False, True] * 2
    assert stayer.states[:, 1].tolist() == [0, 1, 2, 3, 4, 0]
    assert stayer.next_states[:, 1].tolist() == [1, 2, 3, 4, 5, 1]
    assert not stayer.terminated.any()
    assert bool(steps.truncated[4, 1])
    assert rows.actions.tolist() == [1, 0] * 6
    assert rows.log_probs.tolist() == [-1.0, -2.0] * 6
    assert rows.weights is None


def test_rests_by_hand():
    rows = Transitions(
        jnp.array([[0.0], [2.0]]), jnp.array([0, 1]), jnp.array([[1.0], [3.0]]), jnp.array([False, True]),
        jnp.array([-0.5, -0.25]), jnp.array([1.0, 2.0]),
    )  # fmt: skip
    both = absorbing_transitions(rows, discount=0.75)
    assert both.states[:, 0].tolist() == [0, 2, 1, 3]
    assert both.next_states[:, 0].tolist() == [1, 3, 1, 3]
    assert both.weights.tolist() == [1, 2, 0, 6]  # 2 * 0.75 / 0.25 = 2 * (0.75 + 0.75^2 + ...)
    assert both.log_probs.tolist() == [-0.5, -0.25, 0, 0]
    assert not both.terminated.any()
    bare = absorbing_transitions(rows._replace(weights=None, log_probs=None), discount=0.75)
    assert bare.log_probs is None
    assert bare.weights.tolist() == [1, 1, 0, 3]


# Demonstrations


def test_demonstrations_count_the_steps_of_whole_episodes():
    shown = demonstrations(
        jax.random.key(0), corridor(), lambda key, seen: jnp.array(1), episodes=2, max_steps=4
    )
    assert shown.weights.tolist() == [1, 1, 1, 0] * 2
    assert shown.states[:3, 0].tolist() == [0, 1, 2]
    assert shown.terminated.tolist() == [False, False, True, False] * 2
    cut = demonstrations(jax.random.key(0), corridor(), lambda key, seen: jnp.array(0), episodes=1, max_steps=7)
    assert cut.weights.tolist() == [1, 1, 1, 1, 1, 0, 0]
    assert not cut.terminated.any()
    with pytest.raises(ValueError, match=r"every=0 must be in 1\.\.max_steps=4"):
        demonstrations(jax.random.key(0), corridor(), lambda key, seen: jnp.array(0), episodes=1, max_steps=4, every=0)


def test_demonstrations_keep_every_third_step_from_a_random_first():
    shown = jax.jit(
        lambda key: demonstrations(key, corridor(), lambda k, seen: 0, episodes=60, max_steps=5, every=3)
    )(jax.random.key(0))
    times = np.asarray(shown.states[:, 1]).reshape(60, 2)
    weights = np.asarray(shown.weights).reshape(60, 2)
    assert set(times[:, 0]) == {0, 1, 2}
    both = times[:, 0] < 2  # from 2 on, the next would be step 5, which there is not
    assert (times[both, 1] == times[both, 0] + 3).all()
    assert (weights == np.stack([np.ones(60), both], axis=1)).all()


# What PPO is paid


@pytest.fixture(scope="module")
def paid():
    """improve() under a reward that reads the rows, and PPO's own on the rewards this should come to."""

    def compare(reward, expected, **options):
        learn = learner(**options)
        parts = ppo_parts(corridor(), model(), ppo_optimizer(1e-2), **SIZES)

        def both(key):
            keys = jax.random.split(key, 3)
            state, rows = learn.rollout(learn.init(keys[0]), keys[1])
            ours, _ = learn.improve(state, reward, rows, keys[2])
            theirs, steps = parts.collect(parts.init(keys[0]), keys[1])
            theirs, _ = parts.improve(theirs, steps, expected(steps), keys[2])
            still, _ = parts.improve(theirs, steps, jnp.zeros_like(steps.rewards), keys[2])
            return (ours.params, ours.opt_state), (theirs.params, theirs.opt_state), still.params

        ours, theirs, other = jax.jit(both)(jax.random.key(0))
        assert not equal(theirs[0], other)
        return equal(ours, theirs)

    return compare


def test_paid_what_the_environment_pays_it_is_ppo_bit_for_bit(paid):
    assert paid(lambda rows: rows.next_states[:, 0], lambda steps: steps.rewards)
    assert not paid(lambda rows: rows.next_states[:, 0], lambda steps: steps.rewards.T.reshape(steps.rewards.shape))


def test_temperature_pays_for_surprise(paid):
    reward = lambda rows: rows.next_states[:, 0]  # noqa: E731
    assert paid(reward, lambda steps: steps.rewards - 0.5 * steps.log_probs, temperature=0.5)


def test_the_last_step_also_earns_the_rests(paid):
    """Reward = place, of the rest 3 at the end; discount 0.9, so 9 rests: and no surprise in them."""

    def expected(steps):
        return steps.rewards - steps.log_probs + jnp.where(steps.terminated, 9.0 * 3.0, 0.0)

    learn = learner(absorbing=True)
    state, rows = jax.jit(lambda key: learn.rollout(learn.init(key), key))(jax.random.key(2))
    assert rows.terminated.shape == (2 * 24,)
    ended = np.asarray(state.steps.terminated).reshape(-1)
    assert ended.any()
    np.testing.assert_allclose(rows.weights[24:], np.where(ended, 9.0, 0.0), rtol=1e-5)
    seen = []
    parts = ppo_parts(corridor(), model(), ppo_optimizer(1e-2), **SIZES)
    heard = learner(absorbing=True, temperature=1.0)
    reward = lambda rows: rows.next_states[:, 0]  # noqa: E731
    improved, _ = heard.improve(state, reward, rows, jax.random.key(3))
    target, _ = parts.improve(state, state.steps, expected(state.steps), jax.random.key(3))
    for x, y in zip(*(jax.tree.leaves(s.params) for s in (improved, target)), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6)
    assert not seen


# The whole loop


def loop(world, kind="gail"):
    shown = demonstrations(jax.random.key(0), corridor(), lambda key, seen: 1, episodes=2, max_steps=5)
    network = lambda x: discriminator_network(corridor(), shown, hidden=(4,), of_actions=x)  # noqa: E731
    options = {"expert": shown, "discriminator_steps": 2, "discriminator_batch": 8, "gradient_penalty": 0.1}
    if kind == "gail":
        return gail(learner(world), network(True), optax.adam(1e-2), **options)
    learn = learner(world, temperature=1.0, absorbing=True)
    shown = absorbing_transitions(shown, discount=0.9)
    return airl(learn, network(True), network(False), optax.adam(1e-2), discount=0.9, **options)


@pytest.mark.parametrize("kind", ["gail", "airl"])
def test_steps_keep_the_state_and_seeds_side_by_side_are_each_alone(kind):
    algorithm = loop(corridor(), kind)
    before = jax.eval_shape(algorithm.init, jax.random.key(0))
    after, _ = jax.eval_shape(algorithm.step, before, None)
    about = lambda tree: [(x.shape, x.dtype, x.weak_type) for x in jax.tree.leaves(tree)]  # noqa: E731
    assert jax.tree.structure(before) == jax.tree.structure(after)
    assert about(before) == about(after)

    keys = jax.random.split(jax.random.key(1), 2)
    run = lambda key: train(algorithm, key, None, length=2)  # noqa: E731
    state, metrics = jax.jit(jax.vmap(run))(keys)
    alone, measured = jax.jit(run)(keys[1])
    assert int(alone.step) == int(alone.policy.step) == 2
    np.testing.assert_allclose(metrics["loss"][1], measured["loss"], rtol=1e-4)
    for x, y in zip(jax.tree.leaves(state.policy.params), jax.tree.leaves(alone.policy.params), strict=True):
        np.testing.assert_allclose(x[1], y, rtol=1e-3, atol=1e-5)
    assert measured["policy/loss"][0] != measured["loss"][0]
    assert np.isfinite(measured["reward/policy"]).all()


def test_the_environments_reward_stays_unseen():
    """NaN in place of it changes nothing but what is said of the episodes."""

    def run(pays):
        state, metrics = jax.jit(lambda key: train(loop(corridor(pays)), key, None, length=2))(jax.random.key(0))
        return (state.params, state.policy.params, metrics["reward/policy"]), metrics["episode/return"]

    (shown, paid), (hidden, unpaid) = run(lambda place: place), run(lambda place: jnp.full_like(place, jnp.nan))
    assert equal(shown, hidden)
    assert np.isfinite(paid).all()
    assert np.isnan(unpaid).all()


# Behavioural cloning


def rooms(size=3):
    """A Discrete observation, so that a network without hidden layers is a table."""
    step = lambda key, state, action: TimeStep(  # noqa: E731
        state, state, jnp.zeros(()), jnp.zeros((), bool), jnp.ones((), bool), {}
    )
    return Environment(lambda key: (jnp.array(0), jnp.array(0)), step, Discrete(size), Discrete(2), "rooms")


def tally(states, actions, weights=None):
    states, actions = jnp.array(states), jnp.array(actions)
    return Transitions(states, actions, states, jnp.zeros(states.shape, bool), None, weights)


def test_cloning_by_hand_and_its_optimum_is_what_was_seen():
    """Room 0: right 3 times in 4; room 1: weights 1 and 4; room 2: only by a row of weight 0, so not at all."""
    shown = tally([0, 0, 0, 0, 1, 1, 2], [1, 1, 1, 0, 0, 1, 1], jnp.array([1.0, 1, 1, 1, 1, 4, 0]))
    table = actor_critic(rooms(), hidden=())
    algorithm = behavioural_cloning(table, optax.adam(0.1), expert=shown)
    state, metrics = jax.jit(lambda key: train(algorithm, key, None, length=300))(jax.random.key(0))
    first = jax.jit(lambda key: algorithm.init(key))(jax.random.key(0))
    log_pi = table.policy(first.params, shown.states).log_prob(shown.actions)
    np.testing.assert_allclose(metrics["loss"][0], -np.average(log_pi, weights=shown.weights), rtol=1e-5)
    learned = table.policy(state.params, jnp.arange(3)).probs
    np.testing.assert_allclose(learned[:2, 1], [0.75, 0.8], atol=1e-3)
    untouched = table.policy(first.params, jnp.arange(3)).probs
    entropy = lambda p: -(p * np.log(p) + (1 - p) * np.log(1 - p))  # noqa: E731
    np.testing.assert_allclose(metrics["loss"][-1], (4 * entropy(0.75) + 5 * entropy(0.8)) / 9, atol=1e-4)
    assert equal(state.params["critic"], first.params["critic"])
    assert untouched.shape == (3, 2)


def test_cloning_draws_rows_by_weight_and_takes_batches():
    shown = tally([0, 1], [1, 1], jnp.array([1.0, 0.0]))
    table = actor_critic(rooms(), hidden=())
    drawn = behavioural_cloning(table, optax.adam(0.1), expert=shown, batch_size=4)
    all_rows = behavioural_cloning(table, optax.adam(0.1))
    one = lambda a, batch: jax.jit(a.step)(a.init(jax.random.key(0)), batch)[0].params["actor"]  # noqa: E731
    for x, y in zip(*map(jax.tree.leaves, (one(drawn, None), one(all_rows, tally([0], [1])))), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5)
    with pytest.raises(ValueError, match="no demonstrations"):
        all_rows.step(all_rows.init(jax.random.key(0)), None)


# The discriminator's network


def test_the_network_does_not_see_the_unit_of_the_observations():
    """The demonstrations and the rows in millimetres instead of metres, and moved: the same logits."""
    shown = demonstrations(jax.random.key(0), corridor(), lambda key, seen: 1, episodes=2, max_steps=5)
    moved = shown._replace(states=1000.0 * shown.states - 7.0)
    # A row that does not count must not count for the scale.
    moved = moved._replace(states=jnp.where(moved.weights[:, None] > 0, moved.states, 1e6))
    rows = shown.states[:3]
    outputs = []
    for seen, x in ((shown, rows), (moved, 1000.0 * rows - 7.0)):
        network = discriminator_network(corridor(), seen, hidden=(4,))
        outputs.append(network.apply(network.init(jax.random.key(1)), x))
    assert outputs[0].shape == (3, 2)
    assert np.ptp(outputs[0]) > 0
    np.testing.assert_allclose(*outputs, rtol=1e-4, atol=1e-6)


def test_the_networks_shapes_for_every_kind_of_space():
    real = corridor()
    real = real.replace(action_space=Box(-1.0, 1.0, (2,)))
    shown = Transitions(
        jax.random.normal(jax.random.key(0), (5, 2)), jax.random.normal(jax.random.key(1), (5, 2)), jnp.ones((5, 2)),
        jnp.zeros(5, bool),
    )  # fmt: skip
    for of_actions in (True, False):
        network = discriminator_network(real, shown, hidden=(4,), of_actions=of_actions)
        params = network.init(jax.random.key(0))
        out = network.apply(params, shown.states, shown.actions)
        assert out.shape == (5, 1)
        turned = network.apply(params, shown.states, -shown.actions)
        assert bool((out == turned).all()) is not of_actions
    tabular = discriminator_network(rooms(), tally([0, 1, 2], [1, 0, 1]), hidden=())
    assert tabular.apply(tabular.init(jax.random.key(0)), jnp.array([0, 2])).shape == (2, 2)


# Learning


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "absorbing"), [("positive", False), ("negative", False), ("negative", True)])
def test_where_ending_costs_nothing_the_sign_of_the_reward_decides(kind, absorbing):
    """An expert that keeps the cart a metre to the right, shown in 25 steps; control: what a constant reward teaches.

    Paid -log(1 - D) the policy lives and finds the mark; paid log D it ends the episode as soon as it can, unless what
    comes after the end is judged too.
    """
    world, policy = cartpole(), actor_critic(cartpole())
    gains = jnp.array([2.0, 4.0, 30.0, 6.0])

    def expert(key, seen):
        return jax.random.bernoulli(key, jax.nn.sigmoid(gains @ seen.at[0].add(-1.0))).astype(jnp.int32)

    shown = demonstrations(jax.random.key(0), world, expert, episodes=1, max_steps=500, every=20)
    sizes = {"num_envs": 8, "num_steps": 512, "num_epochs": 4, "num_minibatches": 16, "normalize_rewards": True}
    learn = ppo_learner(world, policy, ppo_optimizer(1e-3, anneal_over=48 * 64), absorbing=absorbing, **sizes)
    algorithm = gail(
        learn, discriminator_network(world, shown, hidden=(64, 64)), optax.adam(1e-3), expert=shown,
        reward=jax.nn.softplus if kind == "positive" else jax.nn.log_sigmoid, discriminator_steps=16,
        discriminator_batch=256, gradient_penalty=0.1,
    )  # fmt: skip

    def run(key):
        state, _ = train(algorithm, key, None, length=48)
        act = act_with(policy, state.policy.params)
        rows = demonstrations(jax.random.key(9), world, act, episodes=32, max_steps=500)
        away = jnp.abs(rows.next_states[:, 0] - 1.0)
        return jnp.sum(rows.weights) / 32, jnp.sum(rows.weights * away) / jnp.sum(rows.weights)

    steps, away = jax.jit(run)(jax.random.key(1))
    if kind == "negative" and not absorbing:
        assert steps < 20
    else:
        assert steps > 450
        assert away < 0.4
