"""The gradient step that PPO and the group methods share: a clipped surrogate on tokens, with a KL penalty and values.

There is one definition of each loss (`jaxalign.rl.policy_losses`, `jaxalign.rl.kl`); what differs between the methods
is where advantages come from and how tokens are weighed, and both are in the batch.
"""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import optax

from jaxalign.algorithm import Algorithm, LanguageModel, Network, TrainState, gradient_algorithm
from jaxalign.rl.kl import kl_k3
from jaxalign.rl.policy_losses import ppo_policy_loss, ppo_value_loss
from jaxalign.rl.ppo import epochs
from jaxalign.rlhf.token_steps import TokenSteps, token_ratio, token_scores
from jaxalign.types import Array, ArrayLike, Key, Metrics, Params

LEAST_SHARE = 1e-9  # of a part in which no token counts


def token_values(head: Params, hidden: Array) -> Array:
    """values = hidden @ head["kernel"] + head["bias"]: hidden [..., D], kernel [D], bias [] -> [...]."""
    return hidden @ head["kernel"].astype(hidden.dtype) + head["bias"].astype(hidden.dtype)


def token_objective(
    model: LanguageModel,
    params: Params,
    steps: TokenSteps,
    *,
    clip_epsilon: ArrayLike,
    clip_epsilon_high: ArrayLike | None = None,
    dual_clip: ArrayLike | None = None,
    kl_coefficient: ArrayLike = 0.0,
    value_coefficient: ArrayLike = 0.0,
    value_clip_epsilon: ArrayLike | None = None,
    ratio: Callable[[Array, Array, Array | None], Array] = token_ratio,
    temperature: ArrayLike = 1.0,
    chunk_size: int = 256,
) -> tuple[Array, Metrics]:
    """sum over tokens of weights * token_loss, divided by sum of share, where

    token_loss = ppo_policy_loss + kl_coefficient kl_k3(log_probs - reference_log_probs)
                 + value_coefficient ppo_value_loss                                       (each where its data is there)

    Args:
        params: {"policy": of `model`, "value": {"kernel" [D], "bias" []} if `steps` holds values}.
        steps: TokenSteps [N, T].
        kl_coefficient: beta of GRPO (arXiv:2402.03300 eq. 3); PPO has its penalty in the rewards instead.
        ratio: what is weighed against the policy that chose: `token_ratio`, `sequence_ratio`, `mean_sequence_ratio`.

    Returns the loss and metrics: means over tokens weighed by `share`, so that those of parts add up to the batch's.
    """
    scores = token_scores(
        model, params["policy"], steps.tokens, steps.mask,
        segments=steps.segments, temperature=temperature, chunk_size=chunk_size,
    )  # fmt: skip
    # Tokens nobody chose take part in no product, whatever stands in the other fields there.
    log_ratio = jnp.where(steps.mask, scores.log_probs - steps.log_probs, 0.0)
    total = jnp.maximum(jnp.sum(steps.share), LEAST_SHARE)

    def mean(x: Array) -> Array:
        return jnp.sum(steps.share * x) / total

    log_weight = ratio(log_ratio, steps.mask, steps.segments)
    loss = ppo_policy_loss(
        log_weight, jnp.zeros_like(log_weight), jnp.where(steps.mask, steps.advantages, 0.0),
        clip_epsilon=clip_epsilon, clip_epsilon_high=clip_epsilon_high, dual_clip=dual_clip,
    )  # fmt: skip
    importance = jnp.exp(log_weight)
    high = clip_epsilon if clip_epsilon_high is None else clip_epsilon_high
    clipped = (importance < 1.0 - clip_epsilon) | (importance > 1.0 + high)
    metrics = {
        "policy/loss": jnp.sum(steps.weights * loss) / total,
        "policy/approxkl": mean(kl_k3(-log_ratio)),  # from the policy that chose, whose samples these are
        "policy/clipfrac": mean(clipped.astype(importance.dtype)),
        "val/ratio": mean(importance),
        "entropy": mean(scores.entropies),
    }
    if steps.reference_log_probs is not None:
        kl = kl_k3(jnp.where(steps.mask, scores.log_probs - steps.reference_log_probs, 0.0))
        metrics["policy/reference_kl"] = mean(kl)
        loss = loss + kl_coefficient * kl
    if steps.values is not None:
        # Values of positions that chose nothing are not learned.
        values = jnp.where(steps.mask, token_values(params["value"], scores.hidden), 0.0)
        old, targets = (jnp.where(steps.mask, x, 0.0) for x in (steps.values, steps.targets))
        value_loss = ppo_value_loss(values, old, targets, clip_epsilon=value_clip_epsilon)
        metrics["value/loss"] = mean(value_loss)
        loss = loss + value_coefficient * value_loss
    return jnp.sum(steps.weights * loss) / total, metrics


def token_learner(
    model: LanguageModel,
    network: Network,
    optimizer: optax.GradientTransformation,
    *,
    trainable: Callable[[str], bool] | None = None,
    microbatches: int = 1,
    **options: Any,
) -> Algorithm:
    """`token_objective` as an Algorithm over batches of TokenSteps [N, T].

    Args:
        network: its `init` gives {"policy": ..., and whatever stands beside it}.
        trainable: which leaves of {"policy": ..., ...} are trained, by name; None: all.
        microbatches: parts whose gradients are summed; accumulated equals full batch, whatever the masks.
        options: those of `token_objective`.
    """

    def objective(params: Params, steps: TokenSteps, key: Key) -> tuple[Array, Metrics]:
        return token_objective(model, params, steps, **options)

    return gradient_algorithm(
        network, objective, optimizer, trainable=trainable, microbatches=microbatches,
        weight=lambda steps: jnp.maximum(jnp.sum(steps.share), LEAST_SHARE),
    )  # fmt: skip


def learn(
    learner: Algorithm, state: TrainState, steps: TokenSteps, key: Key, *, num_epochs: int, num_minibatches: int
) -> tuple[TrainState, Metrics]:
    """`num_epochs` passes of a `token_learner` over N rows [N, T], as `rl.ppo.epochs`; `state.step` grows by 1.

    The frozen leaves and the reference stay outside the loop, which would otherwise carry them.
    """

    def one(inner: TrainState, rows: TokenSteps) -> tuple[TrainState, Metrics]:
        new, metrics = learner.step(inner.replace(frozen=state.frozen), rows)
        return new.replace(frozen=None), metrics

    inner, metrics = epochs(
        Algorithm(learner.init, one), state.replace(frozen=None, reference=None), steps, key,
        num_epochs=num_epochs, num_minibatches=num_minibatches,
    )  # fmt: skip
    return inner.replace(step=state.step + 1, frozen=state.frozen, reference=state.reference), metrics
