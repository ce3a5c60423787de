"""PPO for language models: each token is an action, the KL to a reference is part of its reward, values are learned."""

from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax

from jaxalign.algorithm import Algorithm, LanguageModel, Network, TrainState, map_parts, merge
from jaxalign.rl.advantages import generalized_advantage_estimation
from jaxalign.rl.kl import KLController
from jaxalign.rl.masking import masked_whiten
from jaxalign.rlhf.group_methods import check_split
from jaxalign.rlhf.language_rollout import (
    Prompts,
    Rollout,
    language_rollout,
    only_policy,
    rollout_metrics,
    with_reward,
)
from jaxalign.rlhf.token_learner import learn, token_learner, token_values
from jaxalign.rlhf.token_steps import TokenSteps, token_mean, token_scores
from jaxalign.types import Array, ArrayLike, Key, Metrics, Params


@flax.struct.dataclass
class LanguagePPOState(TrainState):
    """A TrainState with params {"policy", "value", "reward"}, whose `step` counts rollouts.

    kl_coefficient: scalar, what a nat of KL costs now
    """

    kl_coefficient: Array | None = None


def ppo_lm(
    model: LanguageModel,
    optimizer: optax.GradientTransformation,
    reward: Network,
    *,
    max_new_tokens: int,
    kl_coefficient: ArrayLike = 0.05,
    kl_controller: KLController | None = None,
    missing_stop_penalty: ArrayLike = 0.0,
    discount: ArrayLike = 1.0,
    gae_lambda: ArrayLike = 0.95,
    clip_epsilon: ArrayLike = 0.2,
    value_clip_epsilon: ArrayLike | None = 0.2,
    value_coefficient: ArrayLike = 0.1,
    whiten_rewards: bool = False,
    samples: int = 1,
    temperature: ArrayLike = 1.0,
    num_epochs: int = 4,
    num_minibatches: int = 1,
    microbatches: int = 1,
    trainable: Callable[[str], bool] | None = None,
    chunk_size: int = 256,
    **generation: Any,
) -> Algorithm:
    """PPO on completions: a step completes B prompts, pays the tokens by `token_rewards`, and improves the policy.

    Advantages are GAE's, whitened over all tokens; values are a linear head on the policy's hidden states.

    Args:
        model, reward, trainable, microbatches, generation: as in `grpo`; the value head always learns.
        kl_coefficient: nats' price in the reward, fixed; or `kl_controller`, `adaptive_kl(initial, target, horizon)`,
            which steers the KL of a completion towards its target.
        missing_stop_penalty: taken from the score of a completion that was cut off.
        whiten_rewards: scale token rewards to deviation 1, mean kept.

    Batches: Prompts [B, P]. State: LanguagePPOState. Metrics: of `token_objective`, of `rollout_metrics`, and
    "objective/kl_coefficient", "value/explained_variance".
    Ziegler et al., arXiv:1909.08593; Stiennon et al., arXiv:2009.01325; details after Huang et al. 2024.
    """
    inner = with_reward(model, reward)
    network = Network(lambda key: {**inner.init(key), "value": value_head(model)}, inner.apply)
    learner = token_learner(
        model, network, optimizer, trainable=only_policy(trainable), microbatches=microbatches, temperature=temperature,
        clip_epsilon=clip_epsilon, value_coefficient=value_coefficient, value_clip_epsilon=value_clip_epsilon,
        chunk_size=chunk_size,
    )  # fmt: skip

    def init(key: Key) -> LanguagePPOState:
        state = learner.init(key)
        start = jnp.asarray(kl_coefficient, jnp.float32) if kl_controller is None else kl_controller.init()
        return LanguagePPOState(
            state.step, state.params, state.opt_state, state.key, state.frozen,
            reference=jax.tree.map(jnp.copy, state.params), kl_coefficient=start,
        )  # fmt: skip

    def step(state: LanguagePPOState, prompts: Prompts) -> tuple[LanguagePPOState, Metrics]:
        rows = prompts.tokens.shape[0] * samples
        check_split(rows, num_minibatches, microbatches)
        key, act_key, learn_key, order_key = jax.random.split(state.key, 4)
        rollout = language_rollout(
            act_key, model, reward, state.all_params, merge(state.reference, state.frozen), prompts,
            samples=samples, max_new_tokens=max_new_tokens, temperature=temperature, chunk_size=chunk_size,
            microbatches=num_minibatches * microbatches, **generation,
        )  # fmt: skip
        steps = ppo_token_steps(
            model, state.all_params, rollout, kl_coefficient=state.kl_coefficient, discount=discount,
            missing_stop_penalty=missing_stop_penalty, gae_lambda=gae_lambda, whiten_rewards=whiten_rewards,
            temperature=temperature, microbatches=num_minibatches * microbatches,
        )  # fmt: skip
        new, metrics = learn(
            learner, state.replace(key=learn_key), steps, order_key,
            num_epochs=num_epochs, num_minibatches=num_minibatches,
        )  # fmt: skip
        found = rollout_metrics(rollout)
        coefficient = state.kl_coefficient
        if kl_controller is not None:
            coefficient = kl_controller.step(coefficient, found["objective/kl"], rows)
        metrics |= found | {
            "objective/kl_coefficient": state.kl_coefficient,
            "value/explained_variance": explained(steps),
        }
        return new.replace(key=key, kl_coefficient=coefficient), metrics

    return Algorithm(init, step)


def value_head(model: LanguageModel) -> Params:
    """A value head of zeros for the model's hidden size D: {"kernel" [D], "bias" []}."""
    size = jax.eval_shape(lambda key: model.unembedding(model.init(key)), jax.random.key(0)).shape[1]
    return {"kernel": jnp.zeros(size), "bias": jnp.zeros(())}


def token_rewards(
    scores: ArrayLike, log_ratio: ArrayLike, mask: ArrayLike, *, kl_coefficient: ArrayLike
) -> Array:
    """rewards[n, t] = -kl_coefficient log_ratio[n, t] on completion tokens, plus scores[n] on the last of them; [N, T].

    Args:
        scores: [N], of whole completions.
        log_ratio: [N, T], log p_policy - log p_reference of the tokens, nats.
        mask: [N, T], the completion tokens; elsewhere the reward is 0. A row without any is paid nothing.

    Ziegler et al., arXiv:1909.08593 eq. 2, token by token.
    """
    mask = jnp.asarray(mask) != 0
    return jnp.where(mask, -kl_coefficient * jnp.asarray(log_ratio), 0.0) + last(mask) * jnp.asarray(scores)[:, None]


def last(mask: Array) -> Array:
    """The last of each run of marked positions in mask[N, T] bool, [N, T]."""
    return mask & ~jnp.pad(mask[:, 1:], ((0, 0), (0, 1)))


def ppo_token_steps(
    model: LanguageModel,
    params: Params,
    rollout: Rollout,
    *,
    kl_coefficient: ArrayLike,
    missing_stop_penalty: ArrayLike = 0.0,
    discount: ArrayLike = 1.0,
    gae_lambda: ArrayLike = 0.95,
    whiten_rewards: bool = False,
    temperature: ArrayLike = 1.0,
    microbatches: int = 1,
) -> TokenSteps:
    """A Rollout [N, T] judged: rewards of tokens, values, GAE. The last token of a completion is terminal."""
    completions, mask = rollout.completions, rollout.completions.mask

    def value(rows: tuple[Array, Array]) -> Array:
        hidden = token_scores(model, params["policy"], *rows, temperature=temperature).hidden
        return token_values(params["value"], hidden)

    values = jnp.where(mask, map_parts(value, (completions.tokens, mask), microbatches), 0.0)
    scores = rollout.scores - jnp.where(completions.ended, 0.0, missing_stop_penalty)
    log_ratio = completions.log_probs - rollout.reference_log_probs
    rewards = token_rewards(scores, log_ratio, mask, kl_coefficient=kl_coefficient)
    if whiten_rewards:
        rewards = masked_whiten(rewards, mask, shift_mean=False)
    end = last(mask)
    next_values = jnp.pad(values[:, 1:], ((0, 0), (0, 1)))
    over_time = (x.T for x in (rewards, values, next_values, end, end))
    advantages, targets = generalized_advantage_estimation(
        *over_time, discount=discount, gae_lambda=gae_lambda, mask=mask.T
    )
    weights, share = token_mean(mask)
    return TokenSteps(
        completions.tokens, mask, completions.log_probs, masked_whiten(advantages.T, mask), weights, share,
        rollout.reference_log_probs, values, targets.T,
    )  # fmt: skip


def explained(steps: TokenSteps) -> Array:
    """1 - var(targets - values) / var(targets) over the chosen tokens of [N, T]."""
    count = jnp.maximum(jnp.sum(steps.mask), 1)

    def variance(x: Array) -> Array:
        x = jnp.where(steps.mask, x, 0.0)
        return jnp.sum(jnp.where(steps.mask, jnp.square(x - jnp.sum(x) / count), 0.0)) / count

    return 1.0 - variance(steps.targets - steps.values) / (variance(steps.targets) + 1e-8)
