"""Policy gradients of groups: completions of one prompt measured against each other. No value function."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxalign.algorithm import Algorithm, LanguageModel, Network, TrainState, merge
from jaxalign.rl.group_relative import grpo_advantages, rloo_advantages
from jaxalign.rlhf.language_rollout import (
    Prompts,
    Rollout,
    language_rollout,
    only_policy,
    rollout_metrics,
    with_reward,
)
from jaxalign.rlhf.token_learner import LEAST_SHARE, learn, token_learner
from jaxalign.rlhf.token_steps import (
    TokenSteps,
    constant_length,
    sequence_mean,
    sequence_ratio,
    token_mean,
    token_ratio,
)
from jaxalign.types import Array, ArrayLike, Key, Metrics

Aggregation = Callable[[Array], tuple[Array, Array]]


def grpo(
    model: LanguageModel,
    optimizer: optax.GradientTransformation,
    reward: Network,
    *,
    samples: int,
    max_new_tokens: int,
    advantages: Callable[[Array], Array] = grpo_advantages,
    aggregation: Aggregation = sequence_mean,
    clip_epsilon: ArrayLike = 0.2,
    clip_epsilon_high: ArrayLike | None = None,
    ratio: Callable[[Array, Array, Array | None], Array] = token_ratio,
    kl_coefficient: ArrayLike = 0.04,
    kl_reward_coefficient: ArrayLike = 0.0,
    skip_uniform_groups: bool = False,
    temperature: ArrayLike = 1.0,
    num_epochs: int = 1,
    num_minibatches: int = 1,
    microbatches: int = 1,
    trainable: Callable[[str], bool] | None = None,
    chunk_size: int = 256,
    **generation: Any,
) -> Algorithm:
    """Group relative policy optimisation: a step completes B prompts G times each, and learns from who did better.

    With A = advantages(scores [B, G]) for every token of a completion, it descends num_epochs * num_minibatches times
    on sum weights [ppo_policy_loss(A) + kl_coefficient kl_k3(log p - log p_reference)] / sum share.

    Args:
        model: `pretrained.network.starting_from(pretrained.params)`, say; the reference is what its `init` gives.
        reward: a reward network, `apply(params, prompts, completions) -> [N]`; `reward_of(function)` makes one.
        samples: G >= 2 completions per prompt.
        advantages: [B, G] -> [B, G]. `rloo`, `dr_grpo` and `dapo` are this function with others' choices.
        aggregation: mask [N, T] -> (weights, share).
        ratio: as in `token_objective`.
        kl_reward_coefficient: price of a nat of KL in the score of a completion, beside that in the loss.
        skip_uniform_groups: leave out prompts whose completions were all paid alike, whose advantages are 0, so that
            they do not thin out the mean (DAPO samples others in their place, for which static shapes have no room).
        num_minibatches: parts of the N = B G rows, each a gradient step.
        microbatches: parts of a minibatch whose activations are in memory one at a time.
        trainable: which of the model's parameters learn, such as `is_adapter`.
        generation: stop_ids, pad_id, top_k, top_p, min_p of `generate`.

    Batches: Prompts [B, P]. State: TrainState with params {"policy": ..., "reward": ...}, the reward's frozen.
    Metrics: those of `token_objective` averaged over the gradient steps, of `rollout_metrics`, and "group/uniform", the
    share of prompts that taught nothing. A NaN reward makes "objective/scores" NaN, on which `runtime.fit` stops.
    Raises ValueError naming the sizes if rows do not split. Shao et al., arXiv:2402.03300.
    """
    network = with_reward(model, reward)
    learner = token_learner(
        model, network, optimizer, trainable=only_policy(trainable), microbatches=microbatches, temperature=temperature,
        clip_epsilon=clip_epsilon, clip_epsilon_high=clip_epsilon_high, kl_coefficient=kl_coefficient,
        ratio=ratio, chunk_size=chunk_size,
    )  # fmt: skip

    def init(key: Key) -> TrainState:
        state = learner.init(key)
        return state.replace(reference=jax.tree.map(jnp.copy, state.params))

    def step(state: TrainState, prompts: Prompts) -> tuple[TrainState, Metrics]:
        rows = prompts.tokens.shape[0] * samples
        check_split(rows, num_minibatches, microbatches)
        key, act_key, learn_key, order_key = jax.random.split(state.key, 4)
        rollout = language_rollout(
            act_key, model, reward, state.all_params, merge(state.reference, state.frozen), prompts,
            samples=samples, max_new_tokens=max_new_tokens, temperature=temperature, chunk_size=chunk_size,
            microbatches=num_minibatches * microbatches, **generation,
        )  # fmt: skip
        steps, uniform = group_steps(
            rollout, samples=samples, advantages=advantages, aggregation=aggregation,
            kl_reward_coefficient=kl_reward_coefficient, skip_uniform=skip_uniform_groups,
        )  # fmt: skip
        new, metrics = learn(
            learner, state.replace(key=learn_key), steps, order_key,
            num_epochs=num_epochs, num_minibatches=num_minibatches,
        )  # fmt: skip
        return new.replace(key=key), {**metrics, **rollout_metrics(rollout), "group/uniform": uniform}

    return Algorithm(init, step)


def rloo(*arguments: Any, kl_coefficient: ArrayLike = 0.05, **options: Any) -> Algorithm:
    """REINFORCE leave-one-out: `grpo` with `rloo_advantages`, each completion one action, the KL price in its score.

    With one gradient step per rollout the ratio is 1, and the gradient is REINFORCE's on the log-probability of whole
    completions [N]. Ahmadian et al., arXiv:2402.14740 eq. 7.
    """
    chosen = {"advantages": rloo_advantages, "ratio": sequence_ratio, **options}
    return grpo(*arguments, kl_coefficient=0.0, kl_reward_coefficient=kl_coefficient, **chosen)


def dr_grpo(*arguments: Any, max_new_tokens: int, kl_coefficient: ArrayLike = 0.0, **options: Any) -> Algorithm:
    """Dr. GRPO: `grpo` with advantages [B, G] not divided by their deviation, and sums over tokens divided by
    `max_new_tokens` whatever the completion's length, so that neither easy prompts nor long failures weigh more.

    Liu et al., arXiv:2503.20783.
    """
    return grpo(
        *arguments, max_new_tokens=max_new_tokens, kl_coefficient=kl_coefficient,
        advantages=functools.partial(grpo_advantages, scale=False),
        aggregation=functools.partial(constant_length, length=max_new_tokens), **options,
    )  # fmt: skip


def dapo(*arguments: Any, kl_coefficient: ArrayLike = 0.0, **options: Any) -> Algorithm:
    """DAPO: `grpo` with the upper clip at 0.28, the mean over all tokens [N, T], uniform groups left out, no penalty.

    `overlong_penalty` is its soft bound on length. Yu et al., arXiv:2503.14476.
    """
    chosen = {"clip_epsilon_high": 0.28, "skip_uniform_groups": True, "aggregation": token_mean, **options}
    return grpo(*arguments, kl_coefficient=kl_coefficient, **chosen)


def overlong_penalty(lengths: ArrayLike, *, limit: ArrayLike, margin: ArrayLike) -> Array:
    """What DAPO adds to the reward of completions of lengths [N]: 0 up to limit - margin, falling to -1 at `limit`.

    penalty = clip((limit - margin - lengths) / margin, -1, 0).  Yu et al., arXiv:2503.14476 eq. 13.

    >>> overlong_penalty(jnp.array([10, 18, 20, 30]), limit=20, margin=4).tolist()
    [0.0, -0.5, -1.0, -1.0]
    """
    return jnp.clip((limit - margin - jnp.asarray(lengths)) / margin, -1.0, 0.0)


def group_steps(
    rollout: Rollout, *, samples: int, advantages: Callable[[Array], Array], aggregation: Aggregation,
    kl_reward_coefficient: ArrayLike = 0.0, skip_uniform: bool = False,
) -> tuple[TokenSteps, Array]:  # fmt: skip
    """A Rollout of N = B * samples rows as TokenSteps [N, T], and the share of groups with equal scores, a scalar."""
    completions = rollout.completions
    log_ratio = jnp.where(completions.mask, completions.log_probs - rollout.reference_log_probs, 0.0)
    scores = rollout.scores.reshape(-1, samples)
    uniform = jnp.all(scores == scores[:, :1], axis=1)
    weights, share = aggregation(completions.mask)
    if skip_uniform:
        kept = jnp.repeat(~uniform, samples)[:, None]
        weights = weights * kept * (jnp.sum(share) / jnp.maximum(jnp.sum(share * kept), LEAST_SHARE))
    price = kl_reward_coefficient * jnp.sum(log_ratio, axis=1).reshape(scores.shape)
    per_row = advantages(scores - price).reshape(-1, 1)
    steps = TokenSteps(
        completions.tokens, completions.mask, completions.log_probs, per_row * completions.mask,
        weights.astype(jnp.float32), share.astype(jnp.float32), rollout.reference_log_probs,
    )  # fmt: skip
    return steps, jnp.mean(uniform, dtype=jnp.float32)


def check_split(rows: int, num_minibatches: int, microbatches: int) -> None:
    """Raise ValueError unless a batch of `rows` rows [rows, ...] splits into minibatches of equal microbatches."""
    if rows % (num_minibatches * microbatches):
        raise ValueError(
            f"{rows} completions do not split into {num_minibatches} minibatches of {microbatches} microbatches"
        )
