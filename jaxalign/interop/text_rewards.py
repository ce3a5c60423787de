"""Rewards written in ordinary Python on text, called from inside a compiled step."""

import importlib.util
import inspect
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign.algorithm import Network
from jaxalign.interop.prompt_data import PromptRow
from jaxalign.rlhf.generation import Completions
from jaxalign.rlhf.language_rollout import Prompts, reward_of
from jaxalign.types import Array

TextFunction = Callable[..., Sequence[float]]


class TextReward:
    """A Python function on text as a reward network.

    The function is called as `function(prompts=[...], completions=[...], **columns)`, lists of N prompts as they were
    given and of N texts, and one list of N values for each further field of the rows; it returns N numbers. (TRL's
    reward functions on text have this form.) One that has a parameter `ended` also gets a list of which completions
    stopped by themselves; the others were cut off.

    If it raises, returns another number of values, or one that is not finite, all N rewards are NaN, which stops the
    training with nothing lost, and `failure` says what happened.
    """

    def __init__(self, function: TextFunction, tokenizer: Any, rows: Sequence[PromptRow]) -> None:
        """rows: the prompts that `Prompts.index` counts."""
        self.failure: str | None = None
        self._function, self._tokenizer, self._rows = function, tokenizer, list(rows)
        self._columns = sorted(set.intersection(*(set(row.fields) for row in self._rows)))
        self._wants_ended = "ended" in inspect.signature(function).parameters

    @property
    def network(self) -> Network:
        """For `grpo` and its like; works under jit and, one lane after another, under vmap."""

        def reward(prompts: Prompts, completions: Completions) -> Array:
            shape = jax.ShapeDtypeStruct(completions.tokens.shape[:1], jnp.float32)
            return jax.pure_callback(
                self._call, shape, prompts.index, completions.tokens, completions.mask, completions.ended,
                vmap_method="sequential",
            )  # fmt: skip

        return reward_of(reward)

    def texts(self, tokens: Any, mask: Any) -> list[str]:
        """The completions of tokens[N, T] that mask[N, T] marks, as text without special tokens."""
        pairs = zip(np.asarray(tokens), np.asarray(mask), strict=True)
        return [self._tokenizer.decode(row[chosen]) for row, chosen in pairs]

    def scores(self, index: Any, texts: Sequence[str], ended: Any) -> np.ndarray:
        """The function's values for completions of the rows `index` [N]. Raises ValueError if they are unusable."""
        rows = [self._rows[int(i)] for i in index]
        columns = {name: [row.fields[name] for row in rows] for name in self._columns}
        if self._wants_ended:
            columns["ended"] = [bool(x) for x in ended]
        values = self._function(prompts=[row.prompt for row in rows], completions=list(texts), **columns)
        given = np.asarray(values, np.float64)
        name = getattr(self._function, "__name__", "the reward function")
        if given.shape != (len(rows),):
            raise ValueError(f"{name} returned values of shape {given.shape} for {len(rows)} completions")
        if not np.isfinite(given).all():
            first = int(np.argmin(np.isfinite(given)))
            raise ValueError(f"{name} returned {given[first]} for {texts[first][:80]!r}")
        return given.astype(np.float32)

    def _call(self, index: Any, tokens: Any, mask: Any, ended: Any) -> np.ndarray:
        # An exception inside a callback would reach the user as the runtime's own, without its kind.
        try:
            return self.scores(np.asarray(index), self.texts(tokens, mask), np.asarray(ended))
        except Exception as error:
            self.failure = f"{type(error).__name__}: {error}"
            return np.full(len(index), np.nan, np.float32)


def each(function: Callable[..., float]) -> TextFunction:
    """A function of one completion, `function(text, **fields) -> number`, as one of lists of N.

    It gets `ended` too, whether the completion stopped by itself, if it has a parameter of that name.
    """

    def of_lists(
        prompts: Sequence[Any], completions: Sequence[str], ended: Sequence[bool], **columns: Sequence[Any]
    ) -> list[float]:
        if "ended" in inspect.signature(function).parameters:
            columns = {**columns, "ended": ended}
        rows = [{name: values[i] for name, values in columns.items()} for i in range(len(completions))]
        return [function(text, **fields) for text, fields in zip(completions, rows, strict=True)]

    of_lists.__name__ = getattr(function, "__name__", "the reward function")
    return of_lists


def load_reward_function(place: str) -> TextFunction:
    """The function NAME of a Python file, given as "FILE.py:NAME" (NAME defaults to "reward"). The file is run.

    Raises FileNotFoundError, or ValueError naming the file if it has no such function.
    """
    file, _, name = place.partition(":") if ".py:" in place else (place, "", "")
    path, name = pathlib.Path(file), name or "reward"
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file with a reward function")
    specification = importlib.util.spec_from_file_location(path.stem, path)
    if specification is None or specification.loader is None:
        raise ValueError(f"{path}: not a Python file")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    function = getattr(module, name, None)
    if not callable(function):
        raise ValueError(f"{path}: has no function {name!r}")
    return function
