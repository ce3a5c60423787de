"""Writing a sequence token by token as an environment, paid for once at its end."""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp

from jaxalign.environments.protocol import Box, Discrete, Environment, TimeStep, valid_action
from jaxalign.types import Array, Key

Score = Callable[[Array, Array], Array]


class TokenState(NamedTuple):
    """tokens: [T] int32, `vocabulary` where none is written yet; written: [] int32, how many are."""

    tokens: Array
    written: Array


def token_mdp(score: Score, *, vocabulary: int, length: int, eos: int | None = None) -> Environment:
    """Each action [] is the next of at most T = length tokens; the episode terminates with `eos` or the T-th token.

    Args:
        score: (tokens [T] int32, mask [T] bool) -> [], paid with the last token; 0 for the others. `mask` is True at
            the tokens written, `eos` included; the rest of `tokens` is `vocabulary`. May close over traced arrays.
        vocabulary: V, how many tokens there are.
        eos: the token that ends a sequence; None: all have T.

    Observes the tokens so far as [T] int32 (Box 0..V), V where none is yet; `one_hot_tokens` gives what a network
    without an embedding can read. Raises ValueError unless eos is in 0..vocabulary-1.
    """
    if eos is not None and not 0 <= eos < vocabulary:
        raise ValueError(f"token_mdp: eos must be in 0..{vocabulary - 1}, got {eos}")
    actions = Discrete(vocabulary)

    def reset(key: Key) -> tuple[Array, TokenState]:
        tokens = jnp.full(length, vocabulary, jnp.int32)
        return tokens, TokenState(tokens, jnp.zeros((), jnp.int32))

    def step(key: Key, state: TokenState, action: Array) -> TimeStep:
        valid = valid_action("token_mdp", actions, action)
        token = jnp.asarray(action, jnp.int32)
        # Nothing is written beyond the last place.
        new = TokenState(state.tokens.at[state.written].set(token, mode="drop"), jnp.minimum(state.written + 1, length))
        ended = new.written >= length
        if eos is not None:
            ended = ended | (token == eos)
        paid = jnp.where(ended, jnp.asarray(score(new.tokens, jnp.arange(length) < new.written), float), 0.0)
        return TimeStep(new.tokens, new, jnp.where(valid, paid, jnp.nan), ended, jnp.zeros((), bool), {})

    return Environment(reset, step, Box(0, vocabulary, (length,), jnp.int32), actions, "token_mdp")


def one_hot_tokens(environment: Environment) -> Environment:
    """A `token_mdp` that observes [T, V] float, row t the one-hot of token t, and 0 where none is yet."""
    vocabulary = environment.action_space.size

    def one_hot(tokens: Array) -> Array:
        return (tokens[:, None] == jnp.arange(vocabulary)[None, :]).astype(float)

    def reset(key: Key) -> tuple[Array, TokenState]:
        tokens, state = environment.reset(key)
        return one_hot(tokens), state

    def step(key: Key, state: TokenState, action: Array) -> TimeStep:
        new = environment.step(key, state, action)
        return new._replace(observation=one_hot(new.observation))

    seen = Box(0.0, 1.0, (*environment.observation_space.shape, vocabulary))
    return environment.replace(reset=reset, step=step, observation_space=seen)
