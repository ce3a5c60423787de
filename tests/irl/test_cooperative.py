"""Assistance games against enumeration of every robot plan, a paper's example, a POMDP solved by hand, and
simulation."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from jaxalign.irl.alpha_vectors import undominated
from jaxalign.irl.assistance import (
    AssistanceGame,
    PedagogicHuman,
    best_node,
    boltzmann_choice,
    human_response,
    literal_human,
    posterior,
    simulate_assistance,
)
from jaxalign.irl.assistance_solvers import reachable_beliefs, solve_assistance, subset_beliefs


def random_game(seed, states=2, terminal=(False, False), hypotheses=3, discount=0.9):
    rng = np.random.default_rng(seed)
    transition = rng.dirichlet(np.ones(states), (states, 2, 2))
    reward = rng.normal(size=(hypotheses, states, 2, 2))
    prior, initial = rng.dirichlet(np.ones(hypotheses)), rng.dirichlet(np.ones(states))
    return AssistanceGame(transition, reward, prior, initial, np.array(terminal), discount)


def best_by_enumeration(game, horizon, human=None):
    """The best value over every deterministic robot plan, written as a function of (s_0, h_0, s_1, h_1, ...)."""
    transition, reward, prior, initial, terminal, discount = (
        np.asarray(x, np.float64).tolist()
        for x in (game.transition, game.reward, game.prior, game.initial, game.terminal, game.discount)
    )
    states, human_actions, robot_actions, _ = game.transition.shape
    alive = [s for s in range(states) if not terminal[s]]
    histories = []
    for steps in range(horizon):
        for first in alive:
            for rest in itertools.product(itertools.product(range(human_actions), alive), repeat=steps):
                histories.append((first, *itertools.chain(*rest)))

    def worth(k, history, plan):
        s = history[-1]
        if terminal[s] or len(history) > 2 * horizon:
            return 0.0
        a = plan[history]
        q = [
            reward[k][s][h][a]
            + discount * sum(transition[s][h][a][z] * worth(k, (*history, h, z), plan) for z in range(states))
            for h in range(human_actions)
        ]
        return max(q) if human is None else sum(p * x for p, x in zip(human[k, s], q, strict=True))

    values = []
    for actions in itertools.product(range(robot_actions), repeat=len(histories)):
        plan = dict(zip(histories, actions, strict=True))
        values.append(
            sum(p * i * worth(k, (s,), plan) for k, p in enumerate(prior) for s, i in enumerate(initial))
        )
    return max(values)


SMALL = [({}, 2), ({"states": 1, "terminal": (False,)}, 3), ({"terminal": (False, True)}, 3)]


@pytest.mark.parametrize(("options", "horizon"), SMALL)
@pytest.mark.parametrize("seed", [0, 1])
def test_exact_values_equal_those_of_the_best_enumerated_plan(options, horizon, seed):
    game = random_game(seed, **options)
    human = np.asarray(boltzmann_choice(game.reward.mean(-1), beta=2.0))
    np.testing.assert_allclose(
        solve_assistance(game, horizon=horizon).value, best_by_enumeration(game, horizon), rtol=1e-5, atol=1e-6
    )
    best_response = best_by_enumeration(game, horizon, human)
    exact = solve_assistance(game, horizon=horizon, human=human)
    np.testing.assert_allclose(exact.value, best_response, rtol=1e-5, atol=1e-6)
    point_based = jax.jit(
        lambda game, human: solve_assistance(
            game, horizon=horizon, human=human, beliefs=reachable_beliefs(game, human, horizon=horizon)
        )
    )(game, human)
    np.testing.assert_allclose(point_based.value, best_response, rtol=1e-5, atol=1e-6)


def test_point_based_plans_are_lower_bounds_and_reach_the_optimum():
    for seed in range(3):
        game = random_game(10 + seed)
        exact = solve_assistance(game, horizon=3, max_vectors=20_000).value
        one = solve_assistance(game, horizon=3, beliefs=game.prior[None]).value
        many = solve_assistance(game, horizon=3, beliefs=subset_beliefs(game.prior), starts=16).value
        assert one <= many + 1e-5
        assert many <= exact + 1e-5
        np.testing.assert_allclose(many, exact, rtol=1e-3)


def paperclips(num=92):
    """Hadfield-Menell et al. (2016): the human makes (paperclips, staples) (0, 2), (1, 1) or (2, 0), then the robot
    (0, 90), (50, 50) or (90, 0); a paperclip is worth theta and a staple 1 - theta, theta uniform in [0, 1].

    States: the human's turn, the robot's turn, over. The thresholds derived below are edges of the `num` = 92 cells.
    """
    theta = (np.arange(num) + 0.5) / num
    worth = np.stack([theta, 1.0 - theta])
    transition = np.zeros((3, 3, 3, 3))
    transition[0, ..., 1] = transition[1:, ..., 2] = 1.0
    reward = np.zeros((num, 3, 3, 3))
    reward[:, 0] = (np.array([[0, 2], [1, 1], [2, 0]]) @ worth).T[:, :, None]
    reward[:, 1] = (np.array([[0, 90], [50, 50], [90, 0]]) @ worth).T[:, None, :]
    prior = np.full(num, 1.0 / num)
    return theta, AssistanceGame(transition, reward, prior, [1.0, 0.0, 0.0], np.array([False, False, True]), 1.0)


def test_paperclips_and_staples():
    theta, game = paperclips()
    # An expert makes (0, 2) below 1/2 and (2, 0) above; the robot copies: 92 max(theta, 1 - theta), on average 69.
    expert = literal_human(game, beta=jnp.inf)
    np.testing.assert_array_equal(jnp.argmax(expert[:, 0], -1), np.where(theta < 0.5, 0, 2))
    np.testing.assert_allclose(solve_assistance(game, horizon=2, human=expert).value, 69.0, rtol=1e-5)
    # Knowing that (1, 1) is answered by (50, 50), it is best where 51 > 92 max(theta, 1 - theta), between
    # 41/92 and 51/92.
    plan = solve_assistance(game, horizon=2)
    chosen = jnp.argmax(plan.human_policy[0, 0, plan.start[0]], -1)
    middle = (theta > 41 / 92) & (theta < 51 / 92)
    np.testing.assert_array_equal(chosen, np.where(middle, 1, np.where(theta < 0.5, 0, 2)))
    best = np.where(middle, 51.0, 92.0 * np.maximum(theta, 1.0 - theta)).mean()
    np.testing.assert_allclose(plan.value, best, rtol=1e-5)
    assert best > 69.27
    # A robot that reads a noisy literal human, and a human who knows how it reads, reach the same.
    noisy = literal_human(game, beta=2.0)
    naive = solve_assistance(game, horizon=2, human=noisy)
    assert naive.value < 69.0
    np.testing.assert_allclose(human_response(game, naive, PedagogicHuman()).value, best, rtol=1e-5)


def tiger(horizon):
    """Kaelbling et al. (1998), ending with the first door opened: listening costs 1 and tells the side with 0.85; the
    doors pay 10 and -100.
    """
    transition = np.zeros((2, 2, 3, 2))
    transition[0, :, 0] = [1.0, 0.0]
    transition[0, :, 1:] = transition[1] = [0.0, 1.0]
    reward = np.zeros((2, 2, 2, 3))
    reward[:, 0] = np.array([[-1.0, -100.0, 10.0], [-1.0, 10.0, -100.0]])[:, None, :]
    game = AssistanceGame(transition, reward, [0.5, 0.5], [1.0, 0.0], np.array([False, True]), 1.0)
    growls = np.array([[0.85, 0.15], [0.15, 0.85]])[:, None, :].repeat(2, axis=1)
    return solve_assistance(game, horizon=horizon, human=growls), game, growls


def test_tiger_by_hand():
    # Three steps: listen twice; if both agree (0.745) open the other door, else (0.255) listen again.
    expected = -2.0 + 0.85**2 * 10.0 - 0.15**2 * 100.0 - 2 * 0.85 * 0.15
    np.testing.assert_allclose([tiger(h)[0].value for h in (1, 2, 3)], [-1.0, -2.0, expected], rtol=1e-6)
    plan, game, growls = tiger(3)
    beliefs = reachable_beliefs(game, growls, horizon=3)
    by_points = solve_assistance(game, horizon=3, human=growls, beliefs=beliefs)
    np.testing.assert_allclose(by_points.value, expected, rtol=1e-5)
    for belief, action in (([0.5, 0.5], 0), ([0.999, 0.001], 2), ([0.001, 0.999], 1)):
        assert best_node(plan, 0, 0, jnp.array(belief))[1] == action
    np.testing.assert_allclose(best_node(plan, 0, 0, jnp.array([0.5, 0.5]))[2], plan.value, rtol=1e-6)


def test_idle_actions_become_a_code():
    # The human's action pays nothing; the robot then guesses the hypothesis. Only a human who plans can say which it
    # is.
    transition = np.zeros((3, 2, 2, 3))
    transition[0, ..., 1] = transition[1:, ..., 2] = 1.0
    reward = np.zeros((2, 3, 2, 2))
    reward[:, 1] = np.eye(2)[:, None, :]
    game = AssistanceGame(transition, reward, [0.6, 0.4], [1.0, 0.0, 0.0], np.array([False, False, True]), 1.0)
    literal = literal_human(game, beta=5.0)
    np.testing.assert_allclose(literal, 0.5, rtol=1e-6)
    np.testing.assert_allclose(solve_assistance(game, horizon=2, human=literal).value, 0.6, rtol=1e-6)
    np.testing.assert_allclose(solve_assistance(game, horizon=2).value, 1.0, rtol=1e-6)
    np.testing.assert_allclose(solve_assistance(game, horizon=2, beliefs=subset_beliefs(game.prior)).value, 1.0,
    rtol=1e-6)


@pytest.mark.parametrize("beta", [0.5, 3.0])
def test_planning_together_is_worth_no_less_than_a_literal_human(beta):
    game = random_game(4)
    human = literal_human(game, beta=beta)
    plan = solve_assistance(game, horizon=2, human=human)
    informed = human_response(game, plan, PedagogicHuman())
    together = solve_assistance(game, horizon=2)
    assert plan.value < informed.value <= together.value + 1e-5


def test_the_graph_of_a_plan_is_worth_what_it_says():
    game = random_game(5)
    human = literal_human(game, beta=2.0)
    beliefs = reachable_beliefs(game, human, horizon=3)
    plan = solve_assistance(game, horizon=3, human=human, beliefs=beliefs)
    again = human_response(game, plan, human)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6), again, plan)
    pedagogic = PedagogicHuman(beta=1.5)
    plan = solve_assistance(game, horizon=3, human=pedagogic, beliefs=subset_beliefs(game.prior))
    again = human_response(game, plan, pedagogic)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5), again, plan)


def test_limits_of_the_pedagogic_human():
    game = random_game(6)
    beliefs = subset_beliefs(game.prior)
    value = jax.jit(lambda beta: solve_assistance(game, horizon=2, human=PedagogicHuman(beta), beliefs=beliefs).value)
    uniform = jnp.full(game.reward.shape[:3], 0.5)
    np.testing.assert_allclose(value(0.0), solve_assistance(game, horizon=2, human=uniform).value, rtol=1e-5)
    np.testing.assert_allclose(value(1e4), value(jnp.inf), rtol=1e-3)
    assert value(0.0) < value(2.0) < value(jnp.inf)


def test_simulated_returns_and_beliefs():
    game = random_game(7, terminal=(False, True), discount=1.0)
    game = game.replace(transition=0.5 * game.transition + 0.5 * jnp.array([1.0, 0.0])[None, None, None])
    plan = solve_assistance(game, horizon=3, human=literal_human(game.replace(discount=0.9), beta=2.0))
    episodes = jax.jit(lambda key: simulate_assistance(key, game, plan, num=4000))(jax.random.key(0))
    returns = np.asarray(episodes.rewards.sum(1))
    assert abs(returns.mean() - plan.value) < 4.0 * returns.std() / np.sqrt(returns.size)
    assert not episodes.mask.all()
    assert (episodes.states[episodes.mask] == 0).all()
    # Calibration: among episodes the belief in what is true is, on average, the mean of the belief squared.
    belief = np.asarray(episodes.beliefs[:, -1])
    truth = np.eye(3)[np.asarray(episodes.hypothesis)]
    np.testing.assert_allclose((belief * truth).sum(1).mean(), (belief**2).sum(1).mean(), atol=0.02)


def test_literal_human_and_posterior_by_hand():
    game = random_game(8, states=1, terminal=(False,), discount=0.0)
    reward = np.asarray(game.reward, np.float64)[:, 0]
    robot = jnp.array([[0.25, 0.75]])
    q = reward @ np.array([0.25, 0.75])
    expected = np.exp(1.5 * q) / np.exp(1.5 * q).sum(-1, keepdims=True)
    human = literal_human(game, beta=1.5, robot_policy=robot)
    np.testing.assert_allclose(human[:, 0], expected, rtol=1e-5)
    np.testing.assert_allclose(literal_human(game, beta=0.0), 0.5)
    after = posterior(jnp.array([0.5, 0.5]), jnp.array([[0.9, 0.1], [0.3, 0.7]]), 0)
    np.testing.assert_allclose(after, [0.75, 0.25], rtol=1e-6)
    np.testing.assert_allclose(posterior(jnp.array([1.0, 0.0]), jnp.array([[1.0, 0.0], [0.0, 1.0]]), 1), [1.0, 0.0])


def test_beliefs():
    game, human = random_game(9), jnp.array([[0.8, 0.2], [0.5, 0.5], [0.1, 0.9]])[:, None] * jnp.ones((1, 2, 1))
    found = np.asarray(reachable_beliefs(game, human, horizon=3))
    twice = np.asarray(game.prior) * np.array([0.8, 0.5, 0.1]) * np.array([0.2, 0.5, 0.9])
    for belief in (game.prior, twice / twice.sum()):
        assert np.abs(found - np.asarray(belief)).sum(1).min() < 1e-5
    np.testing.assert_allclose(found.sum(1), 1.0, rtol=1e-5)
    np.testing.assert_allclose(
        subset_beliefs(jnp.array([0.2, 0.3, 0.5]))[jnp.array([0, 2, 6])], [[1, 0, 0], [0.4, 0.6, 0], [0.2, 0.3, 0.5]],
        rtol=1e-6
    )


def test_pruning_keeps_what_is_best_somewhere():
    alpha = np.array([[1.0, 0.0], [0.0, 1.0], [0.4, 0.4], [0.6, 0.6], [0.9, -1.0], [1.0, 0.0]])
    np.testing.assert_array_equal(undominated(alpha), [0, 1, 3])  # [2] is under [3], [4] under [0], [5] is [0] again
    np.testing.assert_array_equal(undominated(np.array([[1.0, 0.0], [0.0, 1.0], [0.5, 0.5]])), [0, 1])
    rng = np.random.default_rng(0)
    alpha, beliefs = rng.normal(size=(40, 3)), rng.dirichlet(np.ones(3), 5000)
    winners = np.unique((beliefs @ alpha.T).argmax(1))
    assert set(winners) <= set(undominated(alpha))
    np.testing.assert_allclose((beliefs @ alpha[undominated(alpha)].T).max(1), (beliefs @ alpha.T).max(1))


def test_jit_vmap_and_gradients_in_float64():
    with jax.enable_x64(True):
        game = random_game(11)

        @jax.jit
        def value(reward, beta):
            changed = game.replace(reward=reward)
            human = boltzmann_choice(reward.mean(-1), beta=beta)
            beliefs = jax.lax.stop_gradient(reachable_beliefs(changed, human, horizon=2))
            return solve_assistance(changed, horizon=2, human=human, beliefs=beliefs).value

        assert value(game.reward, 2.0).dtype == jnp.float64
        check_grads(value, (game.reward, 2.0), order=1, modes=["rev"], atol=1e-5, rtol=1e-5)
        betas = jnp.array([0.0, 1.0, 4.0])
        lanes = jax.vmap(value, in_axes=(None, 0))(game.reward, betas)
        np.testing.assert_allclose(lanes, [value(game.reward, beta) for beta in betas], rtol=1e-12)
        exact = [
            solve_assistance(game, horizon=2, human=boltzmann_choice(game.reward.mean(-1), beta=beta)).value
            for beta in betas
        ]
        np.testing.assert_allclose(lanes, exact, rtol=1e-7)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"transition": np.ones((2, 2, 2))}, "transition must be"),
        ({"transition": np.full((2, 2, 2, 2), 0.4)}, r"transition\[0, 0, 0\] does not sum to 1: 0.8"),
        ({"reward": np.zeros((3, 2, 2))}, "reward must be"),
        ({"reward": np.full((3, 2, 2, 2), np.nan)}, "reward is not finite"),
        ({"prior": [1.2, -0.2, 0.0]}, r"prior\[1\] is negative"),
        ({"initial": [1.0]}, "initial must be"),
        ({"terminal": np.zeros(2)}, "terminal must be bool"),
        ({"discount": 1.5}, "discount must be in"),
    ],
)
def test_a_bad_game_is_named(change, message):
    with pytest.raises(ValueError, match=message):
        random_game(0).replace(**change)


def test_bad_questions_are_named():
    game = random_game(0)
    with pytest.raises(ValueError, match="human: a fixed policy must be"):
        solve_assistance(game, horizon=2, human=jnp.ones((3, 2)))
    with pytest.raises(ValueError, match=r"human\[0, 0\] does not sum to 1: 2.0"):
        solve_assistance(game, horizon=2, human=jnp.ones((3, 2, 2)))
    with pytest.raises(ValueError, match="horizon must be at least 1"):
        solve_assistance(game, horizon=0)
    with pytest.raises(ValueError, match="beliefs must be"):
        solve_assistance(game, horizon=2, beliefs=jnp.ones((1, 2)))
    with pytest.raises(ValueError, match="is finite; give `beliefs`"):
        solve_assistance(game, horizon=2, human=PedagogicHuman(beta=1.0))
    with pytest.raises(ValueError, match="beta must be at least 0"):
        solve_assistance(game, horizon=2, human=PedagogicHuman(beta=-1.0))
    with pytest.raises(ValueError, match="needs concrete arrays"):
        jax.jit(lambda game: solve_assistance(game, horizon=2).value)(game)
    with pytest.raises(ValueError, match="more than max_vectors=3"):
        solve_assistance(game, horizon=3, max_vectors=3)
    with pytest.raises(ValueError, match="robot_policy must be"):
        literal_human(game, beta=1.0, robot_policy=jnp.ones((1, 2)))
    with pytest.raises(ValueError, match="at most 12"):
        subset_beliefs(jnp.full(13, 1 / 13))
