"""Ending a `fit` whose lanes have all stopped."""

from typing import Any

import numpy as np

from jaxalign.runtime.fit import StopTraining


def stop_when_all_stopped(step: int, state: Any, metrics: dict[str, np.ndarray]) -> None:
    """A callback of `fit` for `with_early_stopping`: raises StopTraining once every lane of the run has stopped.

    `fit` calls it after each chunk, so the metrics may go on for a few steps in which nothing changed: those after the
    first whose "validation/stopped" is 1.
    """
    if np.all(metrics["validation/stopped"][-1] > 0):
        raise StopTraining
