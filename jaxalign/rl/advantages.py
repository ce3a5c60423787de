"""Advantages and returns along time: GAE, lambda-returns, discounted returns, V-trace.

Arrays are [T, ...], time first; a batch of sequences [B, T] goes in transposed or under `vmap`. Two flags say how a
step ended, for they mean different things:

terminated: the state after the step is worth 0, so `next_values` there is not read
done: terminated or truncated; the next row belongs to another episode, so nothing is carried over it

A truncated step (done, not terminated) is still worth `next_values`, the value of its true successor, which is never
`values` of the next row. The last row needs no flag: what comes after it is unknown, and `next_values` stands for it.

`mask` [T, ...] marks the positions that were acted at, the completion tokens of a row [prompt, completion, padding].
A masked position is as if it were not there: its rewards, values and flags are not read (they may be NaN), its
advantage is 0, and a trace passes over it from the next valid position to the previous one. Padding on either side thus
changes nothing, and tokens that a tool wrote in the middle do not count as steps: `next_values` of a token before such
a gap is the value after the gap. Of two sequences packed into one row the first ends with `done` on its last valid
token, not on its padding.

Every function is its equation, differentiable in every float argument: `stop_gradient` is the caller's.
"""

from typing import NamedTuple

import chex
import jax.numpy as jnp
from jax import lax

from jaxalign.preferences.bradley_terry import as_float
from jaxalign.types import Array, ArrayLike


def generalized_advantage_estimation(
    rewards: ArrayLike,
    values: ArrayLike,
    next_values: ArrayLike,
    terminated: ArrayLike,
    done: ArrayLike,
    *,
    discount: ArrayLike,
    gae_lambda: ArrayLike,
    mask: ArrayLike | None = None,
    method: str = "scan",
) -> tuple[Array, Array]:
    """Exponentially weighted sums of TD errors: (advantages, targets), [T, ...] each.

    delta_t = rewards_t + discount (1 - terminated_t) next_values_t - values_t
    advantages_t = delta_t + discount gae_lambda (1 - done_t) advantages_{t+1}
    targets = advantages + values

    Args:
        rewards, values, next_values: [T, ...]; values of the state acted in and of its true successor.
        terminated, done, mask: [T, ...] bool or 0/1, as the module describes them; mask None: all are valid.
        discount, gae_lambda: scalars, or arrays that broadcast to [T, ...]. gae_lambda 0 gives the TD errors, 1 the
            discounted return minus the baseline.
        method: "scan", T short steps, the faster on CPU; "associative", about 2 log2(T) wide ones, for accelerators.

    Targets at masked positions are `values`. Raises AssertionError showing the shapes if they differ, ValueError for an
    unknown method. Schulman et al., arXiv:1506.02438 eq. 16; for truncation Pardo et al., arXiv:1712.00378.

    >>> r, v = jnp.array([1.0, 1.0]), jnp.array([0.5, 0.5])
    >>> ended = jnp.array([False, True])
    >>> generalized_advantage_estimation(r, v, v, ended, ended, discount=0.5, gae_lambda=1.0)[0].tolist()
    [1.0, 0.5]
    """
    rows = _rows(terminated, done, mask, rewards, values, next_values)
    reward, value, next_value = rows.floats
    discount, gae_lambda = (_per_step(x, reward) for x in (discount, gae_lambda))
    delta = reward + discount * jnp.where(rows.terminated, 0.0, next_value) - value
    decay = jnp.where(rows.done, 0.0, discount * gae_lambda)
    advantages = _only_valid(_backward_sum(delta, decay, rows.valid, method), rows.valid)
    return advantages, advantages + as_float(values)[0]


def lambda_returns(
    rewards: ArrayLike,
    next_values: ArrayLike,
    terminated: ArrayLike,
    done: ArrayLike,
    *,
    discount: ArrayLike,
    return_lambda: ArrayLike,
    mask: ArrayLike | None = None,
    method: str = "scan",
) -> Array:
    """TD(lambda) targets, [T, ...]: the returns of n steps then `next_values`, averaged over n with weights lambda^n.

    carried_t = return_lambda (1 - done_t), and 0 on the last valid row
    G_t = rewards_t + discount (1 - terminated_t) [ (1 - carried_t) next_values_t + carried_t G_{t+1} ]

    Arguments as for `generalized_advantage_estimation`, whose targets these are when its `values` of a row are the
    `next_values` of the row before. return_lambda 0 gives one-step targets, 1 Monte Carlo returns that bootstrap only
    where an episode was cut. Zeros at masked positions. Sutton & Barto (2018) eq. 12.18.
    """
    rows = _rows(terminated, done, mask, rewards, next_values)
    reward, next_value = rows.floats
    discount, return_lambda = (_per_step(x, reward) for x in (discount, return_lambda))
    carried = jnp.where(rows.done | _last(rows), 0.0, return_lambda)
    base = reward + discount * (1.0 - carried) * jnp.where(rows.terminated, 0.0, next_value)
    return _only_valid(_backward_sum(base, discount * carried, rows.valid, method), rows.valid)


def discounted_returns(
    rewards: ArrayLike, done: ArrayLike, *, discount: ArrayLike, mask: ArrayLike | None = None, method: str = "scan"
) -> Array:
    """Rewards to go until the episode or the array ends, [T, ...]: G_t = rewards_t + discount (1 - done_t) G_{t+1}.

    Nothing stands for what comes after a truncation or the last row; `lambda_returns` with return_lambda=1 has the
    values for that. Zeros at masked positions.

    >>> discounted_returns(jnp.array([1.0, 2.0, 4.0]), jnp.array([0, 1, 0]), discount=0.5).tolist()
    [2.0, 2.0, 4.0]
    """
    rows = _rows(done, done, mask, rewards)
    (reward,) = rows.floats
    decay = jnp.where(rows.done, 0.0, _per_step(discount, reward))
    return _only_valid(_backward_sum(reward, decay, rows.valid, method), rows.valid)


def vtrace(
    log_ratio: ArrayLike,
    rewards: ArrayLike,
    values: ArrayLike,
    next_values: ArrayLike,
    terminated: ArrayLike,
    done: ArrayLike,
    *,
    discount: ArrayLike,
    gae_lambda: ArrayLike = 1.0,
    clip_rho: ArrayLike = 1.0,
    clip_c: ArrayLike = 1.0,
    clip_policy_rho: ArrayLike = 1.0,
    mask: ArrayLike | None = None,
    method: str = "scan",
) -> tuple[Array, Array]:
    """Advantages and value targets from steps that another policy took: (advantages, targets), [T, ...] each.

    ratio = exp(log_ratio)
    delta = rewards + discount (1 - terminated) next_values - values
    error_t = min(clip_rho, ratio_t) delta_t + discount gae_lambda (1 - done_t) min(clip_c, ratio_t) error_{t+1}
    advantages_t = min(clip_policy_rho, ratio_t) (delta_t + discount gae_lambda (1 - done_t) error_{t+1})
    targets = values + error

    Args:
        log_ratio: [T, ...] log probability of the action under the policy that learns minus under the one that acted.
        clip_rho: bounds the bias towards the acting policy; clip_c <= clip_rho the variance.

    The others as for `generalized_advantage_estimation`, which this is where log_ratio is 0. Each row uses its own
    next_values, so a truncated episode keeps the value of its true successor. Espeholt et al., arXiv:1802.01561 eq. 1,
    with gae_lambda as in their remark 2, and in the advantages too.
    """
    rows = _rows(terminated, done, mask, log_ratio, rewards, values, next_values)
    log_ratio, reward, value, next_value = rows.floats
    discount, gae_lambda = (_per_step(x, reward) for x in (discount, gae_lambda))
    ratio = jnp.exp(log_ratio)
    delta = reward + discount * jnp.where(rows.terminated, 0.0, next_value) - value
    decay = jnp.where(rows.done, 0.0, discount * gae_lambda)
    corrected, carried = jnp.minimum(clip_rho, ratio) * delta, jnp.minimum(clip_c, ratio) * decay
    error = _backward_sum(corrected, carried, rows.valid, method)
    # A masked row still holds the error of the next valid one here, which is what the row before it must see.
    following = jnp.concatenate([error[1:], jnp.zeros_like(error[:1])])
    advantages = jnp.minimum(clip_policy_rho, ratio) * (delta + decay * following)
    return _only_valid(advantages, rows.valid), _only_valid(error, rows.valid) + as_float(values)[0]


class _Rows(NamedTuple):
    """The arguments as arrays of one shape [T, ...]. valid: the mask, or None for all."""

    floats: list[Array]
    terminated: Array
    done: Array
    valid: Array | None


def _rows(terminated: ArrayLike, done: ArrayLike, mask: ArrayLike | None, *floats: ArrayLike) -> _Rows:
    """Raises AssertionError showing the shapes [T, ...] if they differ."""
    arrays = as_float(*floats)
    flags = [jnp.asarray(flag).astype(bool) for flag in (terminated, done, *([] if mask is None else [mask]))]
    chex.assert_equal_shape([arrays[0], *flags])
    if mask is None:
        return _Rows(arrays, *flags, None)
    # Zeros in place of what is masked, so that a NaN there stays out of gradients as well.
    return _Rows([jnp.where(flags[2], x, 0.0) for x in arrays], *flags)


def _per_step(number: ArrayLike, like: Array) -> Array:
    return jnp.broadcast_to(jnp.asarray(number, like.dtype), like.shape)


def _only_valid(x: Array, valid: Array | None) -> Array:
    return x if valid is None else jnp.where(valid, x, 0.0)


def _last(rows: _Rows) -> Array:
    """The last valid position of each sequence, bool [T, ...]."""
    if rows.valid is None:
        return jnp.zeros(rows.done.shape, bool).at[-1].set(True)
    return rows.valid & (lax.cumsum(rows.valid.astype(jnp.int32), reverse=True) == 1)


def _backward_sum(base: Array, decay: Array, valid: Array | None, method: str) -> Array:
    """x_t = base_t + decay_t x_{t+1}, [T, ...], after the last row 0; where not valid x_t = x_{t+1}."""
    if valid is not None:
        # A row that adds 0 and decays by 1 hands on what it was given, so the loop knows nothing of masks.
        base, decay = jnp.where(valid, base, 0.0), jnp.where(valid, decay, 1.0)
    if method == "scan":

        def add(following: Array, row: tuple[Array, Array]) -> tuple[Array, Array]:
            total = row[0] + row[1] * following
            return total, total

        return lax.scan(add, jnp.zeros_like(base[0]), (base, decay), reverse=True)[1]
    if method == "associative":

        def join(later: tuple[Array, Array], earlier: tuple[Array, Array]) -> tuple[Array, Array]:
            return earlier[0] + earlier[1] * later[0], earlier[1] * later[1]

        return lax.associative_scan(join, (base, decay), reverse=True)[0]
    raise ValueError(f'method must be "scan" or "associative", got {method!r}')
