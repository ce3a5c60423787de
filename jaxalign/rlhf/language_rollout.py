"""Acting with a language model: completions of prompts, what they are paid, and what a reference thinks of them."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxalign.algorithm import LanguageModel, Network, map_parts
from jaxalign.rl.masking import masked_mean
from jaxalign.rlhf.generation import Completions, generate
from jaxalign.rlhf.token_steps import token_scores
from jaxalign.types import Array, ArrayLike, Key, Metrics, Params


class Prompts(NamedTuple):
    """B prompts.

    tokens: [B, P] int32, right-padded
    lengths: [B] int32, 1 .. P
    index: [B] int32, which prompt of the data set each is, for rewards that look its answer up; or None
    """

    tokens: Array
    lengths: Array
    index: Array | None = None


class Rollout(NamedTuple):
    """N = B * samples completions, row b * samples + i the i-th of prompt b.

    prompts: Prompts, each repeated `samples` times
    completions: Completions [N, P + max_new_tokens]
    scores: [N], what the reward function gives the whole
    reference_log_probs: [N, P + max_new_tokens], of the completion tokens, nats
    """

    prompts: Prompts
    completions: Completions
    scores: Array
    reference_log_probs: Array


def reward_of(function: Callable[[Prompts, Completions], Array]) -> Network:
    """A reward without parameters as a reward network: function(Prompts [N], Completions [N, T]) -> [N].

    Reward networks are Networks with `apply(params, prompts, completions) -> [N]`; their parameters (a reward model's)
    travel in the state of the algorithm, frozen.
    """
    return Network(lambda key: {}, lambda params, prompts, completions: function(prompts, completions))


def with_reward(model: LanguageModel, reward: Network) -> Network:
    """The model, applied to tokens [B, T], with parameters {"policy": its own, "reward": the reward network's}."""

    def init(key: Key) -> Params:
        policy_key, reward_key = jax.random.split(key)
        return {"policy": model.init(policy_key), "reward": reward.init(reward_key)}

    return Network(init, lambda params, tokens: model.apply(params["policy"], tokens))


def only_policy(trainable: Callable[[str], bool] | None) -> Callable[[str], bool]:
    """Which leaves of {"policy": ..., "value": ..., "reward": ...} are trained: the reward's never, the value's always,
    and of the policy's [...] those `trainable` names (None: all)."""

    def chosen(name: str) -> bool:
        part, _, rest = name.partition("/")
        return part == "value" or (part == "policy" and (trainable is None or trainable(rest)))

    return chosen


def language_rollout(
    key: Key,
    model: LanguageModel,
    reward: Network,
    params: Params,
    reference: Params,
    prompts: Prompts,
    *,
    samples: int,
    temperature: ArrayLike = 1.0,
    microbatches: int = 1,
    chunk_size: int = 256,
    **generation: Any,
) -> Rollout:
    """Let the policy complete each prompt `samples` times, pay each completion, and score it under the reference.

    Args:
        params, reference: {"policy": ..., "reward": ...} of the policy and of its reference.
        prompts: Prompts [B, P].
        microbatches: parts the reference scores one after another.
        generation: max_new_tokens, stop_ids, pad_id, top_k, ... of `generate`.

    Raises ValueError at trace time if the reward function does not return [N].
    """
    completions = generate(
        key, model, params["policy"], prompts.tokens, prompts.lengths,
        samples=samples, temperature=temperature, **generation,
    )  # fmt: skip
    repeated = jax.tree.map(lambda x: jnp.repeat(x, samples, axis=0), prompts)
    scores = jnp.asarray(reward.apply(params["reward"], repeated, completions))
    count = completions.tokens.shape[0]
    if scores.shape != (count,):
        raise ValueError(f"the reward function returned {scores.shape} for {count} completions, not ({count},)")

    def score(rows: tuple[Array, Array]) -> Array:
        policy = reference["policy"]
        return token_scores(model, policy, *rows, temperature=temperature, chunk_size=chunk_size).log_probs

    reference_log_probs = map_parts(score, (completions.tokens, completions.mask), microbatches)
    # Rewards may come as integers or half precision; advantages are differences of them.
    scores = scores.astype(jnp.promote_types(scores.dtype, jnp.float32))
    return Rollout(repeated, completions, scores, reference_log_probs)


def rollout_metrics(rollout: Rollout) -> Metrics:
    """Means over the N completions [N, T] of a rollout.

    "objective/kl": KL(policy || reference) of a completion in nats, by k1; "objective/kl_per_token"
    "objective/scores", "objective/scores_std": of the whole completions
    "completion/length" in tokens; "completion/ended", the share that stopped by itself
    """
    completions = rollout.completions
    log_ratio = jnp.where(completions.mask, completions.log_probs - rollout.reference_log_probs, 0.0)
    lengths = jnp.sum(completions.mask, axis=1, dtype=jnp.float32)
    return {
        "objective/kl": jnp.mean(jnp.sum(log_ratio, axis=1)),
        "objective/kl_per_token": masked_mean(log_ratio, completions.mask),
        "objective/scores": jnp.mean(rollout.scores),
        "objective/scores_std": jnp.std(rollout.scores),
        "completion/length": jnp.mean(lengths),
        "completion/ended": jnp.mean(completions.ended, dtype=jnp.float32),
    }
