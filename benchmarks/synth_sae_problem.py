"""What both sides of the synth_sae benchmark read, and the judge of both, by NumPy and SciPy alone."""

import pathlib
from typing import Any, NamedTuple

import numpy as np
from scipy.optimize import linear_sum_assignment
from scipy.stats import t as student

ROOT = pathlib.Path(__file__).resolve().parent.parent


class Problem(NamedTuple):
    """batches: [T, B, D] to train on; x: [S, D], features: [S, N] to judge by; dictionary: [N, D], all float32."""

    batches: np.ndarray
    x: np.ndarray
    features: np.ndarray
    dictionary: np.ndarray


def path_of(case: dict[str, Any]) -> pathlib.Path:
    """Where `benchmarks.synth_sae.prepare` writes the samples of this case's size."""
    return ROOT / "runs" / "benchmarks" / f"synth-sae-{case['world']}-{case['steps']}x{case['batch']}.npz"


def read(case: dict[str, Any]) -> Problem:
    """The samples of the case."""
    with np.load(path_of(case)) as file:
        return Problem(*(file[name] for name in Problem._fields))


def order_of(case: dict[str, Any], seed: int) -> np.ndarray:
    """[T], the order in which a run with this seed sees the batches; the same on both sides."""
    return np.random.default_rng(seed).permutation(case["steps"])


def judge(latents: np.ndarray, x_hat: np.ndarray, decoder: np.ndarray, problem: Problem) -> dict[str, float]:
    """f1, mcc, ev, l0 and dead of latents [S, F], reconstructions [S, D] and decoder rows [F, D]."""
    decoder = np.asarray(decoder, np.float64)
    unit = decoder / np.maximum(np.linalg.norm(decoder, axis=1, keepdims=True), 1e-12)
    cosines = np.abs(unit @ problem.dictionary.astype(np.float64).T)
    closest, fires = cosines.argmax(axis=1), latents != 0
    true = problem.features[:, closest] > 0
    both, only, missed = (np.sum(pair, axis=0) for pair in (fires & true, fires & ~true, ~fires & true))
    x = problem.x.astype(np.float64)
    return {
        "f1": float(np.mean(2 * both / np.maximum(2 * both + only + missed, 1))),
        "mcc": float(cosines[linear_sum_assignment(-cosines)].mean()),
        "ev": float(1 - np.square(x - x_hat).sum() / np.square(x - x.mean(axis=0)).sum()),
        "l0": float(fires.sum(axis=1).mean()),
        "dead": float(np.mean(~fires.any(axis=0))),
    }


def summarise(scores: list[dict[str, float]]) -> dict[str, float]:
    """Means over seeds, and the half width of Student's 95% interval of each as "f1 +-"."""
    values = {name: np.array([score[name] for score in scores]) for name in scores[0]}
    count = len(scores)
    width = float(student.ppf(0.975, count - 1)) / np.sqrt(count) if count > 1 else float("nan")
    result = {}
    for name, value in values.items():
        result[name] = float(value.mean())
        if count > 1 and name in ("f1", "mcc", "ev"):
            result[f"{name} +-"] = float(width * value.std(ddof=1))
    return result
