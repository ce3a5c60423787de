"""How robust a classifier is: accuracy under each attack at each radius, with intervals, and under the worst one."""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign.robustness.attack_losses import margins
from jaxalign.robustness.attack_program import (
    as_function,
    check_logits,
    check_rows,
    check_values,
    tracing,
)
from jaxalign.robustness.attack_result import AttackResult
from jaxalign.robustness.survivors import SMALLEST_BUCKET, parts
from jaxalign.robustness.traced_classifier import traced_classifier
from jaxalign.statistics import bootstrap_interval, wilson_interval
from jaxalign.types import Array, ArrayLike, Key

Attack = Callable[[Key, Callable[[Any], Array], Any, ArrayLike, ArrayLike], AttackResult]


def robust_curve(attack: Callable[[Array], AttackResult], epsilons: ArrayLike) -> Array:
    """Which examples fall at each radius, [E, B] bool; 1 - mean over B is the curve of robust accuracy.

    success[e, i] = any over e' with epsilons[e'] <= epsilons[e] of attack(epsilons[e']).success[i]: what breaks an
    example at a smaller radius is also inside the larger ball, so the curve never rises.

    Args:
        attack: `epsilon -> AttackResult`, such as `lambda epsilon: pgd(key, apply, x, y, epsilon)`.
        epsilons: [E], in any order.

    Inside jit the radii are one program (`lax.map`); outside it the attack is called once for each, so that one with a
    host part of its own (`auto_attack`, which drops what has fallen) keeps it.
    """
    epsilons = jnp.asarray(epsilons)
    if epsilons.ndim != 1 or epsilons.size == 0:
        raise ValueError(f"robust_curve: epsilons must be [E] with E >= 1, got shape {epsilons.shape}")
    if tracing(epsilons):
        broken = jax.lax.map(lambda epsilon: attack(epsilon).success, epsilons)
    else:
        broken = jnp.stack([attack(epsilon).success for epsilon in epsilons])
    inside = epsilons[None, :] <= epsilons[:, None]
    return jnp.any(inside[:, :, None] & broken[None], axis=1)


class RobustnessEvaluation(NamedTuple):
    """What `robustness_evaluation` found for A attacks, E radii and B examples; NumPy arrays.

    attacks: A names
    epsilons: [E] as given
    clean_accuracy: scalar; clean_interval: [2], (low, high)
    robust_accuracy: [A, E], the share that is right as it is and that the attack does not break at this radius or at a
        smaller one of `epsilons`; robust_interval: [A, E, 2]
    worst_case_accuracy: [E], the share that no attack breaks; worst_case_interval: [E, 2]
    smallest_epsilon: [B], the least of `epsilons` at which some attack broke the example; 0 where it is wrong as it is,
        NaN where nothing broke it
    mean_smallest_epsilon, median_smallest_epsilon: scalars, over the examples that were right and then broken; NaN if
        there is none. Those that nothing broke are left out, so compare them between classifiers with care.
    broken: [A, E, B] bool, the rows that robust_accuracy does not count
    """

    attacks: tuple[str, ...]
    epsilons: np.ndarray
    clean_accuracy: np.ndarray
    clean_interval: np.ndarray
    robust_accuracy: np.ndarray
    robust_interval: np.ndarray
    worst_case_accuracy: np.ndarray
    worst_case_interval: np.ndarray
    smallest_epsilon: np.ndarray
    mean_smallest_epsilon: np.ndarray
    median_smallest_epsilon: np.ndarray
    broken: np.ndarray


def robustness_evaluation(
    key: Key,
    apply: Callable[[Any], Array],
    x: Any,
    y: ArrayLike,
    *,
    attacks: Mapping[str, Attack],
    epsilons: ArrayLike,
    confidence: float = 0.95,
    batch_size: int | None = None,
    progress: Callable[[int, int, str], None] | None = None,
) -> RobustnessEvaluation:
    """Accuracy clean, under each attack at each radius, and under the worst of the attacks. Called outside jit.

    An attack meets only what it has not yet broken at a smaller radius, gathered into batches of a few sizes. An
    example is right if its label has the largest logit, a tie counting as wrong. Every attack gets the same keys.

    Args:
        apply: x [B, ...] -> logits [B, C]; keep one function object, for attacks are compiled for it.
        x: leaves [B, ...]; y: [B] int.
        attacks: by name, `(key, apply, x, y, epsilon) -> AttackResult`, as `pgd` is or a lambda that fills the rest in.
        epsilons: [E], not negative, in the units of x, the same norm for all attacks if the worst case is to mean
            anything.
        confidence: of the Wilson intervals, over the examples drawn, not over what the attack draws.
        batch_size: most rows at a time; None is all.
        progress: `(done, total, message)`, called after every attack at every radius.

    Raises ValueError naming what is wrong: no attack, no radius or no row, labels out of range, logits of another shape
    or NaN; and what the attacks raise.
    """
    y, epsilons = np.asarray(y), np.asarray(epsilons)
    if not attacks or epsilons.ndim != 1 or not epsilons.size or y.ndim != 1 or not y.size or not (epsilons >= 0).all():
        raise ValueError(
            "robustness_evaluation: needs at least one attack, epsilons [E] not negative and labels y [B]; "
            f"got attacks {sorted(attacks)}, epsilons {epsilons}, y of shape {y.shape}"
        )
    x = jax.tree.map(np.asarray, x)
    check_rows("robustness_evaluation", x, y, None)
    batches = _Batches(apply, x, y, batch_size or len(y))
    right = batches.right()
    broken = np.zeros((len(attacks), len(epsilons), len(y)), bool)
    radii = np.argsort(epsilons, kind="stable")
    for a, (name, attack) in enumerate(attacks.items()):
        fallen = ~right
        for e, radius in enumerate(radii):
            epsilon = jnp.asarray(epsilons[radius], jnp.result_type(float))
            alive = np.flatnonzero(~fallen)
            fallen[alive] = batches.broken(jax.random.fold_in(key, e), attack, epsilon, alive)
            broken[a, radius] = fallen
            if progress is not None:
                message = f"{name} at {epsilons[radius]:g}: {1 - fallen.mean():.1%} robust"
                progress(a * len(radii) + e + 1, len(attacks) * len(radii), message)
    # Equal radii are one radius, whichever of them the attack broke it at.
    inside = epsilons[None, :] <= epsilons[:, None]
    broken = (inside[None, :, :, None] & broken[:, None]).any(axis=2)
    return _summary(tuple(attacks), epsilons, right, broken, confidence)


class _Batches:
    """Some rows of x at a time, repeated to fill a batch of one of a few sizes: each size is a program to compile."""

    def __init__(self, apply: Callable[[Any], Array], x: Any, y: np.ndarray, batch_size: int):
        self._apply, self._x, self._y, self._size = apply, x, y, batch_size

    def right(self) -> np.ndarray:
        """[B] bool, whether each row's label has the largest logit."""
        programs: dict[int, Callable[..., Array]] = {}

        def margin(x: Any, y: Array, _: int) -> np.ndarray:
            if len(y) not in programs:
                program = traced_classifier(self._apply, x)
                classes = check_logits("robustness_evaluation", program, len(y))
                check_values("robustness_evaluation", x, self._y, None, None, classes)
                run = jax.jit(lambda consts, x, y: margins(as_function(program, consts)(x), y))
                programs[len(y)] = functools.partial(run, program.consts)
            return np.asarray(programs[len(y)](x, y))

        found = self._gather(margin, np.arange(len(self._y)))
        if np.isnan(found).any():
            rows = np.flatnonzero(np.isnan(found))
            raise ValueError(f"robustness_evaluation: apply gives NaN for {rows.size} rows, the first x[{rows[0]}]")
        return found > 0

    def broken(self, key: Key, attack: Attack, epsilon: Array, index: np.ndarray) -> np.ndarray:
        """[n] bool, whether the attack breaks each of the rows `index` [n]."""

        def success(x: Any, y: Array, number: int) -> np.ndarray:
            return np.asarray(attack(jax.random.fold_in(key, number), self._apply, x, y, epsilon).success)

        return self._gather(success, index).astype(bool)

    def _gather(self, function: Callable[[Any, Array, int], np.ndarray], index: np.ndarray) -> np.ndarray:
        found, start = [np.zeros(0)], 0
        for number, size in enumerate(parts(len(index), self._size, min(SMALLEST_BUCKET, self._size))):
            some = index[start : start + size]
            padded = np.resize(some, size)
            x = jax.tree.map(lambda leaf, rows=padded: jnp.asarray(leaf[rows]), self._x)
            found.append(function(x, jnp.asarray(self._y[padded]), number)[: len(some)])
            start += size
        return np.concatenate(found)


def _summary(
    attacks: tuple[str, ...], epsilons: np.ndarray, right: np.ndarray, broken: np.ndarray, confidence: float
) -> RobustnessEvaluation:
    wilson = jax.jit(functools.partial(wilson_interval, confidence=confidence))

    def share(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The mean over the last axis [..., B], and its interval [..., 2]."""
        interval = wilson(rows.sum(axis=-1), rows.shape[-1])
        return rows.mean(axis=-1), np.stack(interval, axis=-1)

    any_broke = broken.any(axis=0)
    smallest = np.where(any_broke, epsilons[:, None], np.inf).min(axis=0)
    smallest = np.where(right, np.where(np.isinf(smallest), np.nan, smallest), 0.0)
    found = smallest[right & any_broke.any(axis=0)]
    mean, median = (np.asarray(f(found) if found.size else np.nan) for f in (np.mean, np.median))
    return RobustnessEvaluation(
        attacks, epsilons, *share(right), *share(~broken), *share(~any_broke), smallest, mean, median, broken
    )


class SeedIntervals(NamedTuple):
    """Accuracies over S training seeds; the last axis is (mean, low, high).

    attacks: A names; epsilons: [E]
    clean_accuracy: [3]; robust_accuracy: [A, E, 3]; worst_case_accuracy: [E, 3]
    """

    attacks: tuple[str, ...]
    epsilons: np.ndarray
    clean_accuracy: np.ndarray
    robust_accuracy: np.ndarray
    worst_case_accuracy: np.ndarray


def intervals_over_seeds(
    key: Key, evaluations: Sequence[RobustnessEvaluation], *, confidence: float = 0.95, resamples: int = 2000
) -> SeedIntervals:
    """Mean accuracies [A, E] of S evaluations, one for each training seed, with `bootstrap_interval`s over the seeds.

    Raises ValueError if there are fewer than two, which say nothing about seeds, or if attacks or epsilons differ.
    """
    if len(evaluations) < 2:
        raise ValueError(f"intervals_over_seeds: needs at least two evaluations, got {len(evaluations)}")
    first = evaluations[0]
    for other in evaluations[1:]:
        if other.attacks != first.attacks or not np.array_equal(other.epsilons, first.epsilons):
            pairs = [f"{e.attacks} at {e.epsilons}" for e in (first, other)]
            raise ValueError(f"intervals_over_seeds: one has {pairs[0]}, another {pairs[1]}")

    names = ("clean_accuracy", "robust_accuracy", "worst_case_accuracy")
    shapes = [np.shape(getattr(first, name)) for name in names]
    scores = np.stack([np.concatenate([np.ravel(getattr(e, name)) for name in names]) for e in evaluations])
    interval = jax.jit(functools.partial(bootstrap_interval, confidence=confidence, resamples=resamples))
    low, high = interval(key, scores)
    triples = np.stack([scores.mean(axis=0), np.asarray(low), np.asarray(high)], axis=-1)
    ends = np.cumsum([math.prod(shape) for shape in shapes])
    parts_of = zip(np.split(triples, ends[:-1]), shapes, strict=True)
    return SeedIntervals(first.attacks, first.epsilons, *(part.reshape(*shape, 3) for part, shape in parts_of))
