"""The peers of the gae benchmark, rlax or TorchRL: one JSON case on stdin, one JSON object on stdout."""

import contextlib
import dataclasses
import importlib.metadata
import json
import statistics
import sys

import numpy as np

from benchmarks.environment import process_peak_bytes
from benchmarks.gae_problem import DISCOUNT, GAE_LAMBDA, make_steps, max_error
from benchmarks.measure import measure, measure_host


def run_rlax(case):
    """rlax's truncated GAE, vmapped over the environments; every end of an episode is a terminal one to it."""
    import jax
    import jax.numpy as jnp
    import rlax

    def one(rewards, done, values):
        return rlax.truncated_generalized_advantage_estimation(rewards, DISCOUNT * (1.0 - done), GAE_LAMBDA, values)

    def rollout(arrays):
        rewards, values, done = arrays
        advantages = jax.vmap(one, in_axes=1, out_axes=1)(rewards, done, values)
        return advantages, advantages + values[:-1]

    def estimate(*arrays):
        return jax.lax.map(rollout, arrays)

    def arrays(steps):
        values = np.concatenate([steps.values, steps.beyond[:, None]], axis=1)
        return [jnp.asarray(x) for x in (steps.rewards, values, steps.done)]

    jax.config.update("jax_enable_compilation_cache", False)
    steps, terminal = make_steps(case), make_steps(case, truncation=False)
    record = measure(
        estimate,
        *arrays(steps),
        unit="steps",
        amount=case["steps"] * case["environments"] * case["rollouts"],
        repeats=case["repeats"],
        quality=lambda out: {
            "max_error": max_error(out[0], steps),
            "max_error_terminal": max_error(jax.jit(estimate)(*arrays(terminal))[0], terminal),
        },
    )
    return record, jax.devices()[0].device_kind, ("rlax", "jax", "jaxlib")


def run_torchrl(case):
    """TorchRL's vectorised form and its loop: the faster is the record, both medians are in its details."""
    import torch
    from torchrl.objectives.value.functional import generalized_advantage_estimate, vec_generalized_advantage_estimate

    device = "cuda" if torch.cuda.is_available() else "cpu"

    def arrays(steps):
        order = (steps.values, steps.next_values, steps.rewards, steps.done, steps.terminated)
        return [torch.as_tensor(x.swapaxes(1, 2)[..., None].copy(), device=device) for x in order]

    def timed(form):
        @torch.no_grad()
        def estimate(*steps):
            found = [form(DISCOUNT, GAE_LAMBDA, *rollout) for rollout in zip(*steps, strict=True)]
            if device == "cuda":
                torch.cuda.synchronize()
            return found

        def back(out):
            return np.stack([advantages[..., 0].T.cpu().numpy() for advantages, _ in out])

        return measure_host(
            estimate,
            *arrays(steps),
            unit="steps",
            amount=case["steps"] * case["environments"] * case["rollouts"],
            repeats=case["repeats"],
            quality=lambda out: {
                "max_error": max_error(back(out), steps),
                "max_error_terminal": max_error(back(estimate(*arrays(terminal))), terminal),
            },
        )

    steps, terminal = make_steps(case), make_steps(case, truncation=False)
    forms = {"vectorised": vec_generalized_advantage_estimate, "loop": generalized_advantage_estimate}
    records = {name: timed(form) for name, form in forms.items()}
    medians = {name: statistics.median(record.samples) for name, record in records.items()}
    fastest = min(medians, key=medians.get)
    record = records[fastest]
    record.details = {"form": fastest, "medians": medians, "threads": torch.get_num_threads()}
    kind = torch.cuda.get_device_name() if device == "cuda" else "cpu"
    return record, kind, ("torchrl", "torch")


def run(case):
    """The record of the peer that the case names."""
    record, kind, packages = {"rlax": run_rlax, "torchrl": run_torchrl}[case["peer"]](case)
    return {
        **dataclasses.asdict(record),
        "side": f"{packages[0]} {importlib.metadata.version(packages[0])}",
        "arithmetic": "float32",
        "process_peak_bytes": process_peak_bytes(),
        "environment": {
            "device_kind": kind,
            "python": sys.version.split()[0],
            **{name: importlib.metadata.version(name) for name in (*packages, "numpy")},
        },
    }


if __name__ == "__main__":
    with contextlib.redirect_stdout(sys.stderr):
        answer = run(json.load(sys.stdin))
    print(json.dumps(answer))
