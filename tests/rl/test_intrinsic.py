"""Bonuses against hand numbers and NumPy loops; what they must tend to; and a sparse reward that only they find."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy.special import logsumexp

from jaxalign.algorithm import TrainState, train
from jaxalign.environments.protocol import Box, Discrete
from jaxalign.environments.running_moments import RunningMoments
from jaxalign.environments.sparse_reward import deep_sea
from jaxalign.rl.actor_critic import actor_critic
from jaxalign.rl.incentives import Incentive, chain
from jaxalign.rl.intrinsic_curiosity import intrinsic_curiosity
from jaxalign.rl.ppo import ppo, ppo_optimizer
from jaxalign.rl.random_network_distillation import random_network_distillation
from jaxalign.rl.return_scale import init_return_scale
from jaxalign.rl.rollout import Steps
from jaxalign.rl.visit_counts import earlier_equals, simhash, state_actions, visit_counts
from jaxalign.statistics import paired_difference_interval
from jaxalign.sweeps import sweep

T, N, S = 5, 2, 4
BOX, ACTIONS, FORCES = Box(-np.inf, np.inf, (3,)), Discrete(3), Box(-1.0, 1.0, (2,))
ETA, OPTIMIZER = 0.5, optax.adam(1e-2)
COEFFICIENTS = jnp.array([0.0, 0.1, ETA, 2 * ETA])


def some_steps(seed, *, continuous=True, actions=ACTIONS):
    """T steps of N environments, drawn at random; dones among them."""
    rng = np.random.default_rng(seed)
    seen, after = rng.normal(2.0, 3.0, (2, T, N, 3)) if continuous else rng.integers(0, S, (2, T, N))
    done = rng.uniform(size=(T, N)) < 0.3
    if isinstance(actions, Discrete):
        taken = rng.integers(0, actions.size, (T, N))
    else:
        taken = rng.uniform(-1, 1, (T, N, *actions.shape))
    rewards = rng.normal(size=(T, N))
    arrays = (seen, taken, rewards, after, done, np.zeros_like(done), rewards)
    return Steps(*(jnp.asarray(x, np.int32 if x.dtype == int else None) for x in arrays), {})


def arrivals(steps):
    return steps.next_observations


def counts(coefficient=ETA, count_of=arrivals, num_keys=S):
    return visit_counts(count_of, num_keys=num_keys, coefficient=coefficient)


def distillation(coefficient=ETA, **options):
    options = {"num_envs": N, "discount": 0.9, "features": 4, "hidden": (8,), **options}
    return random_network_distillation(BOX, OPTIMIZER, coefficient=coefficient, **options)


def curiosity(coefficient=ETA, actions=ACTIONS, **options):
    options = {"features": 4, "hidden": (8,), **options}
    return intrinsic_curiosity(BOX, actions, OPTIMIZER, coefficient=coefficient, **options)


class Case(NamedTuple):
    name: str
    make: object
    steps: Steps


CASES = {
    "counts": Case("counts", counts, some_steps(0, continuous=False)),
    "distillation": Case("distillation", distillation, some_steps(1)),
    "curiosity": Case("curiosity", curiosity, some_steps(2)),
}


def same(one, other):
    """Whether two pytrees agree to the bit, keys apart."""
    leaves = [x for x in jax.tree.leaves((one, other)) if not jnp.issubdtype(x.dtype, jax.dtypes.prng_key)]
    half = len(leaves) // 2
    return all(np.array_equal(a, b) for a, b in zip(leaves[:half], leaves[half:], strict=True))


@pytest.fixture(scope="module", params=CASES)
def case(request):
    return CASES[request.param]


# Drawing networks and learning take longest to compile, so both are compiled once.


@functools.cache
def start(name):
    """The state before any steps."""
    with jax.ensure_compile_time_eval():  # where it is first asked for inside a traced function
        return jax.jit(CASES[name].make().init)(jax.random.key(0))


@functools.cache
def apply(name):
    return jax.jit(CASES[name].make().apply)


def again(name, steps, times):
    """The last state and the bonuses [times, T, N] when the same steps come over and over."""
    state, bonuses = start(name), []
    for i in range(times):
        state, rewards, metrics = apply(name)(state, steps, jax.random.key(i))
        bonuses.append(np.asarray(rewards) - np.asarray(steps.rewards))
    return state, np.stack(bonuses), metrics


@pytest.fixture(scope="module")
def paid(case):
    """Two rollouts in a scan, paid with four coefficients, vmapped: (bonus paid [4, 2, T, N], state, metrics)."""

    def pay(coefficient):
        incentive = case.make(coefficient)

        def one(state, key):  # scan raises if the state changes its type
            state, rewards, metrics = incentive.apply(state, case.steps, key)
            return state, (rewards, metrics)

        return jax.lax.scan(one, start(case.name), jax.random.split(jax.random.key(1)))

    return jax.jit(jax.vmap(pay))(COEFFICIENTS)


# ---- every bonus


def test_coefficients_scale_the_bonus_and_0_leaves_the_rewards_to_the_bit(case, paid):
    state, (rewards, metrics) = paid
    state = jax.tree.map(lambda x: x[2], state)
    assert rewards.shape == (4, 2, T, N)
    np.testing.assert_array_equal(rewards[0], np.stack([case.steps.rewards] * 2))
    bonus = np.asarray(rewards) - np.asarray(case.steps.rewards)
    assert (bonus[2] > 0).all()
    np.testing.assert_allclose(bonus[3], 2 * bonus[2], rtol=1e-4, atol=1e-5)
    assert not same(state, start(case.name))
    assert not [x for x in jax.tree.leaves(jax.eval_shape(case.make().init, jax.random.key(0))) if x.weak_type]
    assert all(name.startswith("intrinsic/") and np.isfinite(x).all() for name, x in metrics.items())
    # The metric is the mean of what was paid, before the coefficient, whatever that is.
    (mean,) = (x for name, x in metrics.items() if name.endswith("bonus"))
    np.testing.assert_allclose(mean, np.stack([bonus[2].mean((1, 2)) / ETA] * 4), rtol=1e-4)


def test_double_precision_alone_agrees_with_single_in_scan_and_vmap(case, paid):
    _, (rewards, _) = paid
    with jax.enable_x64(True):
        incentive, key = case.make(), jax.random.split(jax.random.key(1))[0]
        wide = jax.eval_shape(incentive.init, key)
        state = jax.tree.map(lambda x, to: x if x.dtype == to.dtype else x.astype(to.dtype), start(case.name), wide)
        steps = jax.tree.map(lambda x: x.astype(np.float64) if x.dtype == np.float32 else x, case.steps)
        state, double, _ = jax.jit(incentive.apply)(state, steps, key)
        assert double.dtype == np.float64
        assert jax.tree.map(lambda x: x.dtype, wide) == jax.tree.map(lambda x: x.dtype, state)
        np.testing.assert_allclose(double, np.asarray(rewards[2, 0]), rtol=1e-4, atol=1e-5)


def test_several_go_together():
    """Each adds its bonus to what the one before it left."""
    add = lambda bonus: Incentive(lambda key: (), lambda state, steps, key: (state, steps.rewards + bonus, {}))  # noqa: E731
    incentive, steps = chain(add(1.0), counts(1.0)), CASES["counts"].steps
    _, rewards, metrics = incentive.apply(((), start("counts")), steps, jax.random.key(1))
    np.testing.assert_allclose(rewards.mean(), steps.rewards.mean() + 1 + metrics["intrinsic/count_bonus"], rtol=1e-5)


# ---- counts


def test_counts_by_hand():
    """The second environment's first visit comes after the first's; the rollout after begins where this one ended."""
    keys = jnp.array([[2, 2], [0, 2]])
    steps = Steps(None, None, jnp.ones((2, 2)), keys, None, None, None, {})
    incentive = counts(1.0)
    table, rewards, metrics = incentive.apply(incentive.init(jax.random.key(0)), steps, jax.random.key(0))
    np.testing.assert_allclose(rewards, 1 + np.array([[1, 2**-0.5], [1, 3**-0.5]]), rtol=1e-6)
    assert table.tolist() == [1, 0, 3, 0]
    assert metrics["intrinsic/visited"] == 0.5
    np.testing.assert_allclose(incentive.bonus(table, jnp.array([1, 2, 4, -1])), [1, 0.5, np.nan, np.nan], rtol=1e-6)
    _, rewards, _ = incentive.apply(table, steps, jax.random.key(0))
    np.testing.assert_allclose(rewards, 1 + np.array([[4**-0.5, 5**-0.5], [2**-0.5, 6**-0.5]]), rtol=1e-6)


def test_counts_follow_a_loop_over_time_and_environments():
    seen, incentive = {}, counts(count_of=state_actions(3), num_keys=3 * S)
    apply, table = jax.jit(incentive.apply), incentive.init(jax.random.key(0))
    for seed in range(4):
        steps = some_steps(seed, continuous=False)
        expected = np.array(steps.rewards, np.float64)
        for t in range(T):
            for n in range(N):
                visited = int(steps.observations[t, n]), int(steps.actions[t, n])
                seen[visited] = seen.get(visited, 0) + 1
                expected[t, n] += ETA / np.sqrt(seen[visited])
        table, rewards, _ = apply(table, steps, jax.random.key(0))
        np.testing.assert_allclose(rewards, expected, rtol=1e-6)
    assert {divmod(k, 3): n for k, n in enumerate(table.tolist()) if n} == seen


def test_earlier_equals_counts_pairs():
    keys = np.random.default_rng(0).integers(-2, 5, 50)
    assert earlier_equals(jnp.asarray(keys)).tolist() == [int((keys[:i] == k).sum()) for i, k in enumerate(keys)]


def test_a_key_outside_the_table_is_paid_nan_and_counted_nowhere():
    steps = Steps(None, None, jnp.zeros((1, 3)), jnp.array([[-1, S, 1]]), None, None, None, {})
    table, rewards, _ = counts().apply(jnp.zeros(S, jnp.int32), steps, jax.random.key(0))
    assert np.isnan(rewards).tolist() == [[True, True, False]]
    assert table.tolist() == [0, 1, 0, 0]
    with pytest.raises(ValueError, match=r"visit_counts: count_of must give int \(1, 3\), got float32"):
        counts(count_of=lambda steps: steps.rewards).apply(table, steps, jax.random.key(0))


def test_simhash_tells_directions_apart():
    code = simhash(jax.random.key(0), (2, 3), bits=20)
    x, y = np.random.default_rng(1).normal(size=(2, 400, 2, 3)).astype(np.float32)
    codes = np.asarray(jax.jit(code)(x))
    assert codes.dtype == np.int32
    assert ((codes >= 0) & (codes < 2**20)).all()
    assert len(set(codes.tolist())) > 300
    assert np.array_equal(codes, code(3 * x))
    assert np.array_equal(codes, jax.vmap(code)(x))
    assert np.array_equal(codes.astype(np.int64) + code(-x), np.full(400, 2**20 - 1))
    # Bits agree with probability 1 - angle / pi, Tang et al.'s (and Charikar's) property.
    agree = 1 - np.unpackbits((codes ^ np.asarray(code(x + y))).view(np.uint8)).sum() / (20 * 400)
    flat = (a.reshape(400, -1) for a in (x, x + y))
    cosine = np.prod([a / np.linalg.norm(a, axis=1, keepdims=True) for a in flat], axis=0).sum(1)
    np.testing.assert_allclose(agree, 1 - np.arccos(cosine).mean() / np.pi, atol=0.05)
    with pytest.raises(ValueError, match=r"observations must be \[\.\.\., \*\(2, 3\)\], got \(4, 6\)"):
        code(jnp.zeros((4, 6)))
    with pytest.raises(ValueError, match="bits must be in 1"):
        simhash(jax.random.key(0), (2,), bits=25)


# ---- random network distillation


def mlp(params, x):
    """The network in NumPy, float64."""
    layers = [params[f"Dense_{i}"] for i in range(len(params))]
    for layer in layers[:-1]:
        x = np.maximum(x @ np.float64(layer["kernel"]) + np.float64(layer["bias"]), 0)
    return x @ np.float64(layers[-1]["kernel"]) + np.float64(layers[-1]["bias"])


def test_distillation_follows_a_loop_in_numpy():
    """Two rollouts: all observations so far normalise, the return of the errors runs on through the dones."""
    incentive = distillation()
    state, seen, returns, carried = start("distillation"), [], [], np.zeros(N)
    for seed in (1, 2):
        steps = some_steps(seed)
        assert steps.done.any()
        after = np.float64(steps.next_observations)
        seen.append(after.reshape(-1, 3))
        past = np.concatenate(seen)
        x = np.clip((after - past.mean(0)) / past.std(0), -5, 5)
        error = ((mlp(state.predictor.params, x) - mlp(state.target, x)) ** 2).mean(-1)
        for t in range(T):
            carried = error[t] + 0.9 * carried
            returns.extend(carried)
        new, rewards, metrics = apply("distillation")(state, steps, jax.random.key(3))
        np.testing.assert_allclose(rewards - steps.rewards, ETA * error / np.std(returns), rtol=1e-3, atol=1e-5)
        np.testing.assert_allclose(metrics["intrinsic/rnd_loss"], error.mean(), rtol=1e-4)
        asked = incentive.bonus(state.replace(moments=new.moments, scale=new.scale), steps.next_observations)
        np.testing.assert_allclose(ETA * asked, rewards - steps.rewards, rtol=1e-4, atol=1e-6)
        assert same(new.target, start("distillation").target)
        assert not same(new.predictor, state.predictor)
        state = new


def test_what_is_seen_often_is_no_longer_new_to_distillation():
    incentive, steps = distillation(), some_steps(1)
    state, paid, _ = again("distillation", steps, 600)
    assert paid[-1].mean() < 0.01 * paid[0].mean()
    new, old = incentive.bonus(state, -steps.next_observations), incentive.bonus(state, steps.next_observations)
    assert new.mean() > 10 * old.mean()
    assert same(state.target, start("distillation").target)


def test_the_predictor_learns_from_a_share_of_the_steps():
    """Here from one step or none, so the loss is its error or 0, and where it is 0 nothing moves."""
    first = jax.tree.map(lambda x: x[:1, :1], some_steps(1))

    def after(update_proportion, key):
        incentive = distillation(update_proportion=update_proportion, num_envs=1)
        state = start("distillation").replace(
            predictor=start("distillation").predictor.replace(key=key),
            moments=RunningMoments(jnp.array(1e6), jnp.zeros(3), jnp.ones(3)),
            scale=init_return_scale(1),
        )
        state, _, metrics = incentive.apply(state, first, key)
        return state.predictor.params, metrics["intrinsic/rnd_loss"]

    shares = jnp.array([0.0, 0.25, 1.0])
    over = jax.vmap(jax.vmap(after, in_axes=(None, 0)), in_axes=(0, None))
    params, losses = jax.jit(over)(shares, jax.random.split(jax.random.key(1), 400))
    error = losses[2, 0]
    np.testing.assert_allclose(losses[2], error, rtol=1e-5)
    np.testing.assert_allclose((losses > 0).mean(1), shares, atol=0.08)
    np.testing.assert_allclose(losses[losses > 0], error, rtol=1e-5)
    leaves = (jax.tree.leaves(x) for x in (params, start("distillation").predictor.params))
    for leaf, before in zip(*leaves, strict=True):
        moved = (np.asarray(leaf) != np.asarray(before)).reshape(3, 400, -1).any(-1)
        assert not (moved & (np.asarray(losses) == 0)).any()


def test_distillation_names_the_wrong_number_of_environments():
    incentive = distillation(num_envs=3)
    with pytest.raises(ValueError, match=r"num_envs=3, the steps are \(5, 2\)"):
        incentive.apply(start("distillation"), some_steps(1), jax.random.key(1))


# ---- intrinsic curiosity


def test_curiosity_follows_numpy():
    steps, state = some_steps(2), start("curiosity")
    _, rewards, metrics = apply("curiosity")(state, steps, jax.random.key(1))
    params = state.params
    before, after = (mlp(params["features"], np.float64(x)) for x in (steps.observations, steps.next_observations))
    told, taken = mlp(params["inverse"], np.concatenate([before, after], -1)), np.eye(3)[np.asarray(steps.actions)]
    inverse = logsumexp(told, axis=-1) - (told * taken).sum(-1)
    forward = ((mlp(params["forward"], np.concatenate([before, taken], -1)) - after) ** 2).sum(-1) / 2
    np.testing.assert_allclose(rewards - steps.rewards, ETA * forward, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(metrics["intrinsic/inverse_loss"], inverse.mean(), rtol=1e-4)
    np.testing.assert_allclose(metrics["intrinsic/forward_loss"], forward.mean(), rtol=1e-4)
    asked = curiosity().bonus(state, (steps.observations, steps.actions, steps.next_observations))
    np.testing.assert_allclose(asked, forward, rtol=1e-3, atol=1e-4)


def test_curiosity_by_hand():
    """Networks of zeros: every action is as likely (log 3 nats); a forward bias of 1 in 4 features is off by 4 / 2."""
    steps, state = some_steps(2), start("curiosity")
    params = jax.tree.map(jnp.zeros_like, state.params)
    params["forward"]["Dense_1"]["bias"] = jnp.ones(4)
    _, rewards, metrics = apply("curiosity")(state.replace(params=params), steps, jax.random.key(1))
    np.testing.assert_allclose(rewards, steps.rewards + ETA * 2.0, rtol=1e-6)
    np.testing.assert_allclose(metrics["intrinsic/inverse_loss"], np.log(3), rtol=1e-6)


def test_beta_weighs_the_two_losses():
    """At 0 the forward model learns nothing, at 1 the inverse model; the features learn from both."""
    old = start("curiosity").params

    def after(beta):
        return curiosity(beta=beta).apply(start("curiosity"), some_steps(2), jax.random.key(1))[0].params

    both = jax.jit(jax.vmap(after))(jnp.arange(2.0))
    for i, (still, learns) in enumerate((("forward", "inverse"), ("inverse", "forward"))):
        new = jax.tree.map(lambda x, i=i: x[i], both)
        assert same(new[still], old[still])
        assert not same(new[learns], old[learns])
        assert not same(new["features"], old["features"])


def test_curiosity_takes_real_actions():
    """Forward and inverse model against NumPy: a squared error tells the action, which enters as it is."""
    incentive, steps = curiosity(actions=FORCES), some_steps(3, actions=FORCES)
    sizes = jax.eval_shape(incentive.init, jax.random.key(0)).params
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape) / 3, x.dtype), sizes)
    state = TrainState(jnp.zeros((), jnp.int32), params, OPTIMIZER.init(params), jax.random.key(0))
    _, rewards, metrics = jax.jit(incentive.apply)(state, steps, jax.random.key(1))
    before, after = (mlp(params["features"], np.float64(x)) for x in (steps.observations, steps.next_observations))
    inverse = ((mlp(params["inverse"], np.concatenate([before, after], -1)) - steps.actions) ** 2).sum(-1) / 2
    forward = ((mlp(params["forward"], np.concatenate([before, steps.actions], -1)) - after) ** 2).sum(-1) / 2
    np.testing.assert_allclose(rewards - steps.rewards, ETA * forward, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(metrics["intrinsic/inverse_loss"], inverse.mean(), rtol=1e-4)


def test_curiosity_learns_what_actions_do():
    """Each action moves along its own axis: which it was becomes certain, where it led foreseen."""
    steps = some_steps(2)
    steps = steps._replace(next_observations=steps.observations + 3 * jax.nn.one_hot(steps.actions, 3))
    _, paid, metrics = again("curiosity", steps, 600)
    assert metrics["intrinsic/inverse_loss"] < 0.05
    assert paid[-1].mean() < 0.05 * paid[0].mean()


# ---- a reward that only the curious find


def returns_in_deep_sea(coefficients, key, *, size, num_envs, num_rollouts, hidden):
    """Episodes' mean return in the last tenth of PPO paid coefficients [1 or 3] times counts, RND and ICM."""
    world_key, train_key = jax.random.split(key)
    world = deep_sea(size, right=jax.random.bernoulli(world_key, shape=(size, size)))

    def cell_and_action(steps):
        return 2 * jnp.argmax(steps.observations.reshape(*steps.rewards.shape, -1), axis=-1) + steps.actions

    incentive = visit_counts(cell_and_action, num_keys=2 * size**2, coefficient=coefficients[0])
    if len(coefficients) > 1:
        spaces = world.observation_space, world.action_space
        incentive = chain(
            incentive,
            random_network_distillation(spaces[0], optax.adam(3e-3), num_envs=num_envs, coefficient=coefficients[1]),
            intrinsic_curiosity(*spaces, optax.adam(3e-3), coefficient=coefficients[2]),
        )
    algorithm = ppo(
        world, actor_critic(world, hidden=hidden), ppo_optimizer(1e-3), incentive=incentive,
        num_envs=num_envs, num_steps=2 * size, num_minibatches=1,
    )  # fmt: skip
    _, metrics = train(algorithm, train_key, None, length=num_rollouts)
    return jnp.mean(metrics["episode/return"][-num_rollouts // 10 :])


@pytest.mark.slow
def test_counts_find_what_plain_ppo_does_not():
    run = functools.partial(returns_in_deep_sea, size=9, num_envs=4, num_rollouts=100, hidden=(32,))
    plain, counted = np.asarray(sweep(run, jnp.array([[0.0], [0.1]]), jax.random.split(jax.random.key(0), 6)))
    assert (counted > 0.5).all()
    assert (plain > 0.5).sum() <= 2


@pytest.mark.slow
def test_each_bonus_finds_what_plain_ppo_does_not():
    run = functools.partial(returns_in_deep_sea, size=12, num_envs=16, num_rollouts=250, hidden=(64,))
    coefficients = jnp.array([[0.0, 0.0, 0.0], [0.1, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 0.3]])
    plain, *curious = np.asarray(sweep(run, coefficients, jax.random.split(jax.random.key(0), 8)))
    assert (plain > 0.9).sum() <= 1
    for found in curious:
        assert (found > 0.9).sum() >= 7
        low, _ = paired_difference_interval(jax.random.key(1), found, plain)
        assert low > 0.5
