"""Completions drawn from a language model, as one program of fixed shapes with a key-value cache.

Shapes: B prompts, P prompt positions, N new tokens, V vocabulary.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np

from jaxalign.algorithm import LanguageModel
from jaxalign.rlhf.sampling import min_p_filter, top_k_filter, top_p_filter
from jaxalign.types import Array, ArrayLike, Key, Params

Choose = Callable[[Array, Array], Array]


class Completions(NamedTuple):
    """Prompts with what a model wrote after them, right-padded.

    tokens: [B, P + N] int32; each row's prompt, right after it the completion, then `pad_id`
    mask: [B, P + N] bool, true on completion tokens, the stop token included
    log_probs: [B, P + N], on completion tokens log softmax(logits / temperature)[token] in nats, which top-k, top-p
        and min-p do not enter; 0 elsewhere
    ended: [B] bool, whether a stop token came; the others were cut off at N tokens
    """

    tokens: Array
    mask: Array
    log_probs: Array
    ended: Array


def generate(
    key: Key,
    model: LanguageModel,
    params: Params,
    prompts: ArrayLike,
    prompt_lengths: ArrayLike,
    *,
    max_new_tokens: int,
    temperature: ArrayLike = 1.0,
    top_k: ArrayLike | None = None,
    top_p: ArrayLike = 1.0,
    min_p: ArrayLike = 0.0,
    stop_ids: tuple[int, ...] = (),
    samples: int = 1,
    pad_id: int = 0,
    max_length: int | None = None,
) -> Completions:
    """Draw completions: token t+1 from softmax(logits[t] / temperature), cut down by top-k, then top-p, then min-p.

    A row ends with the first of `stop_ids` it draws, or after N = `max_new_tokens` tokens; the loop ends when all rows
    have. Its log-probabilities equal `token_log_probs(model.apply(params, tokens) / temperature, tokens)`, so a trainer
    can use them as the behaviour policy's. Jit it with the model and the sizes static.

    Args:
        prompts: [B, P] int, right-padded (with anything); `prompt_lengths` [B] says where each ends, 1 .. P.
        temperature, top_k, top_p, min_p: may be traced; None, 1 and 0 switch the filters off.
        samples: completions per prompt; row b * samples + i is the i-th of prompt b, whose prompt is read only once.
        pad_id: what follows a completion.
        max_length: the model's context, if the call is to check that P + N fits.

    Returns Completions with B * samples rows. Raises ValueError for sizes below 1 or beyond `max_length`, and, outside
    jit, for lengths outside 1 .. P and values out of range: temperature > 0 (`greedy` is its limit at 0), top_k >= 1,
    0 < top_p <= 1, 0 <= min_p <= 1.
    """
    choose = _draw(key, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    return _complete(
        choose, model, params, prompts, prompt_lengths, max_new_tokens=max_new_tokens, temperature=temperature,
        stop_ids=stop_ids, samples=samples, pad_id=pad_id, max_length=max_length,
    )  # fmt: skip


def greedy(
    model: LanguageModel,
    params: Params,
    prompts: ArrayLike,
    prompt_lengths: ArrayLike,
    *,
    max_new_tokens: int,
    stop_ids: tuple[int, ...] = (),
    pad_id: int = 0,
    max_length: int | None = None,
) -> Completions:
    """`generate` with the most probable token in place of a draw (the first of equals), one completion per prompt.

    tokens[b, t+1] = argmax_v logits[b, t, v]; log_probs are those of softmax(logits). Arguments as there.
    """
    return _complete(
        _most_probable, model, params, prompts, prompt_lengths,
        max_new_tokens=max_new_tokens, temperature=1.0, stop_ids=stop_ids, samples=1, pad_id=pad_id,
        max_length=max_length,
    )  # fmt: skip


def continue_text(
    key: Key | None,
    model: LanguageModel,
    params: Params,
    last: Array,
    cache: Any,
    *,
    max_new_tokens: int,
    temperature: ArrayLike = 1.0,
    top_k: ArrayLike | None = None,
    top_p: ArrayLike = 1.0,
    min_p: ArrayLike = 0.0,
    stop_ids: tuple[int, ...] = (),
    pad_id: int = 0,
) -> tuple[Completions, Any]:
    """`generate` from where a cache stands, for streaming: up to N tokens [B, N] after `last` [B], and the cache.

    The cache [B rows] holds what comes before `last`; afterwards it holds all but the last token drawn, so a further
    call goes on from there. It needs room for N positions more. key None is greedy. Arguments as there.
    """
    choose = _most_probable
    if key is not None:
        choose = _draw(key, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    return _write(
        choose, model, params, last, cache, max_new_tokens=max_new_tokens,
        temperature=1.0 if key is None else temperature, stop_ids=stop_ids, pad_id=pad_id,
    )  # fmt: skip


def _most_probable(logits: Array, step: Array) -> Array:
    return jnp.argmax(logits, axis=1)


def _draw(
    key: Key, *, temperature: ArrayLike, top_k: ArrayLike | None, top_p: ArrayLike, min_p: ArrayLike
) -> Choose:
    """Check the values; a draw from logits [B, V] already divided by the temperature."""
    _check_value("temperature", temperature, lambda x: (x > 0) & np.isfinite(x), "above 0; `greedy` is the limit at 0")
    _check_value("top_p", top_p, lambda x: (x > 0) & (x <= 1), "in (0, 1]")
    _check_value("min_p", min_p, lambda x: (x >= 0) & (x <= 1), "in [0, 1]")
    if top_k is not None:
        _check_value("top_k", top_k, lambda x: x >= 1, "at least 1, or None")

    def draw(logits: Array, step: Array) -> Array:
        if top_k is not None:
            logits = top_k_filter(logits, top_k)
        if not _is(top_p, 1.0):
            logits = top_p_filter(logits, top_p)
        if not _is(min_p, 0.0):
            logits = min_p_filter(logits, min_p)
        return jax.random.categorical(jax.random.fold_in(key, step), logits)

    return draw


def _complete(
    choose: Choose,
    model: LanguageModel,
    params: Params,
    prompts: ArrayLike,
    prompt_lengths: ArrayLike,
    *,
    max_new_tokens: int,
    temperature: ArrayLike,
    stop_ids: tuple[int, ...],
    samples: int,
    pad_id: int,
    max_length: int | None,
) -> Completions:
    """Read the prompts, write after them, and put both into rows."""
    prompts, lengths = jnp.asarray(prompts), jnp.asarray(prompt_lengths)
    _check_shapes(prompts, lengths, max_new_tokens, samples, max_length)
    count, width = prompts.shape
    params = model.for_decoding(params)
    _, cache = model.decode(params, prompts, model.init_cache(count, width + max_new_tokens))
    # The last prompt token is read a second time, alone: its logits are the only ones wanted, and under jit the head
    # then never sees the rest of the prompt.
    last = jnp.take_along_axis(prompts, lengths[:, None] - 1, axis=1)[:, 0]
    last, cache = jax.tree.map(
        lambda x: jnp.repeat(x, samples, axis=0), (last, cache._replace(length=lengths.astype(jnp.int32) - 1))
    )
    written, _ = _write(
        choose, model, params, last, cache, max_new_tokens=max_new_tokens, temperature=temperature,
        stop_ids=stop_ids, pad_id=pad_id,
    )  # fmt: skip

    lengths = jnp.repeat(lengths, samples)
    rows, at = jnp.arange(count * samples)[:, None], lengths[:, None] + jnp.arange(max_new_tokens)[None, :]
    tokens = jnp.where(jnp.arange(width)[None, :] < lengths[:, None], jnp.repeat(prompts, samples, axis=0), pad_id)
    tokens = jnp.pad(tokens.astype(jnp.int32), ((0, 0), (0, max_new_tokens)), constant_values=pad_id)
    return Completions(
        tokens=tokens.at[rows, at].set(written.tokens),
        mask=jnp.zeros(tokens.shape, bool).at[rows, at].set(written.mask),
        log_probs=jnp.zeros(tokens.shape, written.log_probs.dtype).at[rows, at].set(written.log_probs),
        ended=written.ended,
    )


def _write(
    choose: Choose,
    model: LanguageModel,
    params: Params,
    last: Array,
    cache: Any,
    *,
    max_new_tokens: int,
    temperature: ArrayLike,
    stop_ids: tuple[int, ...],
    pad_id: int,
) -> tuple[Completions, Any]:
    """Up to N tokens after `last` [B], given a cache of all before it: Completions [B, N] of these, and the cache.

    The cache then holds all but the last token drawn. `choose(logits [B, V], step) -> tokens [B]`.
    """
    shape = (last.shape[0], max_new_tokens)
    stops = jnp.asarray(stop_ids, jnp.int32)
    logits = jax.eval_shape(model.decode, params, last[:, None], cache)[0]
    dtype = jnp.promote_types(logits.dtype, jnp.float32)

    def unfinished(carry: tuple[Any, ...]) -> Array:
        step, _, out, _ = carry
        return (step < max_new_tokens) & ~jnp.all(out.ended)

    def advance(carry: tuple[Any, ...]) -> tuple[Any, ...]:
        step, last, out, cache = carry
        logits, cache = model.decode(params, last[:, None], cache)
        logits = logits[:, 0].astype(dtype) / temperature
        chosen = choose(logits, step).astype(jnp.int32)
        log_prob = jnp.take_along_axis(logits, chosen[:, None], axis=1)[:, 0] - jax.nn.logsumexp(logits, axis=1)
        chosen = jnp.where(out.ended, pad_id, chosen)

        def put(old: Array, new: Array) -> Array:
            return jax.lax.dynamic_update_slice_in_dim(old, new[:, None], step, axis=1)

        out = Completions(
            tokens=put(out.tokens, chosen),
            mask=put(out.mask, ~out.ended),
            log_probs=put(out.log_probs, jnp.where(out.ended, 0.0, log_prob)),
            ended=out.ended | jnp.any(chosen[:, None] == stops[None, :], axis=1),
        )
        return step + 1, chosen, out, cache

    blank = Completions(
        tokens=jnp.full(shape, pad_id, jnp.int32),
        mask=jnp.zeros(shape, bool),
        log_probs=jnp.zeros(shape, dtype),
        ended=jnp.zeros(shape[0], bool),
    )
    start = (jnp.zeros((), jnp.int32), last.astype(jnp.int32), blank, cache)
    _, _, out, cache = jax.lax.while_loop(unfinished, advance, start)
    return out, cache


def _is(value: Any, number: float) -> bool:
    """Whether a hyperparameter is known, at trace time, to be this number."""
    return not isinstance(value, jax.core.Tracer) and bool(np.all(np.asarray(value) == number))


def _check_value(name: str, value: Any, good: Callable[[Any], Any], wanted: str) -> None:
    if not isinstance(value, jax.core.Tracer) and not np.all(good(np.asarray(value))):
        raise ValueError(f"generate: {name} must be {wanted}, got {value}")


def _check_shapes(prompts: Array, lengths: Array, max_new_tokens: int, samples: int, max_length: int | None) -> None:
    chex.assert_rank([prompts, lengths], [2, 1])
    chex.assert_equal_shape_prefix([prompts, lengths], 1)
    if not (jnp.issubdtype(prompts.dtype, jnp.integer) and jnp.issubdtype(lengths.dtype, jnp.integer)):
        raise ValueError(f"generate: prompts and prompt_lengths hold integers, got {prompts.dtype}, {lengths.dtype}")
    for name, size in (("max_new_tokens", max_new_tokens), ("samples", samples)):
        if size < 1:
            raise ValueError(f"generate: {name} must be at least 1, got {size}")
    width = prompts.shape[1]
    if max_length is not None and width + max_new_tokens > max_length:
        raise ValueError(
            f"generate: prompts of {width} positions and {max_new_tokens} new tokens exceed the model's "
            f"{max_length} positions"
        )
    if not isinstance(lengths, jax.core.Tracer):
        bad = np.flatnonzero((np.asarray(lengths) < 1) | (np.asarray(lengths) > width))
        if bad.size:
            raise ValueError(
                f"generate: prompt_lengths[{bad[0]}] is {lengths[bad[0]]}; prompts {prompts.shape} allow 1 .. {width}"
            )
