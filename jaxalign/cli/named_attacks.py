"""The attacks that the command line knows by name, and their results, kept on disk so that none is run twice."""

import functools
import hashlib
import json
import zipfile
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

from jaxalign import Network
from jaxalign.cli.classifiers import Classifier
from jaxalign.robustness.apgd import apgd
from jaxalign.robustness.attack_result import AttackResult, checked_result
from jaxalign.robustness.auto_attack import auto_attack
from jaxalign.robustness.carlini_wagner import carlini_wagner
from jaxalign.robustness.evaluation import RobustnessEvaluation, robustness_evaluation
from jaxalign.robustness.fab import fab
from jaxalign.robustness.pgd import fgsm, pgd
from jaxalign.robustness.square import square
from jaxalign.types import Array, Key, Params

BOUNDS = (0.0, 1.0)
NORMS = {"cw": ("l2",)} | dict.fromkeys(("apgd", "square", "auto_attack"), ("linf", "l2"))  # the others: all
Run = Callable[[Key, Any, Any, Any, Any], AttackResult]


class NamedAttack(NamedTuple):
    """run: `(key, apply, x [B, ...], y [B], epsilon) -> AttackResult`; settings: what decides its result, beside these.

    nearest: the attack looks for the nearest adversarial image whatever epsilon is, so one run serves for all of them.
    """

    run: Run
    settings: dict[str, Any]
    nearest: bool = False


def named_attacks(
    names: Collection[str], *, norm: str, console: Console, steps: int = 40, restarts: int = 1
) -> dict[str, NamedAttack]:
    """The attacks of these names; `steps` and `restarts` are pgd's. Raises ValueError for one that has no such norm."""
    shared: dict[str, Any] = {"norm": norm, "bounds": BOUNDS}
    if without := [name for name in names if norm not in NORMS.get(name, (norm,))]:
        raise ValueError(f"{without[0]} is an attack in {' or '.join(NORMS[without[0]])}, not in --norm {norm}")

    def one_step(key: Key, apply: Classifier, x: Array, y: Array, epsilon: Any) -> AttackResult:
        return _fgsm(apply.network, apply.params, x, y, epsilon, norm=norm)

    def many_steps(key: Key, apply: Classifier, x: Array, y: Array, epsilon: Any) -> AttackResult:
        return pgd(key, apply, x, y, epsilon, steps=steps, restarts=restarts, **shared)

    def nearest_l2(key: Key, apply: Classifier, x: Array, y: Array, epsilon: None) -> AttackResult:
        return carlini_wagner(apply, x, y, bounds=BOUNDS)

    def in_ball(attack: Callable[..., AttackResult], **options: Any) -> Run:
        return lambda key, apply, x, y, epsilon: attack(key, apply, x, y, epsilon, **shared, **options)

    known = {
        "fgsm": NamedAttack(one_step, {}),
        "pgd": NamedAttack(many_steps, {"steps": steps, "restarts": restarts}),
        "apgd": NamedAttack(in_ball(apgd), {}),
        "square": NamedAttack(in_ball(square), {}),
        "auto_attack": NamedAttack(in_ball(auto_attack, progress=_stages(console)), {}),
        "fab": NamedAttack(in_ball(fab), {}, nearest=True),
        "cw": NamedAttack(nearest_l2, {}, nearest=True),
    }
    return {name: known[name]._replace(settings={**known[name].settings, "norm": norm}) for name in names}


def _stages(console: Console) -> Callable[[str, int, int], None]:
    """A line for each attack of an ensemble."""
    spoken = ""

    def progress(name: str, left: int, rows: int) -> None:
        nonlocal spoken
        if name and name != spoken:
            console.print(f"  {name}: {left} of {rows} images left", highlight=False)
        spoken = name

    return progress


@functools.partial(jax.jit, static_argnums=0, static_argnames="norm")
def _fgsm(network: Network, params: Params, x: Array, y: Array, epsilon: Any, *, norm: str) -> AttackResult:
    def apply(x: Array) -> Array:
        return network.apply(params, x)

    x_adv = fgsm(apply, x, y, epsilon, norm=norm, bounds=BOUNDS)
    return checked_result(apply, x, x_adv, y, epsilon, norm=norm, bounds=BOUNDS)


@functools.partial(jax.jit, static_argnums=0, static_argnames="norm")
def _checked(
    network: Network, params: Params, x: Array, x_adv: Array, y: Array, epsilon: Any, *, norm: str
) -> AttackResult:
    return checked_result(lambda x: network.apply(params, x), x, x_adv, y, epsilon, norm=norm, bounds=BOUNDS)


class Found(NamedTuple):
    """Of each of B images the adversarial one found at the smallest epsilon, and of those the one of least margin.

    x_adv [B, H, W, C] (the image itself where there is none), epsilon [B] (NaN where there is none), margin [B], in
    logits, attack [B] str
    """

    x_adv: np.ndarray
    epsilon: np.ndarray
    margin: np.ndarray
    attack: np.ndarray


class KeptAttacks:
    """Attacks on one classifier whose results are kept as files in a directory, by a digest of what decides them.

    Images, labels, parameters, key, epsilon and settings are in the digest, so a file is read back only where the same
    would be run again; a damaged one is run again.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._found: dict[bytes, tuple[float, float, str, np.ndarray]] = {}

    def keep(self, name: str, attack: NamedAttack) -> Run:
        """The attack, run only where its result is not there."""
        nearest: dict[bytes, np.ndarray] = {}

        def kept(key: Key, apply: Classifier, x: Any, y: Any, epsilon: Any) -> AttackResult:
            if not attack.nearest:
                result = self._once(name, attack, key, apply, x, y, epsilon)
            else:
                rows = [row.tobytes() for row in np.asarray(x)]
                if not nearest.keys() >= set(rows):
                    searched = self._once(name, attack, key, apply, x, y, None)
                    nearest.update(zip(rows, np.asarray(searched.x_adv), strict=True))
                x_adv = jnp.stack([nearest[row] for row in rows])
                norm = attack.settings["norm"]
                result = _checked(apply.network, apply.params, x, x_adv, y, epsilon, norm=norm)
            self._remember(name, x, float(epsilon), result)
            return result

        return kept

    def found(self, x: np.ndarray) -> Found:
        """What the attacks made of images x [B, H, W, C] so far."""
        none = (np.nan, np.nan, "")
        rows = [self._found.get(row.tobytes(), (*none, row)) for row in np.asarray(x)]
        epsilon, margin, attack, x_adv = zip(*rows, strict=True)
        return Found(np.stack(x_adv), np.array(epsilon), np.array(margin), np.array(attack))

    def _once(
        self, name: str, attack: NamedAttack, key: Key, apply: Classifier, x: Array, y: Array, epsilon: Any
    ) -> AttackResult:
        digest = hashlib.sha256(json.dumps([name, attack.settings], sort_keys=True).encode())
        for part in (jax.random.key_data(key), x, y, epsilon, *jax.tree.leaves(apply.params)):
            digest.update(b"" if part is None else np.ascontiguousarray(part).tobytes())
        path = self._directory / f"{name}-{digest.hexdigest()[:16]}.npz"
        if (result := _read(path)) is None:
            result = jax.block_until_ready(attack.run(key, apply, x, y, epsilon))
            self._directory.mkdir(parents=True, exist_ok=True)
            partial = path.with_suffix(".partial.npz")
            arrays: dict[str, Any] = {field: np.asarray(value) for field, value in result._asdict().items()}
            np.savez_compressed(partial, **arrays)
            partial.replace(path)
        return result

    def _remember(self, name: str, x: Array, epsilon: float, result: AttackResult) -> None:
        success, margin, x_adv = (np.asarray(value) for value in (result.success, result.margin, result.x_adv))
        for i in np.flatnonzero(success):
            row, new = np.asarray(x[i]).tobytes(), (epsilon, float(margin[i]), name, x_adv[i])
            self._found[row] = min(new, self._found.get(row, new), key=lambda entry: entry[:2])


def evaluate(
    key: Key,
    classifier: Classifier,
    x: np.ndarray,
    y: np.ndarray,
    attacks: Mapping[str, NamedAttack],
    epsilons: Sequence[float],
    *,
    kept: KeptAttacks,
    batch_size: int,
    console: Console,
) -> RobustnessEvaluation:
    """`robustness_evaluation` with a line said after each attack at each epsilon."""
    return robustness_evaluation(
        key,
        classifier,
        x,
        y,
        attacks={name: kept.keep(name, attack) for name, attack in attacks.items()},
        epsilons=np.array(epsilons),
        batch_size=batch_size,
        progress=lambda done, total, message: console.print(f"{done}/{total}  {message}", highlight=False),
    )


def _read(path: Path) -> AttackResult | None:
    try:
        with np.load(path, allow_pickle=False) as file:
            return AttackResult(*(jnp.asarray(file[name]) for name in AttackResult._fields))
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None
