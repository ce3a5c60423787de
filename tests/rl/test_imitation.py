"""Demonstrations, cloning, and PPO as the learner of GAIL and AIRL: the plumbing by hand, then what is learned."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxalign import train
from jaxalign.environments import Box, Discrete, Environment, TimeStep, batched, cartpole
from jaxalign.irl import Transitions, airl, gail
from jaxalign.rl import imitation
from jaxalign.rl.actor_critic import act_with, actor_critic
from jaxalign.rl.imitation import (
    absorbing_transitions,
    as_transitions,
    behavioural_cloning,
    demonstrations,
    discriminator_network,
    ppo_learner,
)
from jaxalign.rl.ppo import PPOParts, ppo_optimizer, ppo_parts
from jaxalign.rl.rollout import Steps, collect

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
    assert both.resting.tolist() == [False, False, True, True]
    assert not both.terminated.any()
    bare = absorbing_transitions(rows._replace(weights=None, log_probs=None), discount=0.75)
    assert bare.log_probs is None
    assert bare.weights.tolist() == [1, 1, 0, 3]


# Demonstrations


def test_demonstrations_count_the_steps_of_whole_episodes():
    shown = jax.jit(
        lambda move: demonstrations(jax.random.key(0), corridor(), lambda key, seen: move, episodes=2, max_steps=6)
    )
    ended, cut = shown(1), shown(0)
    assert ended.weights.tolist() == [1, 1, 1, 0, 0, 0] * 2
    assert ended.states[:3, 0].tolist() == [0, 1, 2]
    assert ended.next_states[:3, 0].tolist() == [1, 2, 3]
    assert ended.terminated.tolist() == [False, False, True, False, False, False] * 2
    assert cut.weights.tolist() == [1, 1, 1, 1, 1, 0] * 2
    assert not cut.terminated.any()
    with pytest.raises(ValueError, match=r"every=0 must be in 1\.\.max_steps=4"):
        demonstrations(jax.random.key(0), corridor(), lambda key, seen: 0, episodes=1, max_steps=4, every=0)


def test_demonstrations_keep_every_third_step_from_a_random_first():
    shown = jax.jit(lambda key: demonstrations(key, corridor(), lambda k, seen: 0, episodes=60, max_steps=5, every=3))(
        jax.random.key(0)
    )
    times = np.asarray(shown.states[:, 1]).reshape(60, 2)
    weights = np.asarray(shown.weights).reshape(60, 2)
    assert set(times[:, 0]) == {0, 1, 2}
    both = times[:, 0] < 2  # from 2 on, the next would be step 5, which there is not
    assert (times[both, 1] == times[both, 0] + 3).all()
    assert (weights == np.stack([np.ones(60), both], axis=1)).all()


# What PPO is paid


@pytest.mark.slow
def test_paid_what_the_environment_pays_it_is_ppo_bit_for_bit():
    learn, parts = learner(), ppo_parts(corridor(), model(), ppo_optimizer(1e-2), **SIZES)

    @jax.jit
    def both(key, order):
        keys = jax.random.split(key, 3)
        state, rows = learn.rollout(learn.init(keys[0]), keys[1])
        ours, _ = learn.improve(state, lambda rows: rows.next_states[order, 0], rows, keys[2])
        theirs, steps = parts.collect(parts.init(keys[0]), keys[1])
        theirs, _ = parts.improve(theirs, steps, steps.rewards, keys[2])
        known = learn.log_prob(state, absorbing_transitions(rows, discount=0.9))
        return [(state.params, state.opt_state) for state in (ours, theirs)], (rows.log_probs, known)

    results, (acting, known) = both(jax.random.key(0), jnp.arange(24))
    assert equal(*results)
    assert not equal(*both(jax.random.key(0), jnp.arange(24)[::-1])[0])
    # What it did, it would say again; where nothing is chosen nothing surprises.
    np.testing.assert_allclose(known, np.concatenate([acting, np.zeros(24)]), rtol=1e-5)


def test_surprise_and_rests_are_paid_by_hand(monkeypatch):
    """Two environments in two steps, reward = place arrived at; the second one ends in its first step, at 3."""
    flags = jnp.array([[False, True], [False, False]])
    place = jnp.array([[[0.0], [2.0]], [[1.0], [0.0]]])
    steps = Steps(
        place, jnp.ones((2, 2), int), jnp.zeros((2, 2)), place + 1, flags, jnp.zeros((2, 2), bool),
        jnp.array([[-1.0, -2.0], [-3.0, -4.0]]),
        {"episode_return": jnp.zeros((2, 2)), "episode_length": jnp.zeros((2, 2))},
    )  # fmt: skip
    told = PPOParts(None, lambda state, key: (state, steps), lambda state, *paid: (state, {"paid": paid[1]}))
    monkeypatch.setattr(imitation, "ppo_parts", lambda *args, discount: told)

    def paid(**options):
        learn = ppo_learner(corridor(), model(), None, **options)
        state, rows = learn.rollout(imitation.ImitatorState(*[None] * 4), None)
        return learn.improve(state, lambda rows: rows.next_states[:, 0], rows, None)[1]["policy/paid"].tolist()

    assert paid() == [[1, 3], [2, 1]]
    assert paid(temperature=0.5) == [[1.5, 4], [3.5, 3]]
    # Discount 0.75 makes the rests 3 times as long as a step, and there is nothing to choose in them.
    assert paid(temperature=0.5, absorbing=True, discount=0.75) == [[1.5, 4 + 3 * 3], [3.5, 3]]


# The whole loop


def loop(scale):
    """AIRL with everything on it, in a corridor that pays scale * place."""
    shown = demonstrations(jax.random.key(0), corridor(), lambda key, seen: 1, episodes=2, max_steps=5)
    of_both, of_states = (discriminator_network(corridor(), shown, hidden=(4,), of_actions=x) for x in (True, False))
    learn = learner(corridor(lambda place: scale * place), temperature=1.0, absorbing=True)
    return airl(
        learn, of_both, of_states, optax.adam(1e-2), discount=0.9, expert=absorbing_transitions(shown, discount=0.9),
        discriminator_steps=2, discriminator_batch=8, gradient_penalty=0.1,
    )  # fmt: skip


@pytest.fixture(scope="module")
def run():
    """Two steps: (key, scale) -> (state, metrics)."""
    return lambda key, scale: train(loop(scale), key, None, length=2)


@pytest.fixture(scope="module")
def lanes(run):
    """Two seeds, the second of them also where the environment pays NaN."""
    keys = jax.random.split(jax.random.key(1), 2)
    return jax.jit(jax.vmap(run))(keys[jnp.array([0, 1, 1])], jnp.array([1.0, 1.0, jnp.nan]))


def test_a_step_keeps_the_types_of_the_state():
    algorithm = loop(1.0)
    before = jax.eval_shape(algorithm.init, jax.random.key(0))
    after, _ = jax.eval_shape(algorithm.step, before, None)
    about = lambda tree: [(x.shape, x.dtype, x.weak_type) for x in jax.tree.leaves(tree)]  # noqa: E731
    assert jax.tree.structure(before) == jax.tree.structure(after)
    assert about(before) == about(after)


@pytest.mark.slow
def test_seeds_side_by_side_are_each_alone(run, lanes):
    state, metrics = lanes
    alone, measured = jax.jit(run)(jax.random.split(jax.random.key(1), 2)[1], 1.0)
    assert int(alone.step) == int(alone.policy.step) == 2
    for x, y in zip(jax.tree.leaves(state.policy.params), jax.tree.leaves(alone.policy.params), strict=True):
        np.testing.assert_allclose(x[1], y, rtol=1e-3, atol=1e-5)
    for name in ("loss", "policy/loss", "reward/policy", "episode/return"):
        assert np.isfinite(measured[name]).all()
        np.testing.assert_allclose(metrics[name][1], measured[name], rtol=1e-3, atol=1e-5)
    assert measured["policy/loss"][0] != measured["loss"][0]


def test_the_environments_reward_stays_unseen(lanes):
    """NaN in place of it changes nothing but what is said of the episodes."""
    state, metrics = lanes
    learned = (state.params, state.policy.params, {n: x for n, x in metrics.items() if n != "episode/return"})
    assert equal(*(jax.tree.map(lambda x, i=i: x[i], learned) for i in (1, 2)))
    assert not equal(*(jax.tree.map(lambda x, i=i: x[i], learned) for i in (0, 1)))
    assert int(state.step[0]) == int(state.policy.step[0]) == 2
    assert np.isfinite(metrics["episode/return"][1]).all()
    assert np.isnan(metrics["episode/return"][2]).all()


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

    @jax.jit
    def run(key):
        first = algorithm.init(key).params
        state, metrics = train(algorithm, key, None, length=300)
        log_pi = table.policy(first, shown.states).log_prob(shown.actions)
        return first["critic"], state.params["critic"], log_pi, table.policy(state.params, jnp.arange(3)).probs, metrics

    critic, same, log_pi, learned, metrics = run(jax.random.key(0))
    assert equal(critic, same)
    np.testing.assert_allclose(metrics["loss"][0], -np.average(log_pi, weights=shown.weights), rtol=1e-5)
    np.testing.assert_allclose(learned[:2, 1], [0.75, 0.8], atol=1e-3)  # the rooms share a bias, so the third moves
    entropy = lambda p: -(p * np.log(p) + (1 - p) * np.log(1 - p))  # noqa: E731
    np.testing.assert_allclose(metrics["loss"][-1], (4 * entropy(0.75) + 5 * entropy(0.8)) / 9, atol=1e-4)


def test_cloning_draws_rows_by_weight_and_takes_batches():
    shown = tally([0, 1], [1, 1], jnp.array([1.0, 0.0]))
    table = actor_critic(rooms(), hidden=())
    drawing = behavioural_cloning(table, optax.adam(0.1), expert=shown, batch_size=4)
    given = behavioural_cloning(table, optax.adam(0.1))

    @jax.jit
    def run(key):
        start = given.init(key)
        return [a.step(start, batch)[0].params for a, batch in ((drawing, None), (given, tally([0], [1])))]

    for x, y in zip(*map(jax.tree.leaves, run(jax.random.key(0))), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5)
    with pytest.raises(ValueError, match="no demonstrations"):
        jax.eval_shape(lambda key: given.step(given.init(key), None), jax.random.key(0))


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
        outputs.append(network.apply(jax.jit(network.init)(jax.random.key(1)), x))
    assert outputs[0].shape == (3, 2)
    assert np.ptp(outputs[0]) > 0
    np.testing.assert_allclose(*outputs, rtol=1e-4, atol=1e-6)


def test_the_networks_shapes_for_every_kind_of_space():
    real = corridor().replace(action_space=Box(-1.0, 1.0, (2,)))
    states, after = jax.random.normal(jax.random.key(0), (2, 5, 2))
    shown = Transitions(states, jnp.eye(5, 2), after, jnp.zeros(5, bool))

    def outputs(network, *rows):
        shapes = jax.eval_shape(network.init, jax.random.key(0))
        return network.apply(jax.tree.map(lambda x: jnp.arange(1.0, x.size + 1).reshape(x.shape), shapes), *rows)

    for of_actions in (True, False):
        network = discriminator_network(real, shown, hidden=(4,), of_actions=of_actions)
        out, other = (outputs(network, states, x) for x in (shown.actions, -shown.actions))
        assert out.shape == (5, 1)
        assert bool((out == other).all()) is not of_actions
    tabular = discriminator_network(rooms(), tally([0, 1, 2], [1, 0, 1]), hidden=())
    assert outputs(tabular, jnp.array([0, 2])).shape == (2, 2)


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
