"""Auto-PGD: projected gradient ascent that sets its own step sizes (Croce & Hein 2020, arXiv:2003.01690)."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxalign.robustness.attack_losses import cross_entropy, dlr_loss, margins, targeted_dlr_loss
from jaxalign.robustness.attack_program import attack_program
from jaxalign.robustness.attack_result import AttackResult, checked_result
from jaxalign.robustness.auto_pgd import AutoPGD
from jaxalign.robustness.sparse_auto_pgd import SparseAutoPGD
from jaxalign.robustness.survivors import Best, as_rows, attempts, by_row, mean_logits, ranked_classes
from jaxalign.robustness.threat_model import unflatten_rows
from jaxalign.types import Array, ArrayLike, Key

Apply = Callable[..., Array]
Loss = Callable[[Array, Array], Array]

LOSSES: dict[str, Loss] = {"ce": cross_entropy, "dlr": dlr_loss}


def auto_pgd(norm: str) -> type[AutoPGD]:
    """The search for this norm, on rows [B, D]."""
    return SparseAutoPGD if norm == "l1" else AutoPGD


def targeted_margin(logits: Array, y: Array, target: Array) -> Array:
    """z[target] - z[y] of logits z [B, C]: [B], what a targeted attack climbs where C is too small for DLR."""
    at = lambda labels: jnp.take_along_axis(logits, labels[:, None], axis=1)[:, 0]  # noqa: E731
    return at(target) - at(y)


def targeted_loss(classes: int) -> Callable[[Array, Array, Array], Array]:
    """The targeted DLR loss, or the difference of two logits [B, C] where C < 4 leaves it undefined."""
    return targeted_dlr_loss if classes >= 4 else targeted_margin


@attack_program(static=("norm", "steps", "restarts", "loss", "eot"))
def apgd(
    key: Key,
    apply: Apply,
    x: Any,
    y: ArrayLike,
    epsilon: ArrayLike,
    *,
    norm: str = "linf",
    steps: int = 100,
    restarts: int = 1,
    loss: str | Loss = "ce",
    bounds: Any = (0.0, 1.0),
    rho: ArrayLike = 0.75,
    eot: int | None = None,
) -> AttackResult:
    """Auto-PGD: ascent on the loss with momentum, whose step sizes start at 2 epsilon and halve where it stalls.

    `z = P(x + size direction);  x' = P(x + 0.75 (z - x) + 0.25 (x - previous))`

    with P onto ball and box and the norm's steepest direction. At the checkpoints w_j (see `checkpoints`) a row's size
    is halved, and the row goes back to its point of largest loss, if fewer than rho (w_j - w_{j-1}) steps since
    w_{j-1} raised the loss, or if neither the size nor the largest loss have changed since (Croce & Hein 2020,
    arXiv:2003.01690, Algorithm 1). For "l1" steps are sparse and without momentum: `SparseAutoPGD` (Croce & Hein 2021,
    arXiv:2103.01208). It ends when every row has met a point that is misclassified.

    Args:
        apply: x[B, ...] -> logits [B, C]; with `eot` (x, key) -> logits.
        x: leaves [B, ...] inside the box.
        y: [B] int, the true classes.
        epsilon: scalar or [B], in the units of x.
        norm: "linf", "l2" or "l1".
        steps, restarts: how many of each.
        loss: "ce" the cross-entropy, "dlr" the difference of logits ratio, or `(logits [B, C], y [B]) -> [B]`.
        bounds: the box (lower, upper) or None.
        rho: see above; without effect for "l1".
        eot: for a randomised classifier, the keys over which each gradient, and at the end the logits, are averaged.

    Returns an AttackResult. Raises ValueError for "dlr" with fewer than three classes.
    """
    if isinstance(loss, str) and loss not in LOSSES:
        raise ValueError(f"apgd: loss must be one of {', '.join(LOSSES)} or a function, got {loss!r}")
    search = auto_pgd(norm)(rho, norm, steps, LOSSES[loss] if isinstance(loss, str) else loss, False, eot)
    start_key, key, end_key = jax.random.split(key, 3)
    rows, row_apply = as_rows(x, y, epsilon, bounds), by_row(apply, x)
    start = Best(rows.x, margins(mean_logits(start_key, row_apply, rows.x, eot), rows.y))
    best = attempts(search, key, row_apply, rows, jnp.tile(rows.y, (restarts, 1)), start)
    final = lambda x_adv: mean_logits(end_key, apply, x_adv, eot)  # noqa: E731
    return checked_result(final, x, unflatten_rows(best.x_adv, x), y, epsilon, norm=norm, bounds=bounds)


@attack_program(static=("norm", "steps", "num_targets", "loss"))
def apgd_targeted(
    key: Key,
    apply: Apply,
    x: Any,
    y: ArrayLike,
    epsilon: ArrayLike,
    *,
    norm: str = "linf",
    steps: int = 100,
    num_targets: int = 9,
    loss: str | Callable[[Array, Array, Array], Array] = "dlr",
    bounds: Any = (0.0, 1.0),
    rho: ArrayLike = 0.75,
) -> AttackResult:
    """Auto-PGD towards one class after another: any misclassification is a success.

    The targets of a row are the `num_targets` classes other than y with the largest logits at x, the largest first, and
    no more than there are (Croce & Hein 2020, arXiv:2003.01690, section 5).

    Args:
        apply: x[B, ...] -> logits [B, C].
        x: leaves [B, ...] inside the box.
        y: [B] int, the true classes.
        epsilon: scalar or [B], in the units of x.
        norm: "linf", "l2" or "l1".
        steps: for each target.
        loss: "dlr" the targeted difference of logits ratio (equation 7; with fewer than four classes, where that is
            undefined, `z[target] - z[y]`), or `(logits [B, C], y [B], target [B]) -> [B]`.
        bounds: the box (lower, upper) or None.
        rho: as in `apgd`.

    Returns an AttackResult.
    """
    if isinstance(loss, str) and loss != "dlr":
        raise ValueError(f"apgd_targeted: loss must be 'dlr' or a function, got {loss!r}")
    rows, row_apply = as_rows(x, y, epsilon, bounds), by_row(apply, x)
    logits = row_apply(rows.x)
    search = auto_pgd(norm)(rho, norm, steps, targeted_loss(logits.shape[1]) if isinstance(loss, str) else loss, True)
    targets = ranked_classes(logits, rows.y, min(num_targets, logits.shape[1] - 1))
    best = attempts(search, key, row_apply, rows, targets, Best(rows.x, margins(logits, rows.y)))
    return checked_result(apply, x, unflatten_rows(best.x_adv, x), y, epsilon, norm=norm, bounds=bounds)
