"""AutoAttack: four attacks without parameters to tune, one after another (Croce & Hein 2020, arXiv:2003.01690)."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign.robustness.apgd import targeted_loss
from jaxalign.robustness.attack_losses import cross_entropy, dlr_loss, margins
from jaxalign.robustness.attack_program import (
    attack_program,
    check_finite,
    check_logits,
    check_rows,
    check_values,
    tracing,
)
from jaxalign.robustness.attack_result import AttackResult, checked_result
from jaxalign.robustness.auto_pgd import AutoPGD
from jaxalign.robustness.fab import AdaptiveBoundary
from jaxalign.robustness.square import Image, SquareSearch, image_shape
from jaxalign.robustness.survivors import (
    Best,
    Search,
    Survivors,
    as_rows,
    attempts,
    by_row,
    check_norm,
    mean_logits,
    ranked_classes,
)
from jaxalign.robustness.threat_model import known, unflatten_rows
from jaxalign.robustness.traced_classifier import traced_classifier
from jaxalign.types import Array, ArrayLike, Key

Apply = Callable[..., Array]
Progress = Callable[[str, int, int], None]

VERSIONS = ("standard", "rand")
EOT = 20  # keys that "rand" averages over
TARGETS = 9
BATCH_SIZES = {"cpu": 128}  # measured: of 64 to 512 rows the larger ones leave the caches
BATCH_SIZE = 1024  # elsewhere


class Stage(NamedTuple):
    """An attack of the cascade, run for each of the `targets` likeliest wrong classes, or once if there are none."""

    name: str
    search: Search
    targets: int


def stages(
    version: str, *, norm: str, classes: int, image: Image, steps: int = 100, queries: int = 5000
) -> list[Stage]:
    """The cascade of AutoAttack for inputs [B, ...] of `classes` classes.

    "standard": Auto-PGD on the cross-entropy, Auto-PGD and FAB towards the nine likeliest wrong classes, or as many as
    there are, and Square. "rand": Auto-PGD on the cross-entropy and on DLR, gradients averaged over 20 keys.
    """
    if version not in VERSIONS:
        raise ValueError(f"auto_attack: version must be one of {', '.join(VERSIONS)}, got {version!r}")
    draws = EOT if version == "rand" else None
    climb = Stage("APGD-CE", AutoPGD(norm=norm, steps=steps, loss=cross_entropy, draws=draws), 0)
    if version == "rand":
        loss = dlr_loss if classes >= 3 else _negative_margin
        return [climb, Stage("APGD-DLR", AutoPGD(norm=norm, steps=steps, loss=loss, draws=draws), 0)]
    targets = min(TARGETS, classes - 1)
    towards = AutoPGD(norm=norm, steps=steps, loss=targeted_loss(classes), targeted=True)
    return [
        climb,
        Stage("APGD-T", towards, targets),
        Stage("FAB-T", AdaptiveBoundary(norm=norm, steps=steps), targets),
        Stage("Square", SquareSearch(norm=norm, queries=queries, image=image), 0),
    ]


def auto_attack(
    key: Key,
    apply: Apply,
    x: Any,
    y: ArrayLike,
    epsilon: ArrayLike,
    *,
    norm: str = "linf",
    version: str = "standard",
    bounds: Any = (0.0, 1.0),
    steps: int = 100,
    queries: int = 5000,
    batch_size: int | None = None,
    progress: Progress | None = None,
) -> AttackResult:
    """The worst case over a cascade of attacks, each of them on the examples that those before it did not break.

    "standard" runs APGD-CE, targeted APGD on DLR and targeted FAB with 9 targets each, and Square; "rand", for a
    randomised `apply`, APGD-CE and APGD-DLR with gradients averaged over 20 keys. The budgets are the paper's (Croce &
    Hein 2020, arXiv:2003.01690, section 6). With C classes there are min(9, C - 1) targets; with fewer than four the
    targeted DLR loss is undefined and `z[target] - z[y]` takes its place, with fewer than three -margin that of DLR.

    Outside a trace the survivors are gathered anew into batches of a few sizes for every attack and target, and within
    each of them as rows fall. One batch at a time is on the device, on a CPU up to four. Inside a
    trace (jit, vmap) the same cascade runs on all of x at once, each of its loops up to the last row that still stands.
    The two draw different random numbers.

    Args:
        apply: x[B, ...] -> logits [B, C]; for "rand" (x, key) -> logits.
        x: leaves [B, ...] inside the box.
        y: [B] int, the true classes.
        epsilon: scalar or [B], in the units of x.
        norm: "linf" or "l2".
        bounds: the box (lower, upper) or None.
        steps: of each walk of APGD and FAB.
        queries: of Square.
        batch_size: rows at a time, outside a trace; None is 128 on a CPU and 1024 elsewhere.
        progress: called outside a trace as `(name of the attack, examples left, examples)` before each attack and
            target, and at the end with "".

    Returns an AttackResult; `1 - mean(success)` is the robust accuracy. Raises ValueError if the norm is "l1", if the
    version is unknown, and for bad input as every attack does.
    """
    check_norm("auto_attack", known(norm))
    x, y = jax.tree.map(jnp.asarray, (x, y))
    options = {"norm": norm, "version": version, "bounds": bounds, "steps": steps, "queries": queries}
    eot = EOT if version == "rand" else None
    program = traced_classifier(apply, x, *((key,) if eot else ()))
    if tracing(key, x, y, epsilon, bounds, program.consts):
        return _cascade(key, apply, x, y, epsilon, eot=eot, **options)
    rows = check_rows("auto_attack", x, y, epsilon)
    classes = check_logits("auto_attack", program, rows)
    check_values("auto_attack", x, y, epsilon, bounds, classes)
    if batch_size is None:
        batch_size = BATCH_SIZES.get(jax.default_backend(), BATCH_SIZE)
    if rows == 0 or batch_size < 1:
        raise ValueError(f"auto_attack: needs rows and a batch_size of at least 1, got x of {rows} and {batch_size}")
    del program
    attacks = stages(version, norm=norm, classes=classes, image=image_shape(x), steps=steps, queries=queries)
    look_key, *stage_keys, end_key = jax.random.split(key, len(attacks) + 2)
    survivors = Survivors(
        look_key, apply, x, y, epsilon, norm=norm, bounds=bounds, batch_size=min(batch_size, rows), draws=eot
    )
    check_finite("auto_attack", survivors.clean)
    report = progress or (lambda *_: None)
    targets = np.asarray(_ranked(survivors.logits, y, min(TARGETS, classes - 1)))
    for stage, stage_key in zip(attacks, stage_keys, strict=True):
        for k in range(max(1, stage.targets)):
            report(stage.name, len(survivors.alive), rows)
            survivors.attempt(stage.search, jax.random.fold_in(stage_key, k), targets[k] if stage.targets else None)
    report("", len(survivors.alive), rows)
    return check_finite("auto_attack", survivors.result(end_key))


_ranked = jax.jit(ranked_classes, static_argnums=2)


@attack_program(static=("norm", "version", "steps", "queries", "eot"))
def _cascade(
    key: Key, apply: Apply, x: Any, y: ArrayLike, epsilon: ArrayLike, *,
    norm: str, version: str, bounds: Any, steps: int, queries: int, eot: int | None,
) -> AttackResult:  # fmt: skip
    """`auto_attack` as one pure function of leaves [B, ...]."""
    rows, row_apply = as_rows(x, y, epsilon, bounds), by_row(apply, x)
    look_key, *stage_keys, end_key = jax.random.split(key, 6)
    logits = mean_logits(look_key, row_apply, rows.x, eot)
    best = Best(rows.x, margins(logits, rows.y))
    classes = logits.shape[1]
    attacks = stages(version, norm=norm, classes=classes, image=image_shape(x), steps=steps, queries=queries)
    for stage, stage_key in zip(attacks, stage_keys, strict=False):
        targets = ranked_classes(logits, rows.y, stage.targets) if stage.targets else rows.y[None]
        best = attempts(stage.search, stage_key, row_apply, rows, targets, best)
    final = lambda x_adv: mean_logits(end_key, apply, x_adv, eot)  # noqa: E731
    return checked_result(final, x, unflatten_rows(best.x_adv, x), y, epsilon, norm=norm, bounds=bounds)


def _negative_margin(logits: Array, y: Array) -> Array:
    """-margins of logits [B, C], what "rand" climbs in place of DLR where there are two classes."""
    return -margins(logits, y)
