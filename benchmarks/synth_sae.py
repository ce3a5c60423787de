"""Does an SAE trained here find known features as well as one trained by SAELens, on the same samples, and how soon?

The world is SYNTH_SAE_BENCH_SMALL: 256 features in 64 dimensions, Zipf frequencies, correlations, hierarchies of
exclusive siblings. Both sides see the same batches in the same order, have the same sizes, coefficients, learning rate
and schedule (Adam, gradients clipped to norm 1 as SAELens always does, the rate falling to 0 over the last fifth), and
differ in how they start, what they do for dead latents, and how they compute. `f1` is the mean over latents of the
detection of the closest true feature, `mcc` the mean |cosine| under the best one-to-one matching, `ev` explained
variance, all on 16,384 held-out samples in the form an SAE is saved in, by one NumPy judge; "+-" is half of Student's
95% interval over seeds. A sample is one training run from start to end, without compilation.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.measure import Measurement, measure
from benchmarks.synth_sae_problem import Problem, judge, order_of, path_of, read, summarise
from jaxalign import Algorithm
from jaxalign.interpretability.sae_config import SAEConfig
from jaxalign.interpretability.sae_features import sae_decode, sae_encode
from jaxalign.interpretability.sparse_autoencoder import sparse_autoencoder
from jaxalign.interpretability.synthetic_features import SYNTH_SAE_BENCH_SMALL, sample_features, synthetic_features

TESTED = 16384
ARCHITECTURES = {
    "topk": {"k": 3},
    "batchtopk": {"k": 3},
    "matryoshka": {"k": 3, "widths": [16, 48, 128]},
    "jumprelu": {"sparsity": 1.0, "bandwidth": 2.0, "threshold": 0.1},
    "relu": {"sparsity": 3.0},
}


def cases(quick: bool) -> list[dict[str, Any]]:
    """One architecture each."""
    steps = 1000 if quick else 8000
    shared = {
        "world": 0, "seeds": 4, "steps": steps, "decay": steps // 5, "warm_up": steps // 4, "batch": 512, "d_sae": 128,
        "learning_rate": 3e-3, "aux_coefficient": 1.0, "dead_steps": 100, "threads": 1,
    }  # fmt: skip
    return [{"name": name, "activation": name, **shared, **more} for name, more in ARCHITECTURES.items()]


def prepare(cases: list[dict[str, Any]]) -> None:
    """Draw the samples of the cases, where they are not there yet."""
    for case in {path_of(case): case for case in cases}.values():
        path = path_of(case)
        if path.exists():
            continue
        data = jax.jit(functools.partial(synthetic_features, **SYNTH_SAE_BENCH_SMALL))(jax.random.key(case["world"]))
        draw = jax.jit(sample_features, static_argnums=2)
        keys = jax.random.split(jax.random.key(case["world"] + 1), case["steps"] + 1)
        batches = np.stack([np.asarray(draw(data, key, case["batch"])[0]) for key in keys[1:]])
        x, features = draw(data, keys[0], TESTED)
        path.parent.mkdir(parents=True, exist_ok=True)
        np.savez(path, batches=batches, x=x, features=features, dictionary=data.dictionary)


def run(case: dict[str, Any]) -> Measurement:
    """Samples per second of a training run, one run per seed."""
    problem = read(case)
    config = config_of(case, problem)
    batches = jnp.asarray(problem.batches)
    rate = optax.linear_schedule(case["learning_rate"], 0.0, case["decay"], case["steps"] - case["decay"])
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(rate))

    def train(key: jax.Array, order: jax.Array, batches: jax.Array) -> Any:
        algorithm: Algorithm = sparse_autoencoder(config, optimizer)

        def step(state: Any, index: jax.Array) -> tuple[Any, None]:
            return algorithm.step(state, batches[index])[0], None

        return jax.lax.scan(step, algorithm.init(key), order)[0].params

    found: list[Any] = []

    def inputs(seed: int) -> tuple[Any, ...]:
        return jax.random.key(seed), jnp.asarray(order_of(case, seed)), batches

    def advance(_: Any, params: Any) -> tuple[Any, ...]:
        found.append(params)
        return inputs(len(found))

    measurement = measure(
        train,
        *inputs(0),
        unit="samples",
        amount=case["steps"] * case["batch"],
        warmup=0,
        repeats=case["seeds"] - 1,
        budget=float("inf"),
        advance=advance,
        quality=lambda params: found.append(params) or {},
    )
    scores = [score(params, config, problem) for params in found]
    measurement.quality = summarise(scores)
    measurement.details = {"by seed": scores}
    return measurement


def config_of(case: dict[str, Any], problem: Problem) -> SAEConfig:
    """The case as a configuration."""
    return SAEConfig(
        d_in=problem.x.shape[1],
        d_sae=case["d_sae"],
        activation=case["activation"],
        k=case.get("k", 1),
        widths=tuple(case.get("widths", ())),
        sparsity=case.get("sparsity", 0.0),
        sparsity_warm_up=case["warm_up"],
        bandwidth=case.get("bandwidth", 0.05),
        initial_threshold=case.get("threshold", 0.01),
        aux_coefficient=case["aux_coefficient"],
        dead_after=case["dead_steps"] * case["batch"],
    )


def score(params: Any, config: SAEConfig, problem: Problem) -> dict[str, float]:
    """The judge's figures."""
    latents = sae_encode(params, problem.x, config)
    x_hat = sae_decode(params, latents, config)
    return judge(np.asarray(latents), np.asarray(x_hat), np.asarray(params["W_dec"]), problem)
