"""What changes a preference loss from outside it: divergences, mixtures, and weights of pairs and tokens."""

from collections.abc import Callable, Sequence

import chex
import jax
import jax.numpy as jnp

from jaxalign.preferences.bradley_terry import as_float
from jaxalign.preferences.direct import log_ratios
from jaxalign.preferences.log_probs import reduce_completion, token_log_probs
from jaxalign.types import Array, ArrayLike

PairLoss = Callable[..., Array]


def with_divergence(loss: PairLoss, score: Callable[[Array], Array]) -> PairLoss:
    """The pair loss ([B] as `loss`) under another f-divergence: `loss` of score(c) and score(r) for c and r.

    loss: any that depends on c and r alone, as all of DPO's family but `aot_loss` do.
    score: maps a log-ratio u = log(policy / reference) to f'(exp(u)): `jensen_shannon_score`, `alpha_score`, or
        a function of yours. The identity is the reverse KL. Wang et al., arXiv:2309.16240.
    """

    def diverging(
        policy_chosen_logps: ArrayLike,
        policy_rejected_logps: ArrayLike,
        reference_chosen_logps: ArrayLike,
        reference_rejected_logps: ArrayLike,
        **hyper: ArrayLike,
    ) -> Array:
        c, r = log_ratios(policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps)
        return loss(score(c), score(r), jnp.zeros_like(c), jnp.zeros_like(r), **hyper)

    return diverging


def jensen_shannon_score(log_ratio: ArrayLike) -> Array:
    """f'(t) = log(2 t / (1 + t)) at t = exp(log_ratio): log 2 + log_sigmoid(log_ratio), [...]."""
    (log_ratio,) = as_float(log_ratio)
    return jnp.log(2.0) + jax.nn.log_sigmoid(log_ratio)


def alpha_score(log_ratio: ArrayLike, *, alpha: ArrayLike) -> Array:
    """f'(t) = (1 - t^-alpha) / alpha at t = exp(log_ratio), [...]; alpha 0 is the reverse KL and 1 the forward KL.

    t^-alpha is held at exp(80), beyond which float32 overflows and a difference of scores would be NaN.
    TRL's `f_alpha_divergence_coef` is 1 - alpha.
    """
    (log_ratio,) = as_float(log_ratio)
    small = jnp.abs(alpha) < 1e-6
    divisor = jnp.where(small, 1.0, alpha)
    power = jnp.expm1(jnp.minimum(-divisor * log_ratio, 80.0))
    return jnp.where(small, log_ratio, -power / divisor)


def mixture_loss(losses: Sequence[PairLoss], weights: Sequence[ArrayLike]) -> PairLoss:
    """sum_k weights[k] losses[k](..., beta=beta) as one pair loss; bind other hyperparameters with functools.partial.

    Raises ValueError unless there is one weight per loss. Mixed preference optimisation, arXiv:2411.10442.
    """
    if not losses or len(losses) != len(weights):
        counts = f"{len(losses)} losses and {len(weights)} weights"
        raise ValueError(f"mixture_loss: needs one weight per loss and at least one, got {counts}")

    def mixed(
        policy_chosen_logps: ArrayLike,
        policy_rejected_logps: ArrayLike,
        reference_chosen_logps: ArrayLike,
        reference_rejected_logps: ArrayLike,
        *,
        beta: ArrayLike,
    ) -> Array:
        logps = (policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps)
        terms = [weight * loss(*logps, beta=beta) for loss, weight in zip(losses, weights, strict=True)]
        return jnp.sum(jnp.stack(terms), axis=0)

    return mixed


def wpo_weights(logits: ArrayLike, tokens: ArrayLike, mask: ArrayLike) -> Array:
    """How likely the policy would have been to write each completion, per token, against its own typical certainty.

    out[b] = exp( mean over completion tokens of [ log p(tokens[b, t]) - log sum_v p(v)^2 ] )

    Weigh a pair's loss by the product of its two weights. Takes logits[B, T, V], tokens and mask as
    `sequence_log_probs`; returns [B] with no gradient, 1 for an empty completion. Zhou et al., arXiv:2406.11827.
    """
    logits = jax.lax.stop_gradient(jnp.asarray(logits))
    wide = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    collision = jax.nn.logsumexp(2 * wide, axis=-1) - 2 * jax.nn.logsumexp(wide, axis=-1)
    return jnp.exp(reduce_completion(token_log_probs(logits, tokens) - collision[:, :-1], mask, average=True))


def length_desensitized_masks(
    chosen_mask: ArrayLike, rejected_mask: ArrayLike, *, alpha: ArrayLike
) -> tuple[Array, Array]:
    """LD-DPO's token weights: 1 up to the length of the pair's shorter completion, alpha beyond it.

    Args:
        chosen_mask, rejected_mask: [B, T], nonzero on completion tokens.
        alpha: in [0, 1]; 1 leaves the masks as they are, 0 cuts both completions to the common length.

    Returns two float masks [B, T] for `sequence_log_probs` or `chunked_sequence_log_probs`, to be used for policy
    and reference alike. Liu et al., arXiv:2409.06411.
    """
    chosen, rejected = jnp.asarray(chosen_mask) != 0, jnp.asarray(rejected_mask) != 0
    chex.assert_rank([chosen, rejected], 2)
    # Column 0 has no context that could score it, so it is no part of a completion's length.
    chosen, rejected = chosen.at[:, 0].set(False), rejected.at[:, 0].set(False)
    shared = jnp.minimum(jnp.sum(chosen, axis=1), jnp.sum(rejected, axis=1))[:, None]

    def weigh(mask: Array) -> Array:
        within = jnp.cumsum(mask, axis=1) <= shared
        return jnp.where(mask, jnp.where(within, 1.0, alpha), 0.0)

    return weigh(chosen), weigh(rejected)
