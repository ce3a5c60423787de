"""How far a policy is from a reference policy: KL(policy || reference) in nats, sampled or exact, and a controller."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxalign.preferences.bradley_terry import as_float
from jaxalign.types import Array, ArrayLike


def kl_k1(log_ratio: ArrayLike) -> Array:
    """log_ratio, [...]: its mean over samples of the policy is the KL; single values have either sign and vary most.

    log_ratio = log p_policy(x) - log p_reference(x) at x drawn from the policy, nats, here and below. As estimates the
    three are Schulman's (joschu.net/blog/kl-approx.html, 2020). Their gradients are another matter: at fixed samples
    the gradient of k1 has mean 0 and that of k2 is the KL's, so a KL to be trained on is k2, or k1 in the reward.
    """
    return as_float(log_ratio)[0]


def kl_k2(log_ratio: ArrayLike) -> Array:
    """log_ratio^2 / 2, [...]: biased, near the KL while the policies are close; never negative."""
    return 0.5 * jnp.square(as_float(log_ratio)[0])


def kl_k3(log_ratio: ArrayLike) -> Array:
    """exp(-log_ratio) - 1 + log_ratio, [...]: unbiased, never negative, and of less variance than k1 while close.

    GRPO's penalty (Shao et al., arXiv:2402.03300 eq. 4).

    >>> [round(float(k(0.5)), 4) for k in (kl_k1, kl_k2, kl_k3)]
    [0.5, 0.125, 0.1065]
    """
    (log_ratio,) = as_float(log_ratio)
    return jnp.expm1(-log_ratio) + log_ratio


def exact_kl(logits_p: ArrayLike, logits_q: ArrayLike) -> Array:
    """KL(p || q) = sum_a p_a (log p_a - log q_a) of softmax distributions: logits [..., A] -> [...], nats.

    An action of logit -inf under p adds nothing, whatever q says; one under q alone makes the KL infinite.
    Raises AssertionError showing the shapes if they differ.

    >>> round(float(exact_kl(jnp.log(jnp.array([0.5, 0.5])), jnp.log(jnp.array([0.25, 0.75])))), 4)
    0.1438
    """
    logits_p, logits_q = as_float(logits_p, logits_q)
    # An impossible action of p would add 0 * inf, and so would its gradient: it is taken out of both sides of the sum.
    possible = logits_p > -jnp.inf
    log_p, log_q = jax.nn.log_softmax(logits_p), jax.nn.log_softmax(logits_q)
    difference = jnp.where(possible, log_p, 0.0) - jnp.where(possible, log_q, 0.0)
    return jnp.sum(jnp.exp(log_p) * difference, axis=-1)


class KLController(NamedTuple):
    """A KL coefficient that follows a target, as a pure pair; see `adaptive_kl`.

    init: () -> coefficient []
    step: (coefficient, kl [], num_samples []) -> coefficient []
    """

    init: Callable[[], Array]
    step: Callable[[Array, ArrayLike, ArrayLike], Array]


def adaptive_kl(*, initial: ArrayLike, target: ArrayLike, horizon: ArrayLike) -> KLController:
    """Raises the coefficient [] while the measured KL is above `target` (nats), lowers it while below.

    coefficient <- coefficient (1 + clip(kl / target - 1, -0.2, 0.2) num_samples / horizon)

    horizon: samples in which the coefficient changes by a fifth at the most. Ziegler et al., arXiv:1909.08593 sec. 2.2.
    """

    def init() -> Array:
        return jnp.asarray(initial, jnp.result_type(float))

    def step(coefficient: Array, kl: ArrayLike, num_samples: ArrayLike) -> Array:
        error = jnp.clip(jnp.asarray(kl, coefficient.dtype) / target - 1.0, -0.2, 0.2)
        return (coefficient * (1.0 + error * num_samples / horizon)).astype(coefficient.dtype)

    return KLController(init, step)
