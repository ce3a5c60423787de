"""What `jaxalign overoptimize` does: two sweeps, of single reward models and of ensembles, and what they show."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType
from rich.console import Console

from jaxalign.cli.overoptimize import Overoptimize
from jaxalign.cli.overoptimize_report import base_setting, write_report
from jaxalign.cli.ppo_run import use_all_cores as use_all_cores
from jaxalign.rlhf.overoptimization_study import Curves, Setting, over_optimization
from jaxalign.runtime.resumable_sweep import resumable_sweep

HORIZON = 24
DIRECTORIES = ("single", "ensemble")


def run(options: Overoptimize, console: Console) -> dict[str, Any]:
    """The whole job; returns what was measured."""
    if not options.resume and any((options.out / name).exists() for name in DIRECTORIES):
        raise FileExistsError(f"{options.out} holds a run: add --resume to go on with it, or choose another --out")
    _check(options)
    use_all_cores()
    names, settings = single_settings(options)
    console.print(f"{len(names)} settings of one reward model, then an ensemble of {options.members}")
    singles = _sweep(options, console, "single", settings, members=1)
    ensembles = _sweep(options, console, "ensemble", ensemble_setting(options), members=options.members)
    curves: dict[Any, Curves] = {name: _way(singles, i, 0) for i, name in enumerate(names)}
    curves |= {name: _way(ensembles, 0, way) for way, name in enumerate(ensemble_names(options))}
    report, results = write_report(options, best_of(options), curves)
    report.print(console)
    console.print(f"Report: {options.out / 'report.html'}")
    return results


def best_of(options: Overoptimize) -> tuple[int, ...]:
    """The n that are measured: powers of two up to --most."""
    return tuple(2**i for i in range(options.most.bit_length()))


def single_settings(options: Overoptimize) -> tuple[list[tuple[Any, ...]], Setting]:
    """Names (width, preferences, KL coefficient) and settings [H] of what needs one reward model; A = 1."""
    widest, most = max(options.widths), max(options.preferences)
    pairs = [(widest, count) for count in options.preferences] + [(width, most) for width in options.widths]
    base = base_setting(options)
    names = list(dict.fromkeys([*((*pair, 0.0) for pair in pairs), base]))
    names += [(*base[:2], coefficient) for coefficient in options.kl_coefficient]
    zeros = jnp.zeros((len(names), 1))
    widths, counts = (jnp.array([name[i] for name in names]) for i in (0, 1))
    penalties = jnp.array([[name[2]] for name in names], jnp.float32)
    return names, Setting(widths, counts, zeros, zeros > 0, penalties)


def ensemble_names(options: Overoptimize) -> list[str]:
    """The ways of using an ensemble: its mean, bounds below it, its least member."""
    return ["ensemble mean", *(f"mean - {c:g} std" for c in options.caution), "worst case"]


def ensemble_setting(options: Overoptimize) -> Setting:
    """Those ways at the base setting: H = 1, A ways."""
    width, count, _ = base_setting(options)
    caution = jnp.array([[0.0, *options.caution, 0.0]], jnp.float32)
    worst = jnp.arange(caution.shape[1])[None, :] == caution.shape[1] - 1
    return Setting(jnp.array([width]), jnp.array([count]), caution, worst, jnp.zeros_like(caution))


def _sweep(options: Overoptimize, console: Console, name: str, settings: Setting, *, members: int) -> Curves:
    """Curves [H, S, ...], kept in a directory of their own as they are done."""
    sizes: dict[str, Any] = {
        "ns": best_of(options), "members": members, "max_width": max(options.widths),
        "max_preferences": max(options.preferences), "samples": options.samples,
        "reward_steps": options.reward_steps, "checks": options.checks, "rollouts_per_check": options.rollouts,
        "horizon": HORIZON, "beta": options.annotator_beta, "learning_rate": options.learning_rate,
    }  # fmt: skip
    devices = math.gcd(jax.device_count(), options.seeds)
    mesh = jax.make_mesh((devices,), ("sweep",), axis_types=(AxisType.Auto,), devices=jax.devices()[:devices])
    found = resumable_sweep(
        functools.partial(over_optimization, **sizes),
        settings,
        jax.random.split(jax.random.key(options.seed), options.seeds),
        directory=options.out / name,
        lanes=options.seeds,
        fingerprint={**sizes, "ns": list(sizes["ns"])},
        mesh=mesh,
        # One lane after another on each core of a CPU: side by side their small matrices gain nothing.
        mode="map" if jax.default_backend() == "cpu" else "vmap",
        progress=console,
    )
    for field, values in found._asdict().items():
        if not np.isfinite(values).all():
            raise FloatingPointError(f"{name}: {field} is not finite in {(~np.isfinite(values)).sum()} places")
    return found


def _way(curves: Curves, setting: int, way: int) -> Curves:
    """One way of optimising the proxies of one setting: fields [S, ...]."""
    accuracy, *rest = (x[setting] for x in curves)
    return Curves(accuracy, *(x[:, way] for x in rest))


def _check(options: Overoptimize) -> None:
    """Raises ValueError naming an option that makes no sense."""
    for name in ("seeds", "members", "samples", "checks", "rollouts"):
        if getattr(options, name) < 1:
            raise ValueError(f"--{name} must be at least 1, got {getattr(options, name)}")
    if not 1 <= options.most <= options.samples:
        raise ValueError(f"--most must be in 1..{options.samples} (--samples), got {options.most}")
    if not options.widths or min(options.widths) < 1:
        raise ValueError(f"--widths must be 1 or more, got {options.widths}")
    if not options.preferences or min(options.preferences) < 10:
        raise ValueError(f"--preferences must be 10 or more, a fifth is held out; got {options.preferences}")
    if options.samples % 2:
        raise ValueError(f"--samples must be even, accuracy is over pairs of them; got {options.samples}")
    if options.reward_steps < 20:
        raise ValueError(f"--reward-steps must be at least 20, got {options.reward_steps}")
