"""Certificates held against attacks; an example that breaks one is kept in the run's directory."""

from pathlib import Path

import numpy as np

from jaxalign.certification.self_check import contradictions
from jaxalign.robustness.attack_result import AttackResult
from jaxalign.types import ArrayLike

FILE = "broken-certificates.npz"
NAMED = 10  # rows named in the message


class BrokenCertificateError(Exception):
    """An attack succeeded inside a certificate: the certifier or the attack is wrong, and no other row can be trusted.

    rows: which; path: the examples
    """

    def __init__(self, message: str, rows: np.ndarray, path: Path) -> None:
        super().__init__(message)
        self.rows, self.path = rows, path


def check_certificates(
    directory: Path,
    certified: ArrayLike,
    attack: AttackResult,
    x: ArrayLike,
    y: ArrayLike,
    epsilon: ArrayLike,
    *,
    norm: str = "linf",
) -> None:
    """Raise BrokenCertificateError if `contradictions` finds any, after writing the examples to `directory`.

    Args:
        certified: [B] bool; x: [B, ...]; y: [B], the classes certified; epsilon: scalar or [B]; as in `contradictions`.

    broken-certificates.npz holds of these rows: row, x, x_adv, y, epsilon (certified), distance (of x_adv, largest
    change of an entry), margin (of the logits at x_adv).
    """
    rows = np.flatnonzero(np.asarray(contradictions(certified, attack, x, epsilon, norm=norm)))
    if not rows.size:
        return
    x, x_adv = np.asarray(x)[rows], np.asarray(attack.x_adv)[rows]
    radius = np.broadcast_to(np.asarray(epsilon), np.shape(certified))[rows]
    distance = np.abs(x_adv - x).reshape(len(rows), -1).max(axis=1)
    margin = np.asarray(attack.margin)[rows]
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / FILE
    np.savez_compressed(
        path, row=rows, x=x, x_adv=x_adv, y=np.asarray(y)[rows], epsilon=radius, distance=distance, margin=margin
    )
    named = ", ".join(str(row) for row in rows[:NAMED]) + (", ..." if len(rows) > NAMED else "")
    worst = int(margin.argmin())
    raise BrokenCertificateError(
        f"{len(rows)} of {np.size(certified)} rows are certified and yet broken by an attack inside their certificate: "
        f"{named}. Row {rows[worst]} is certified at {radius[worst]:g} and wrong by {-margin[worst]:.3g} logits at "
        f"distance {distance[worst]:.6g}. No certificate of this run can be trusted. The examples are in {path}",
        rows,
        path,
    )
