"""Training a policy on preference pairs: any pair loss composed with any Network, as an Algorithm."""

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxalign.algorithm import Algorithm, LanguageModel, Network, TrainState, gradient_algorithm, map_parts, merge
from jaxalign.preferences.batch import PreferenceBatch
from jaxalign.preferences.direct import dpo_loss
from jaxalign.preferences.log_probs import chunked_log_probs_and_entropy, sequence_entropy, sequence_log_probs
from jaxalign.preferences.reference_free import cpo_loss, orpo_loss, simpo_loss
from jaxalign.types import Array, ArrayLike, Key, Metrics, Params

PairLoss = Callable[..., Array]
CHUNK_SIZE = 256
REFERENCES = ("initial", "batch", "none")


class PairLogProbs(NamedTuple):
    """Completion log-probabilities [B] (nats) of each pair's two sides.

    chosen_lengths, rejected_lengths: [B], how many completion tokens each side has
    entropy: [B], mean next-token entropy over the completion tokens, mean of the two sides, nats
    """

    chosen: Array
    rejected: Array
    chosen_lengths: Array
    rejected_lengths: Array
    entropy: Array


def completion_log_probs(
    network: Network, params: Params, tokens: Array, mask: Array, *, chunk_size: int = CHUNK_SIZE
) -> tuple[Array, Array]:
    """log p(completion | prompt), summed over the tokens mask[B, T] marks in tokens[B, T], and mean entropy; [B] each.

    Both in nats; no gradient flows through the entropy.

    A LanguageModel's vocabulary is scored in chunks of `chunk_size` tokens, so its logits [B, T, V] never exist at
    once; of any other Network `apply(params, tokens)` gives the logits.
    """
    if isinstance(network, LanguageModel):
        hidden, unembedding = network.hidden(params, tokens), network.unembedding(params)
        return chunked_log_probs_and_entropy(hidden, unembedding, tokens, mask, chunk_size=chunk_size)
    logits = network.apply(params, tokens)
    return sequence_log_probs(logits, tokens, mask), sequence_entropy(jax.lax.stop_gradient(logits), mask)


def pair_log_probs(
    network: Network, params: Params, batch: PreferenceBatch, *, chunk_size: int = CHUNK_SIZE
) -> PairLogProbs:
    """Score both sides of B pairs in one forward pass over [2B, T]; also what precomputes a reference."""
    tokens = jnp.concatenate([batch.chosen_tokens, batch.rejected_tokens])
    mask = jnp.concatenate([batch.chosen_mask, batch.rejected_mask])
    logps, entropies = completion_log_probs(network, params, tokens, mask, chunk_size=chunk_size)
    chosen, rejected = jnp.split(logps, 2)
    # Position 0 has no prediction, so it never counts as a completion token.
    chosen_lengths, rejected_lengths = jnp.split((mask[:, 1:] != 0).sum(axis=1).astype(chosen.dtype), 2)
    return PairLogProbs(chosen, rejected, chosen_lengths, rejected_lengths, entropies.reshape(2, -1).mean(axis=0))


def dpo(
    network: Network,
    optimizer: optax.GradientTransformation,
    *,
    beta: ArrayLike,
    loss: PairLoss = dpo_loss,
    reference: str = "initial",
    average: bool = False,
    nll_weight: ArrayLike = 0.0,
    trainable: Callable[[str], bool] | None = None,
    microbatches: int = 1,
    chunk_size: int = CHUNK_SIZE,
) -> Algorithm:
    """Direct preference optimisation, and with another `loss` every member of its family.

    objective = mean_i [ loss(c_i, r_i, c_ref_i, r_ref_i, beta) - nll_weight * c_i / |chosen_i| ] over valid pairs i;
    c and r are summed completion log-probabilities under the policy and c_ref, r_ref those under the reference
    (Rafailov et al. 2023, arXiv 2305.18290, equation 7).

    Args:
        loss: any pairwise loss of `jaxalign.preferences`, called with the four [B] arrays and `beta`.
        reference: "initial" keeps the parameters at `init` in `state.reference` and scores them at each step; "batch"
            takes the log-probabilities from the batch, computed once beforehand; "none" uses zeros, for losses
            without a reference.
        average: divide all four log-probabilities by the completion's length (IPO and SimPO as their authors ran them).
        nll_weight: weight of the chosen completion's mean negative log-likelihood per token (RPO, ORPO, CPO).
        trainable, microbatches: as in `gradient_algorithm`; parts are weighted by their valid pairs. Losses that sort
            over the batch (aot) see one part at a time; those that take `valid` are given the batch's.

    Batches are PreferenceBatch records, or mappings with its field names. Metrics: TRL's names, in nats (`rewards/*`
    are beta times log-ratios), averaged over valid pairs; `logps/*` are sums over tokens whatever `average`. With a
    reference also `displacement/chosen`, the mean change of the chosen log-probability since the reference, which falls
    below 0 when training pushes both answers down.
    Raises ValueError for an unknown `reference`, or a batch that lacks the reference it should bring.
    """
    if reference not in REFERENCES:
        raise ValueError(f"dpo: reference must be one of {REFERENCES}, got {reference!r}")
    takes_valid = "valid" in inspect.signature(loss).parameters

    def objective(params: Params, batch: PreferenceBatch, key: Key) -> tuple[Array, Metrics]:
        policy = pair_log_probs(network, params, batch, chunk_size=chunk_size)
        reference_chosen, reference_rejected = _reference(batch, policy)
        terms = (policy.chosen, policy.rejected, reference_chosen, reference_rejected)
        chosen_mean = policy.chosen / jnp.maximum(policy.chosen_lengths, 1)
        if average:
            lengths = 2 * (policy.chosen_lengths, policy.rejected_lengths)
            terms = tuple(x / jnp.maximum(n, 1) for x, n in zip(terms, lengths, strict=True))
        rows = {"valid": batch.valid} if takes_valid else {}
        per_pair = loss(*terms, beta=beta, **rows) - nll_weight * chosen_mean
        mean = functools.partial(_mean_over_valid, valid=batch.valid)
        metrics = {
            **_reward_metrics(*terms, beta=beta),
            "logps/chosen": policy.chosen,
            "logps/rejected": policy.rejected,
            "entropy": policy.entropy,
        }
        if reference != "none":
            metrics["displacement/chosen"] = policy.chosen - reference_chosen
        return mean(per_pair), {name: mean(x) for name, x in metrics.items()}

    base = gradient_algorithm(
        network, objective, optimizer, trainable=trainable, microbatches=microbatches, weight=_valid_pairs
    )

    def init(key: Key) -> TrainState:
        state = base.init(key)
        return state.replace(reference=jax.tree.map(jnp.copy, state.params)) if reference == "initial" else state

    def step(state: TrainState, batch: PreferenceBatch | Mapping[str, Array]) -> tuple[TrainState, Metrics]:
        if isinstance(batch, Mapping):
            batch = PreferenceBatch(**batch)
        if reference == "batch":
            for name in ("reference_chosen_logps", "reference_rejected_logps"):
                if getattr(batch, name) is None:
                    raise ValueError(f"dpo(reference='batch'): the batch has no {name}")
        if reference == "initial":
            params = merge(state.reference, state.frozen)
            score = functools.partial(pair_log_probs, network, params, chunk_size=chunk_size)
            scored = map_parts(score, batch, microbatches)
            batch = batch._replace(reference_chosen_logps=scored.chosen, reference_rejected_logps=scored.rejected)
        if reference == "none":
            batch = batch._replace(reference_chosen_logps=None, reference_rejected_logps=None)
        return base.step(state, batch)

    return Algorithm(init, step)


def simpo(
    network: Network, optimizer: optax.GradientTransformation, *, beta: ArrayLike, gamma: ArrayLike, **options: Any
) -> Algorithm:
    """SimPO: `simpo_loss` on mean log-probabilities, no reference; `options` and batches ([B, T]) as in `dpo`."""

    def loss(chosen: Array, rejected: Array, *_: Array, beta: ArrayLike) -> Array:
        return simpo_loss(chosen, rejected, beta=beta, gamma=gamma)

    return dpo(network, optimizer, beta=beta, loss=loss, reference="none", average=True, **options)


def orpo(network: Network, optimizer: optax.GradientTransformation, *, beta: ArrayLike, **options: Any) -> Algorithm:
    """ORPO: chosen NLL per token plus the odds-ratio term `orpo_loss` (weight beta). Batches ([B, T]) as in `dpo`."""

    def loss(chosen: Array, rejected: Array, *_: Array, beta: ArrayLike) -> Array:
        return orpo_loss(chosen, rejected, beta=beta)

    return dpo(network, optimizer, beta=beta, loss=loss, reference="none", average=True, nll_weight=1.0, **options)


def cpo(network: Network, optimizer: optax.GradientTransformation, *, beta: ArrayLike, **options: Any) -> Algorithm:
    """CPO: `cpo_loss` on summed log-probabilities plus the chosen NLL per token. Batches ([B, T]) as in `dpo`."""

    def loss(chosen: Array, rejected: Array, *_: Array, beta: ArrayLike) -> Array:
        return cpo_loss(chosen, rejected, beta=beta)

    return dpo(network, optimizer, beta=beta, loss=loss, reference="none", nll_weight=1.0, **options)


def _reference(batch: PreferenceBatch, policy: PairLogProbs) -> tuple[Array, Array]:
    if batch.reference_chosen_logps is None or batch.reference_rejected_logps is None:
        return jnp.zeros_like(policy.chosen), jnp.zeros_like(policy.rejected)
    return batch.reference_chosen_logps, batch.reference_rejected_logps


def _reward_metrics(
    chosen: Array, rejected: Array, reference_chosen: Array, reference_rejected: Array, *, beta: ArrayLike
) -> Metrics:
    chosen_rewards = beta * (chosen - reference_chosen)
    rejected_rewards = beta * (rejected - reference_rejected)
    return {
        "rewards/chosen": chosen_rewards,
        "rewards/rejected": rejected_rewards,
        "rewards/accuracies": (chosen_rewards > rejected_rewards).astype(chosen.dtype),
        "rewards/margins": chosen_rewards - rejected_rewards,
    }


def _valid_pairs(batch: PreferenceBatch) -> Array:
    rows = batch.chosen_tokens.shape[0]
    return jnp.float32(rows) if batch.valid is None else batch.valid.sum().astype(jnp.float32)


def _mean_over_valid(x: Array, *, valid: Array | None) -> Array:
    if valid is None:
        return x.mean()
    weight = valid.astype(x.dtype)
    return (x * weight).sum() / jnp.maximum(weight.sum(), 1)
