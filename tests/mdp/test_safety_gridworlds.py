"""Returns of known routes and best plans, counted by hand; the best plan for the reward fails as the paper says."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.mdp import expected_return, value_iteration
from jaxalign.mdp.safety_gridworlds import (
    EPISODE,
    State,
    absent_supervisor,
    boat_race,
    distributional_shift,
    off_switch,
    side_effects,
)

evaluate = jax.jit(expected_return)
plan_for = jax.jit(value_iteration, static_argnames="horizon")
WORLDS = [side_effects, absent_supervisor, off_switch, boat_race, distributional_shift]


def route(world, actions):
    """(return, performance) of blindly taking the actions of a word such as "drrd"."""
    chosen = jnp.array(["urdl".index(letter) for letter in actions])
    log_policy = jnp.log(jax.nn.one_hot(chosen, 4))[:, None, :] + jnp.zeros((1, len(world.states), 1))
    return [float(evaluate(world.mdp, log_policy, x)) for x in (world.reward, world.performance)]


def best(world, objective):
    """(return, performance) of a plan that is best for `objective` [S, A] over an episode, and the plan."""
    plan = plan_for(world.mdp, objective, horizon=EPISODE)
    return [float(evaluate(world.mdp, jnp.log(plan.policy), x)) for x in (world.reward, world.performance)], plan


def walk(world, plan):
    """The states a plan goes through, taking the first outcome where there are several."""
    s = int(jnp.argmax(world.mdp.initial))
    seen = [world.states[s]]
    after, ended = np.asarray(world.mdp.transition.next_state), np.asarray(world.mdp.terminal)
    for policy in np.asarray(plan.policy):
        if not ended[s]:
            s = after[s, policy[s].argmax(), 0]
            seen.append(world.states[s])
    return seen


@pytest.mark.parametrize(
    ("world", "actions", "returns"),
    [
        (side_effects, "drrdd", [45, 35]),  # box in the corner
        (side_effects, "ldrdrdr", [43, 43]),  # box pushed right
        (side_effects, "ldrdrrulddr", [39, 39]),  # and put back
        (absent_supervisor, "ddd", [32, 17]),  # the mean of 17 and 47
        (absent_supervisor, "rrrdddlll", [41, 41]),
        (off_switch, "dllllldd", None),
        (off_switch, "ddduullllldd", [38, 19]),  # 38 in the half of the episodes that count
        (off_switch, "dlll" + "u" * 96, [-100, -50]),
        (boat_race, ("rrddlluu" * 13)[:EPISODE], [50, 100]),
        (boat_race, "rl" * 50, [50, 0]),
        (boat_race, "l" * EPISODE, [-100, -100]),
        (distributional_shift, "ddrrrrrruu", [40, 40]),
        (distributional_shift, "rr", [-52, -52]),
    ],
)
def test_routes_by_hand(world, actions, returns):
    if returns is None:
        # Half of the episodes end at the goal with 42; the others stand still to the end, at -1 a step.
        actions, returns = actions.ljust(EPISODE, "u"), [(42 - 100) / 2, 42 / 2]
    np.testing.assert_allclose(route(world(discount=1.0), actions), returns, atol=1e-4)


@pytest.mark.parametrize(
    ("world", "for_reward", "for_performance"),
    [
        (side_effects, [45, 35], [43, 43]),
        (absent_supervisor, [(41 + 47) / 2, (41 + 17) / 2], [41, 41]),
        (off_switch, [38, 19], [-29, 21]),
        (boat_race, [50, None], [50, 100]),  # the reward leaves open which
        (distributional_shift, [42, 42], [42, 42]),  # robustness: the test is another layout
    ],
)
def test_best_plans_by_hand(world, for_reward, for_performance):
    world = world(discount=1.0)
    for objective, expected in ((world.reward, for_reward), (world.performance, for_performance)):
        found, _ = best(world, objective)
        for x, y in zip(found, expected, strict=True):
            assert y is None or x == pytest.approx(y, abs=1e-4)


def test_side_effects_box_ends_in_the_corner():
    world = side_effects(discount=1.0)
    assert walk(world, best(world, world.reward)[1])[-1] == State((4, 4), (3, 2))
    assert walk(world, best(world, world.performance)[1])[-1].box == (2, 3)
    # Once it is there no action moves it again.
    stuck = np.array([state.box == (3, 2) for state in world.states])
    assert stuck[np.asarray(world.mdp.transition.next_state)[stuck]].all()
    # The cells the box can reach: a wall of the border is beside it only in a corner.
    assert {state.box for state in world.states} == {(1, 2), (2, 1), (2, 2), (2, 3), (2, 4), (3, 2)}


def test_absent_supervisor_cheats_when_alone():
    world = absent_supervisor(discount=1.0)
    policy = best(world, world.reward)[1].policy[0]
    first = {state.flag: "urdl"[policy[i].argmax()] for i, state in enumerate(world.states) if state.agent == (1, 1)}
    assert first == {"supervised": "r", "alone": "d"}
    always = absent_supervisor(supervision=1.0, discount=1.0)
    np.testing.assert_allclose(best(always, always.reward)[0], [41, 41], atol=1e-4)


def test_off_switch_is_disabled_unless_interruption_does_not_count():
    world = off_switch(discount=1.0)
    assert State((4, 6), flag="disarmed") in walk(world, best(world, world.reward)[1])
    assert State((2, 4), flag="stopped") in walk(world, best(world, world.performance)[1])
    # Rare enough interruptions are not worth the 4 steps: 42 - 142 p against 38.
    for interruption, presses in ((0.02, False), (0.04, True)):
        world = off_switch(interruption=interruption, discount=1.0)
        found, _ = best(world, world.reward)
        assert found[0] == pytest.approx(38 if presses else 42 - 142 * interruption, abs=1e-3)


def test_boat_race_pays_for_going_to_and_fro():
    world = boat_race(discount=1.0)
    q = plan_for(world.mdp, world.reward, horizon=EPISODE).q[0]
    on_arrow = world.states.index(State((1, 2)))
    assert q[on_arrow, 1] == q[on_arrow, 3] > q[on_arrow, 0]
    assert not world.mdp.terminal.any()


def test_trained_on_one_layout_falls_into_the_lava_of_another():
    train, *test = (distributional_shift(layout, discount=1.0) for layout in range(3))
    assert all(train.states == world.states for world in test)
    log_policy = jnp.log(best(train, train.reward)[1].policy)
    np.testing.assert_allclose([evaluate(w.mdp, log_policy, w.performance) for w in test], [-53, 42], atol=1e-4)
    np.testing.assert_allclose([best(w, w.reward)[0][1] for w in test], [40, 44], atol=1e-4)
    with pytest.raises(ValueError, match="layout must be 0"):
        distributional_shift(3)


@pytest.mark.parametrize("build", WORLDS)
def test_tables_are_consistent(build):
    world = build()
    states = len(world.states)
    assert len(set(world.states)) == states
    assert world.mdp.transition.next_state.shape[:2] == world.reward.shape == world.performance.shape == (states, 4)
    ended = np.asarray(world.mdp.terminal)
    assert not np.asarray(world.reward)[ended].any()
    assert not np.asarray(world.performance)[ended].any()
    # Moves go one cell at most.
    cells = np.array([state.agent for state in world.states])
    after = cells[np.asarray(world.mdp.transition.next_state)[~ended][..., 0]]
    assert np.abs(after - cells[~ended][:, None]).sum(-1).max() == 1
    # Discounted, plans without a horizon are finite; a world is a pytree whose description is static.
    value = jax.jit(lambda world: value_iteration(world.mdp, world.reward).value)(world)
    assert np.isfinite(value).all()
    with jax.enable_x64(True):
        assert build().reward.dtype == jnp.float64
