"""PPO on tokens: rewards and advantages by hand, and the closed form of KL-penalised reward as the known answer."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from online_problem import MODEL, PROMPTS, REWARD, STOP, WORDS

import jaxalign
from jaxalign.rl.kl import adaptive_kl
from jaxalign.rlhf.generation import Completions
from jaxalign.rlhf.language_ppo import explained, last, ppo_lm, ppo_token_steps, token_rewards, value_head
from jaxalign.rlhf.language_rollout import Prompts, Rollout, reward_of

START = jax.jit(MODEL.init)
MASK = jnp.array([[0, 1, 1, 1], [0, 0, 1, 0]]) != 0


def test_token_rewards_by_hand():
    log_ratio = jnp.array([[9.0, 0.1, 0.2, 0.3], [9.0, 9.0, -0.4, 9.0]])
    found = token_rewards(jnp.array([1.0, -2.0]), log_ratio, MASK, kl_coefficient=0.5)
    np.testing.assert_allclose(found, [[0, -0.05, -0.1, 0.85], [0, 0, -1.8, 0]], atol=1e-6)


def test_the_last_token_is_found_and_an_empty_row_has_none():
    np.testing.assert_array_equal(last(MASK), [[0, 0, 0, 1], [0, 0, 1, 0]])
    assert not last(jnp.zeros((2, 3), bool)).any()


def test_advantages_of_tokens_by_numpy():
    """Values come from the head, GAE runs over the completion alone, the last token is terminal."""
    tokens = jnp.array([[1, 2, 3, 4], [5, 6, 1, 0]])
    rng = np.random.default_rng(0)
    head = {"kernel": jnp.asarray(rng.normal(size=8), jnp.float32), "bias": jnp.float32(0.2)}
    params = {"policy": START(jax.random.key(0)), "value": head}
    log_probs = jnp.where(MASK, -1.0, 0.0)
    completions = Completions(tokens, MASK, log_probs, jnp.array([False, True]))
    rollout = Rollout(PROMPTS, completions, jnp.array([1.0, 2.0]), jnp.where(MASK, -1.3, 0.0))

    @jax.jit
    def judge(params):
        return ppo_token_steps(
            MODEL, params, rollout, kl_coefficient=0.1, missing_stop_penalty=0.5, discount=0.9, gae_lambda=0.8
        )

    steps = judge(params)
    hidden = np.asarray(MODEL.hidden(params["policy"], tokens), np.float64)
    values = hidden @ np.asarray(params["value"]["kernel"], np.float64) + 0.2
    targets, advantages = {}, {}
    for row, places, score in ((0, [1, 2, 3], 1.0 - 0.5), (1, [2], 2.0)):
        trace = 0.0
        for t in reversed(places):
            final = t == places[-1]
            reward = -0.1 * 0.3 + (score if final else 0.0)
            following = 0.0 if final else values[row, t]  # the value of the state before token t + 1
            trace = reward + 0.9 * following - values[row, t - 1] + 0.9 * 0.8 * (0.0 if final else trace)
            advantages[row, t], targets[row, t] = trace, trace + values[row, t - 1]
    raw = np.array(list(advantages.values()))
    for place, expected in targets.items():
        assert float(steps.targets[place]) == pytest.approx(expected, abs=1e-5)
        whitened = (advantages[place] - raw.mean()) / np.sqrt(raw.var(ddof=1) + 1e-8)
        assert float(steps.advantages[place]) == pytest.approx(whitened, abs=1e-4)
    assert not np.asarray(jnp.where(MASK, 0.0, steps.advantages)).any()


def test_a_value_head_of_zeros_explains_nothing():
    head = value_head(MODEL)
    assert head["kernel"].shape == (8,)
    params = {"policy": START(jax.random.key(0)), "value": head}
    tokens = jnp.array([[1, 2, 3, 4], [5, 6, 1, 0]])
    completions = Completions(tokens, MASK, jnp.zeros(MASK.shape), jnp.array([True, True]))
    rollout = Rollout(PROMPTS, completions, jnp.array([1.0, 2.0]), jnp.zeros(MASK.shape))
    steps = jax.jit(lambda p: ppo_token_steps(MODEL, p, rollout, kl_coefficient=0.0, gae_lambda=1.0))(params)
    np.testing.assert_allclose(steps.targets[MASK], [1, 1, 1, 2], atol=1e-6)  # the score is the return of every token
    assert float(explained(steps)) == pytest.approx(0.0, abs=1e-5)


def test_the_optimum_is_the_reference_tilted_by_the_reward():
    """Of completions of one token, p* = p_reference exp(reward / kl_coefficient) / Z maximises reward - price * KL."""
    price, worth = 0.5, jnp.array([0.0, 1.0, -1.0, 0.5, 0.0, 0.0, 0.0])

    def reward(prompts, completions):
        return worth[completions.tokens[:, 1]]

    algorithm = ppo_lm(
        MODEL, optax.adam(2e-2), reward_of(reward), samples=64, max_new_tokens=1, kl_coefficient=price, num_epochs=2,
    )  # fmt: skip
    prompts = Prompts(jnp.array([[2]]), jnp.array([1]))
    batches = jax.tree.map(lambda x: jnp.stack([x] * 80), prompts)
    state, _ = jax.jit(lambda key: jaxalign.train(algorithm, key, batches))(jax.random.key(3))

    def probabilities(params):
        return jax.nn.softmax(MODEL.apply(params["policy"], jnp.array([[2]]))[0, 0])

    start = jnp.log(probabilities(state.reference))
    wanted = jax.nn.softmax(start + worth / price)
    found = probabilities(state.params)
    assert float(jnp.abs(wanted - jnp.exp(start)).max()) > 0.3  # far from where it began
    np.testing.assert_allclose(found, wanted, atol=0.08)


@pytest.mark.slow
def test_it_learns_what_is_paid_and_steers_the_kl():
    controller = adaptive_kl(initial=0.05, target=1.0, horizon=200)
    algorithm = ppo_lm(
        MODEL, optax.adam(3e-2), REWARD, samples=8, max_new_tokens=4, stop_ids=(STOP,), kl_controller=controller,
        num_epochs=2, num_minibatches=2, microbatches=2, whiten_rewards=True,
    )  # fmt: skip
    batches = jax.tree.map(lambda x: jnp.stack([x] * 40), PROMPTS)
    state, metrics = jax.jit(lambda key: jaxalign.train(algorithm, key, batches))(jax.random.key(0))
    scores, kl, price = (np.asarray(metrics[f"objective/{n}"]) for n in ("scores", "kl", "kl_coefficient"))
    assert scores[-5:].mean() > scores[:5].mean() + 0.3
    assert price[0] == pytest.approx(0.05)
    rises = kl[:-1] > 1.0
    assert (price[1:][rises] > price[:-1][rises]).all()
    assert (price[1:][~rises] < price[:-1][~rises]).all()
    assert int(state.step) == 40
    assert MODEL.unembedding(state.all_params["policy"]).shape[0] == WORDS
