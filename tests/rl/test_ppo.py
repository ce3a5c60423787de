"""PPO: one update against NumPy, its limits by identity, values with a known answer, errors, and one trace a sweep."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxalign import sweep, train
from jaxalign.environments import Box, cartpole, init_moments, tabular_environment, update_moments
from jaxalign.mdp import TabularMDP
from jaxalign.rl.actor_critic import actor_critic
from jaxalign.rl.incentives import chain, reward_function
from jaxalign.rl.learning_curve import with_evaluation
from jaxalign.rl.ppo import observed, ppo, ppo_optimizer, ppo_parts
from jaxalign.runtime import NonFiniteError, fit

KEY = jax.random.key(0)
WORLD = cartpole(max_steps=7)
MODEL = actor_critic(WORLD, hidden=(8,))
SIZES = {"num_envs": 4, "num_steps": 6, "num_epochs": 1, "num_minibatches": 1}
NUMBERS = {"discount": 0.9, "gae_lambda": 0.8, "clip_epsilon": 0.2, "entropy_coefficient": 0.01}


@pytest.fixture(scope="module")
def rollout():
    """The pieces of PPO, its state after one rollout, and the rollout."""
    parts = ppo_parts(WORLD, MODEL, optax.sgd(0.0), normalize_advantages=False, **SIZES, **NUMBERS)
    state = jax.jit(parts.init)(KEY)
    state, steps = jax.jit(parts.collect)(state, jax.random.key(1))
    return parts, state, steps


def numpy_mlp(params, x):
    layers = [params[name] for name in sorted(params)]
    for layer in layers[:-1]:
        x = np.tanh(x @ np.float64(layer["kernel"]) + np.float64(layer["bias"]))
    return x @ np.float64(layers[-1]["kernel"]) + np.float64(layers[-1]["bias"])


def test_a_rollout_holds_true_successors_and_what_the_policy_said(rollout):
    _, state, steps = rollout
    logits = numpy_mlp(state.params["actor"], np.float64(steps.observations))
    log_policy = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    said = np.take_along_axis(log_policy, np.asarray(steps.actions)[..., None], axis=-1)[..., 0]
    np.testing.assert_allclose(steps.log_probs, said, rtol=1e-4, atol=1e-5)
    done = np.asarray(steps.done)
    goes_on = ~done[:-1]
    after, now = np.asarray(steps.next_observations)[:-1], np.asarray(steps.observations)[1:]
    np.testing.assert_array_equal(after[goes_on], now[goes_on])
    np.testing.assert_array_equal(state.observations[~done[-1]], np.asarray(steps.next_observations)[-1][~done[-1]])


def test_the_first_gradient_step_minimises_the_loss_numpy_computes(rollout):
    parts, state, steps = rollout
    new, metrics = jax.jit(parts.improve)(state, steps, steps.rewards, KEY)
    values = numpy_mlp(state.params["critic"], np.float64(steps.observations))[..., 0]
    after = numpy_mlp(state.params["critic"], np.float64(steps.next_observations))[..., 0]
    terminated, done = np.asarray(steps.terminated), np.asarray(steps.done)
    advantages, carried = np.zeros_like(values), 0.0
    for t in reversed(range(len(values))):
        delta = np.asarray(steps.rewards)[t] + 0.9 * (1 - terminated[t]) * after[t] - values[t]
        carried = delta + 0.9 * 0.8 * (1 - done[t]) * carried
        advantages[t] = carried
    p = np.exp(np.float64(steps.log_probs))
    entropy = -(p * np.log(p) + (1 - p) * np.log(1 - p)).mean()
    expected = -advantages.mean() + 0.5 * 0.5 * (advantages**2).mean() - 0.01 * entropy
    assert float(metrics["loss"]) == pytest.approx(expected, rel=1e-4)
    assert float(metrics["approx_kl"]) == pytest.approx(0.0, abs=1e-6)
    assert float(metrics["clip_fraction"]) == 0.0
    np.testing.assert_array_equal(new.params["actor"]["Dense_0"]["kernel"], state.params["actor"]["Dense_0"]["kernel"])


def test_learning_stops_at_the_target_kl(rollout):
    _, state, steps = rollout
    sizes = {**SIZES, "num_epochs": 3, "num_minibatches": 2}

    def gradient_steps(target_kl):
        parts = ppo_parts(WORLD, MODEL, optax.sgd(1.0), target_kl=target_kl, **sizes, **NUMBERS)
        new, metrics = parts.improve(state, steps, steps.rewards, KEY)
        return metrics["gradient_steps"], metrics["approx_kl"], new.params

    targets = (-1.0, 1e-6, 1e6)
    counts, kls, params = jax.jit(jax.vmap(gradient_steps))(jnp.array(targets))
    np.testing.assert_array_equal(counts, [0, 1, 6])
    assert np.isfinite(kls).all()
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a[0] == b).all()), params, state.params))
    assert not jax.tree.all(jax.tree.map(lambda a, b: bool((a[1] == b).all()), params, state.params))


def test_observations_are_normalised_by_all_that_was_seen():
    parts = ppo_parts(WORLD, MODEL, optax.sgd(0.0), normalize_observations=True, normalize_rewards=True, **SIZES)
    state = parts.init(KEY)
    step = jax.jit(lambda s: parts.improve(*(out := parts.collect(s, KEY)), out[1].rewards, KEY)[0])
    steps = jax.jit(parts.collect)(state, KEY)[1]
    state = step(state)
    seen = np.asarray(steps.observations).reshape(-1, 4)
    np.testing.assert_allclose(state.moments.mean, seen.mean(0), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(state.moments.variance, seen.var(0), rtol=1e-3)
    assert float(state.return_scale.moments.count) == 24
    inside = (seen[0] - seen.mean(0)) / np.sqrt(seen.var(0) + 1e-8)
    value = observed(MODEL, state).value(state.params, jnp.asarray(seen[0]))
    np.testing.assert_allclose(value, numpy_mlp(state.params["critic"], inside)[0], rtol=1e-3, atol=1e-4)
    same = update_moments(init_moments((4,)), seen)
    np.testing.assert_allclose(state.moments.variance, same.variance, rtol=1e-4)


def one_state(*, ends):
    """A world of one state that pays 1 a step, and either ends after each or is merely cut off."""
    transition = np.array([[[0.0, 1.0]], [[0.0, 1.0]]]) if ends else np.array([[[1.0, 0.0]], [[0.0, 1.0]]])
    mdp = TabularMDP(transition, np.array([1.0, 0.0]), np.array([False, True]), 0.9)
    return tabular_environment(mdp, np.ones(2), max_steps=None if ends else 1)


@pytest.mark.parametrize(("ends", "value"), [(True, 1.0), (False, 10.0)])
def test_a_time_limit_is_not_the_end(ends, value):
    world = one_state(ends=ends)
    model = actor_critic(world, hidden=(4,))
    algorithm = ppo(world, model, optax.adam(0.03), num_envs=2, num_steps=8, num_minibatches=1, discount=0.9)
    state, _ = jax.jit(lambda key: train(algorithm, key, None, length=300))(KEY)
    assert float(model.value(state.params, jnp.array([1.0, 0.0]))) == pytest.approx(value, rel=0.02)


def test_every_lane_of_a_sweep_learns_the_best_action_in_one_trace():
    """Two actions, paid 0 and 1: the optimum is 1 a step."""
    mdp = TabularMDP(np.ones((1, 2, 1)), np.ones(1), np.zeros(1, bool), 0.5)
    world = tabular_environment(mdp, np.array([[0.0, 1.0]]), max_steps=4)
    model = actor_critic(world, hidden=(4,))
    traces = []

    def run(hyper, key):
        traces.append(1)
        algorithm = ppo(
            world, model, ppo_optimizer(hyper["rate"], anneal_over=160), num_envs=4, num_steps=8, num_epochs=2,
            num_minibatches=2, entropy_coefficient=hyper["entropy"], discount=0.5,
        )  # fmt: skip
        _, metrics = train(algorithm, key, None, length=40)
        return metrics["reward"][-1]

    hypers = {"rate": jnp.array([0.0, 0.05]), "entropy": jnp.array([0.0, 0.001])}
    rewards = sweep(run, hypers, jax.random.split(KEY, 4), mode="vmap")
    assert len(traces) == 1
    assert rewards.shape == (2, 4)
    assert (rewards[0] < 0.8).all()  # rate 0 learns nothing
    assert (rewards[1] > 0.9).all()


def test_an_incentive_pays_instead_of_the_environment():
    twice = reward_function(lambda steps: 2.0 * steps.rewards)
    paying = chain(twice, reward_function(lambda steps: steps.rewards + 1.0))
    _, rewards, metrics = paying.apply(paying.init(KEY), rollout_of_ones(), KEY)
    np.testing.assert_array_equal(rewards, 3.0 * np.ones((2, 3)))
    assert metrics == {}
    named = twice._replace(apply=lambda state, steps, key: (state, steps.rewards, {"cost": jnp.ones(())}))
    with pytest.raises(ValueError, match="'cost'"):
        chain(named, named).apply(((), ()), rollout_of_ones(), KEY)
    algorithm = ppo(WORLD, MODEL, optax.sgd(0.0), incentive=named, **SIZES)
    state, metrics = jax.eval_shape(lambda key: train(algorithm, key, None, length=2), KEY)
    assert metrics["cost"].shape == (2,)
    assert state.incentive == ()


def rollout_of_ones():
    from jaxalign.rl.rollout import Steps

    ones = jnp.ones((2, 3))
    return Steps(ones, ones, ones, ones, ones > 2, ones > 2, ones, {})


def test_a_reward_that_is_no_number_stops_training_by_name(tmp_path):
    def broken(key, state, action):
        step = WORLD.step(key, state, action)
        return step._replace(reward=jnp.where(step.observation[1] > 0.8, jnp.nan, step.reward))

    algorithm = ppo(WORLD.replace(step=broken), MODEL, optax.sgd(0.1), **SIZES)
    with pytest.raises(NonFiniteError, match=r"reward.*the last checkpoint is of step") as caught:
        fit(algorithm, KEY, None, steps=40, chunk=1, checkpoint_every=1, directory=tmp_path, progress=False)
    assert caught.value.step > 0
    healthy = ppo(WORLD, MODEL, optax.sgd(0.1), **SIZES)
    steps = caught.value.step + 1
    state, _ = fit(healthy, KEY, None, steps=steps, directory=tmp_path, resume=True, progress=False)
    assert int(state.step) == steps


def test_what_does_not_fit_is_named():
    with pytest.raises(ValueError, match=r"num_envs=4 x num_steps=6 steps do not split into 5"):
        ppo(WORLD, MODEL, optax.sgd(0.1), **{**SIZES, "num_minibatches": 5})
    with pytest.raises(ValueError, match=r"cartpole: reset gives an observation \(4,\), its space says \(5,\)"):
        ppo(WORLD.replace(observation_space=Box(-1.0, 1.0, (5,))), MODEL, optax.sgd(0.1), **SIZES)
    critic = MODEL._replace(value=lambda params, x: jnp.zeros((*x.shape[:-1], 2)))
    with pytest.raises(ValueError, match=r"the values for one observation of cartpole are \(1, 2\), not \(1,\)"):
        ppo(WORLD, critic, optax.sgd(0.1), **SIZES)


def test_evaluation_is_part_of_a_step_and_has_a_key_of_its_own():
    inner = ppo(WORLD, MODEL, optax.sgd(0.1), **SIZES)
    keys = []

    def evaluation(state, key):
        keys.append(key)
        return {"evaluation/step": state.step.astype(jnp.float32)}

    algorithm = with_evaluation(inner, evaluation, every=3)
    _, metrics = jax.jit(lambda key: train(algorithm, key, None, length=2))(KEY)
    np.testing.assert_array_equal(metrics["evaluation/step"], [3.0, 6.0])
    assert metrics["loss"].shape == (2,)
    with pytest.raises(ValueError, match="'loss'"):
        twice = with_evaluation(inner, lambda state, key: {"loss": state.step}, every=1)
        jax.eval_shape(twice.step, jax.eval_shape(inner.init, KEY), None)


@pytest.mark.slow
def test_cartpole_is_solved():
    from jaxalign.rl.actor_critic import act_with
    from jaxalign.rl.rollout import evaluate
    from jaxalign.statistics import interquartile_mean

    world = cartpole()
    model = actor_critic(world)
    algorithm = ppo(
        world, model, ppo_optimizer(1e-3, anneal_over=580 * 20), num_envs=8, num_steps=32, num_epochs=20,
        num_minibatches=1, gae_lambda=0.8, discount=0.98,
    )  # fmt: skip

    def run(_, key):
        train_key, key = jax.random.split(key)
        state, _ = train(algorithm, train_key, None, length=580)
        return evaluate(key, world, act_with(model, state.params), episodes=32, max_steps=500).returns.mean()

    assert float(interquartile_mean(sweep(run, None, jax.random.split(KEY, 4)))) > 475


def test_the_optimizer_is_the_customary_one():
    """Adam's first step is rate g / (|g| + epsilon), so a tiny gradient shows epsilon and a huge one the clipping."""
    optimizer = ppo_optimizer(0.1, max_gradient_norm=0.5, anneal_over=4)
    params = jnp.array([0.0, 0.0])
    state = optimizer.init(params)
    updates, state = optimizer.update(jnp.array([1e-5, 0.0]), state, params)
    np.testing.assert_allclose(updates, [-0.1 * 1e-5 / 2e-5, 0.0], rtol=1e-4)
    clipped = ppo_optimizer(0.1, max_gradient_norm=3e-5)
    updates, _ = clipped.update(jnp.array([3e3, 4e3]), clipped.init(params), params)
    np.testing.assert_allclose(updates, [-0.1 * 1.8 / 2.8, -0.1 * 2.4 / 3.4], rtol=1e-3)
    for _ in range(3):
        _, state = optimizer.update(jnp.ones(2), state, params)
    updates, _ = optimizer.update(jnp.ones(2), state, params)
    np.testing.assert_allclose(updates, 0.0, atol=1e-7)  # annealed over 4 steps


def test_every_pass_sees_every_step_once():
    """A learner that adds up the rows it is given."""
    from jaxalign import Algorithm
    from jaxalign.rl.ppo import epochs

    learner = Algorithm(None, lambda seen, rows: (seen.at[rows].add(1), {"approx_kl": jnp.zeros(())}))
    seen, metrics = epochs(learner, jnp.zeros(12, jnp.int32), jnp.arange(12), KEY, num_epochs=3, num_minibatches=4)
    np.testing.assert_array_equal(seen, 3)
    assert int(metrics["gradient_steps"]) == 12


def test_advantages_are_normalised_in_the_minibatch():
    from jaxalign.rl.policies import categorical
    from jaxalign.rl.ppo import Batch, surrogate_loss

    zeros = jnp.zeros(4)
    advantages = jnp.array([1.0, 2.0, 3.0, 6.0])
    batch = Batch(zeros, jnp.array([0, 1, 0, 1]), jnp.log(jnp.array([0.5, 0.4, 0.5, 0.5])), zeros, advantages, zeros)
    even = categorical(jnp.zeros((4, 2)))
    for normalize in (True, False):
        a = np.array(advantages, np.float64)
        a = (a - a.mean()) / a.std() if normalize else a
        ratio = np.array([1.0, 1.25, 1.0, 1.0])  # the second above 1.2: clipped where the advantage is positive
        expected = -np.minimum(ratio * a, np.clip(ratio, 0.8, 1.2) * a).mean()
        loss, metrics = surrogate_loss(even, zeros, batch, clip_epsilon=0.2, normalize_advantages=normalize)
        np.testing.assert_allclose([loss, metrics["policy_loss"]], expected, rtol=1e-5)
        assert float(metrics["clip_fraction"]) == 0.25


def test_rewards_are_scaled_by_the_deviation_of_returns():
    from jaxalign.rl.return_scale import init_return_scale, scale_rewards

    rng = np.random.default_rng(0)
    rewards, done = rng.normal(1.0, 3.0, (5, 2)), rng.random((5, 2)) < 0.3
    returns, carried = [], np.zeros(2)
    for reward, end in zip(rewards, done, strict=True):
        carried = reward + 0.9 * carried
        returns.append(carried)
        carried = np.where(end, 0.0, carried)
    scale, found = scale_rewards(init_return_scale(2), jnp.asarray(rewards), jnp.asarray(done), discount=0.9)
    np.testing.assert_allclose(found, rewards / np.std(returns), rtol=1e-4)
    np.testing.assert_allclose(scale.returns, carried, rtol=1e-5)
    _, clipped = scale_rewards(init_return_scale(2), jnp.asarray(rewards), jnp.asarray(done), discount=0.9, clip=0.1)
    assert float(jnp.abs(clipped).max()) == pytest.approx(0.1)
