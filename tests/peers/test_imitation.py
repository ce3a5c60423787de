"""Maximum causal entropy IRL against imitation 1.0's `mce_irl` on its own random MDPs, and two defects of that module.

Where it is right: soft values and policies at any discount, the visits of a given policy before each step, and, at
discount 1, the reward fitted to demonstrations that the reward's features can explain. Where it is not:

1. `mce_occupancy_measures` plans without passing its discount on, so the visits that `MCEIRL` trains on are those of
   the policy for discount 1, only weighted by the discount afterwards; the policy it returns in the end is planned at
   the discount asked for. A reward trained at a discount below 1 is therefore the answer to neither problem.
2. Its visits sum over H + 1 states, that after the last action included, while its soft values earn H rewards. What it
   descends is no likelihood's gradient. Where the demonstrations can be matched exactly both vanish together; where
   they cannot, it stops at a reward that explains the demonstrations less well.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxalign
from jaxalign.irl import evaluate_reward, linear_reward, max_causal_entropy_irl, population_causal_entropy_nll
from jaxalign.mdp import TabularMDP, occupancy_measure, soft_value_iteration

torch = pytest.importorskip("torch")
mce_irl = pytest.importorskip("imitation.algorithms.mce_irl")
reward_nets = pytest.importorskip("imitation.rewards.reward_nets")
random_trans = pytest.importorskip("seals.diagnostics.random_trans")

pytestmark = pytest.mark.peer

STATES, ACTIONS, FEATURES, HORIZON, STEPS, LEARNING_RATE = 12, 3, 4, 8, 500, 0.05


@pytest.fixture(params=[0, 1])
def env(request):
    """One of imitation's random MDPs, whose reward is linear in random features of the state."""
    env = random_trans.RandomTransitionEnv(
        n_states=STATES, n_actions=ACTIONS, branch_factor=4, horizon=HORIZON, random_obs=True, obs_dim=FEATURES,
        generator_seed=request.param,
    )  # fmt: skip
    env.observation_matrix /= 2.0
    env.reward_matrix = env.observation_matrix @ env.reward_weights
    return env


def as_mdp(env, discount):
    return TabularMDP(env.transition_matrix, env.initial_state_dist, np.zeros(STATES, bool), discount)


def expert(env, discount):
    """The soft-optimal policy [H, S, A], and Pr(s_t = s) under it, [H + 1, S]."""
    _, _, policy = mce_irl.mce_partition_fh(env, discount=discount)
    before, _ = mce_irl.mce_occupancy_measures(env, pi=policy)
    return policy, before


def discounting(discount, length):
    return discount ** np.arange(length)[:, None]


def fit_theirs(env, demonstrations, *, discount, weights=None, steps=STEPS):
    """imitation's MCEIRL on a linear reward: (the trained algorithm, the visits of its last iteration)."""
    torch.manual_seed(0)
    network = reward_nets.BasicRewardNet(
        env.observation_space, env.action_space, hid_sizes=(), use_state=True, use_action=False
    )
    weight, bias = network.parameters()
    with torch.no_grad():
        weight[:] = torch.as_tensor(np.zeros(FEATURES) if weights is None else weights)
        bias[:] = 0.0
    learner = mce_irl.MCEIRL(
        demonstrations, env, network, np.random.default_rng(0), optimizer_kwargs={"lr": LEARNING_RATE},
        discount=discount, linf_eps=0.0, grad_l2_eps=0.0, log_interval=None,
    )  # fmt: skip
    return learner, learner.train(max_iter=steps)


def fit_ours(env, occupancy, *, discount):
    """Our reward for visits [H, S, A], and its policy [H, S, A]."""
    mdp, features = as_mdp(env, discount), jnp.asarray(env.observation_matrix)
    network = linear_reward(FEATURES)
    algorithm = max_causal_entropy_irl(
        mdp, network, optax.adam(LEARNING_RATE), jnp.asarray(occupancy), features=features, horizon=HORIZON
    )
    state, _ = jax.jit(lambda key: jaxalign.train(algorithm, key, None, length=STEPS))(jax.random.key(0))
    reward = evaluate_reward(network, state.params, features)
    return reward, np.exp(soft_value_iteration(mdp, reward, horizon=HORIZON).log_policy)


@pytest.mark.parametrize("discount", [1.0, 0.6])
def test_soft_values_and_policies_agree_at_any_discount(env, discount):
    value, q, policy = mce_irl.mce_partition_fh(env, discount=discount)
    with jax.enable_x64(True):
        plan = soft_value_iteration(as_mdp(env, discount), env.reward_matrix, horizon=HORIZON)
        np.testing.assert_allclose(plan.value[:-1], value, rtol=1e-12)
        np.testing.assert_allclose(plan.q, q, rtol=1e-11, atol=1e-13)
        np.testing.assert_allclose(np.exp(plan.log_policy), policy, rtol=1e-11)


@pytest.mark.parametrize("discount", [1.0, 0.6])
def test_visits_of_a_given_policy_agree_up_to_the_last_action(env, discount):
    policy, before = expert(env, 1.0)
    with jax.enable_x64(True):
        ours = occupancy_measure(as_mdp(env, discount), jnp.log(policy))
        theirs = (discounting(discount, HORIZON) * before[:-1]).sum(axis=0)
        np.testing.assert_allclose(ours.sum(axis=-1), theirs, rtol=1e-6)  # its transition rows are rounded to float32


def test_fits_agree_where_the_features_can_explain_the_demonstrations(env):
    policy, before = expert(env, 1.0)
    learner, visits = fit_theirs(env, before.sum(axis=0), discount=1.0)
    _, ours = fit_ours(env, before[:-1, :, None] * policy, discount=1.0)
    np.testing.assert_allclose(visits, before.sum(axis=0), atol=1e-3)
    np.testing.assert_allclose(ours, policy, atol=1e-3)
    np.testing.assert_allclose(ours, learner.policy.pi, atol=1e-3)
    our_visits = occupancy_measure(as_mdp(env, 1.0), jnp.log(ours)).sum(axis=-1)
    np.testing.assert_allclose(our_visits, before[:-1].sum(axis=0), atol=1e-3)


def test_defect_its_visits_at_a_discount_are_those_of_the_undiscounted_policy(env):
    discount = 0.6
    asked, _ = mce_irl.mce_occupancy_measures(env, discount=discount)
    undiscounted, _ = mce_irl.mce_occupancy_measures(env, discount=1.0)
    right = expert(env, discount)[1]
    np.testing.assert_array_equal(asked, undiscounted)
    assert np.abs(asked - right).max() > 0.01
    ours = soft_value_iteration(as_mdp(env, discount), env.reward_matrix, horizon=HORIZON)
    visits = occupancy_measure(as_mdp(env, discount), ours.log_policy).sum(axis=-1)
    np.testing.assert_allclose(visits, (discounting(discount, HORIZON) * right[:-1]).sum(axis=0), rtol=1e-4)


def test_defect_at_a_discount_its_fit_leaves_the_true_reward_and_misses_the_expert(env):
    discount = 0.6
    policy, before = expert(env, discount)
    demonstrations = (discounting(discount, HORIZON + 1) * before).sum(axis=0)  # counted its way: one defect at a time
    _, at_truth = fit_theirs(env, demonstrations, discount=discount, weights=env.reward_weights, steps=1)
    assert np.abs(at_truth - demonstrations).max() > 0.05  # the expert's own reward is no solution
    learner, _ = fit_theirs(env, demonstrations, discount=discount)
    theirs = np.abs(learner.policy.pi - policy).max()
    occupancy = discounting(discount, HORIZON)[:, :, None] * before[:-1, :, None] * policy
    ours = np.abs(fit_ours(env, occupancy, discount=discount)[1] - policy).max()
    assert ours < 1e-3
    assert theirs > 0.05


def test_defect_its_visits_are_not_the_gradient_of_its_own_soft_value(env):
    before, visits = mce_irl.mce_occupancy_measures(env)
    assert visits.sum() == pytest.approx(HORIZON + 1)
    step = 1e-5

    def start(reward):
        return env.initial_state_dist @ mce_irl.mce_partition_fh(env, reward=reward)[0][0]

    slopes = [
        (start(env.reward_matrix + bump) - start(env.reward_matrix - bump)) / (2.0 * step)
        for bump in step * np.eye(STATES)
    ]
    np.testing.assert_allclose(slopes, visits - before[-1], atol=1e-6)  # nothing is earned after the last action
    mdp = as_mdp(env, 1.0)
    ours = jax.grad(lambda r: mdp.initial @ soft_value_iteration(mdp, r, horizon=HORIZON).value[0])
    np.testing.assert_allclose(ours(jnp.asarray(env.reward_matrix, jnp.float32)), slopes, atol=1e-5)


def test_defect_where_the_features_cannot_explain_the_demonstrations_its_fit_is_less_likely(env):
    # An expert who cares about each state on its own, and a reward of four features that cannot say so.
    env.reward_matrix = np.random.default_rng(2).normal(0.0, 2.0, STATES)
    policy, before = expert(env, 1.0)
    occupancy = jnp.asarray(before[:-1, :, None] * policy)
    learner, _ = fit_theirs(env, before.sum(axis=0), discount=1.0)
    with torch.no_grad():
        theirs = learner.reward_net(torch.as_tensor(env.observation_matrix), None, None, None).numpy()
    ours, _ = fit_ours(env, occupancy, discount=1.0)
    nll = [population_causal_entropy_nll(r, as_mdp(env, 1.0), occupancy, horizon=HORIZON) for r in (ours, theirs)]
    assert nll[1] - nll[0] > 5e-4  # nats; float32 resolves 1e-6 of them
