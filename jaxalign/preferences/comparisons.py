"""The batches a reward model learns from: comparisons of two sequences, and rankings of several."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign.preferences.batch import PreferenceBatch
from jaxalign.types import Array, ArrayLike

TIE = 2


class Comparisons(NamedTuple):
    """B comparisons of two sides, each a sequence of up to T steps: answers of T tokens, or trajectories.

    chosen, rejected: an array or pytree of leaves [B, T, ...], whatever the reward network takes
    chosen_mask, rejected_mask: [B, T], nonzero on the steps that are judged (of an answer, the completion's tokens)
    margin: [B], how much better the preferred side was judged, or None
    outcome: [B] int, 0 where `chosen` was preferred, 1 where `rejected` was, 2 for a tie; None: `chosen` everywhere
    valid: [B], 0 on rows that only fill up the batch, or None if all are real
    index: [B] int, which row of the data set each is, or None; a bootstrapped ensemble needs it
    """

    chosen: Any
    chosen_mask: Array
    rejected: Any
    rejected_mask: Array
    margin: Array | None = None
    outcome: Array | None = None
    valid: Array | None = None
    index: Array | None = None


class Rankings(NamedTuple):
    """B rankings of K items each.

    items: an array or pytree of leaves [B, K, T, ...]
    mask: [B, K, T], nonzero on the steps that are judged
    ranking: [B, K] int, the items from best to worst: `ranking[:, 0]` is the best one's place among the K
    valid, index: [B] or None, as in `Comparisons`
    """

    items: Any
    mask: Array
    ranking: Array
    valid: Array | None = None
    index: Array | None = None


RewardBatch = Comparisons | Rankings
AnyBatch = RewardBatch | PreferenceBatch | Mapping[str, Any]


class WeightedBatch(NamedTuple):
    """A batch and what the loss of each of its rows counts [B]; 0 on rows that are not valid."""

    batch: RewardBatch
    weight: Array


def reward_batch(batch: AnyBatch) -> RewardBatch:
    """B rows as Comparisons [B, T] or Rankings [B, K, T]: also a PreferenceBatch, or a mapping with the fields' names.

    Raises ValueError naming an argument whose shape does not fit the masks'.
    """
    if isinstance(batch, Mapping):
        record = Rankings if "ranking" in batch else PreferenceBatch if "chosen_tokens" in batch else Comparisons
        batch = record(**batch)
    if isinstance(batch, PreferenceBatch):
        batch = Comparisons(
            batch.chosen_tokens, batch.chosen_mask, batch.rejected_tokens, batch.rejected_mask, valid=batch.valid
        )
    _check_shapes(batch)
    return batch


def row_weights(batch: RewardBatch) -> Array:
    """[B] float32: 1 on valid rows, 0 elsewhere."""
    rows = (batch.mask if isinstance(batch, Rankings) else batch.chosen_mask).shape[0]
    return jnp.ones(rows) if batch.valid is None else (jnp.asarray(batch.valid) != 0).astype(jnp.float32)


def check_reward_batch(batch: AnyBatch, *, tie_strength: ArrayLike | None = None) -> None:
    """Look at the values of a batch [B, ...], or of a whole data set, on the host.

    Raises ValueError naming the argument and the row: no row is valid; a valid row's mask is empty; an outcome is not
    0, 1 or 2; a ranking is not a permutation; or every row is a tie and `tie_strength` is None, so that nothing says
    which rewards are higher.
    """
    batch = reward_batch(batch)
    valid = np.asarray(row_weights(batch)) > 0
    if not valid.any():
        raise ValueError("reward_model: `valid` is 0 on every row, there is nothing to learn from")
    if isinstance(batch, Rankings):
        masks = {"mask": np.asarray(batch.mask) != 0}
        permuted = np.sort(np.asarray(batch.ranking), axis=1) == np.arange(batch.ranking.shape[1])
        if (bad := valid & ~permuted.all(axis=1)).any():
            row = int(np.argmax(bad))
            raise ValueError(f"reward_model: ranking[{row}] = {np.asarray(batch.ranking)[row]} is no permutation")
    else:
        masks = {name: np.asarray(getattr(batch, name)) != 0 for name in ("chosen_mask", "rejected_mask")}
    for name, mask in masks.items():
        if (bad := valid & ~mask.any(axis=-1).reshape(len(valid), -1).all(axis=1)).any():
            raise ValueError(f"reward_model: {name}[{int(np.argmax(bad))}] marks no step, so there is nothing to judge")
    if isinstance(batch, Comparisons) and batch.outcome is not None:
        outcome = np.asarray(batch.outcome)
        if (bad := valid & ~np.isin(outcome, (0, 1, TIE))).any():
            row = int(np.argmax(bad))
            raise ValueError(f"reward_model: outcome[{row}] is {outcome[row]}, not 0 (chosen), 1 (rejected) or 2 (tie)")
        if tie_strength is None and (outcome[valid] == TIE).all():
            raise ValueError("reward_model: every row of `outcome` is a tie: nothing says which rewards are higher")


def _check_shapes(batch: RewardBatch) -> None:
    if isinstance(batch, Rankings):
        inputs, masks, rank = {"items": batch.items}, {"mask": batch.mask}, 3
    else:
        inputs = {"chosen": batch.chosen, "rejected": batch.rejected}
        masks, rank = {name: getattr(batch, name) for name in ("chosen_mask", "rejected_mask")}, 2
    shape = jnp.shape(next(iter(masks.values())))
    for name, mask in masks.items():
        if len(jnp.shape(mask)) != rank or jnp.shape(mask) != shape:
            wanted = "[B, K, T]" if rank == 3 else "[B, T], the same for both sides"
            raise ValueError(f"reward_model: {name} must be {wanted}, got {jnp.shape(mask)} beside {shape}")
    for name, tree in inputs.items():
        for leaf in jax.tree.leaves(tree):
            if jnp.shape(leaf)[: rank - 1] != shape[:-1]:
                raise ValueError(f"reward_model: {name} has a leaf {jnp.shape(leaf)}, its mask is {shape}")
    rows = {name: shape[:1] for name in ("margin", "outcome", "valid", "index")} | {"ranking": shape[:-1]}
    for name, wanted_shape in rows.items():
        value = getattr(batch, name, None)
        if value is not None and jnp.shape(value) != wanted_shape:
            raise ValueError(f"reward_model: {name} must be {wanted_shape}, got {jnp.shape(value)}")
