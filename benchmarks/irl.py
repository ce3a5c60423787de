"""How fast is maximum causal entropy IRL, and how soon is its reward good, against `imitation` on the same MDPs?

An iteration is a soft backward pass over H = 100 steps, the occupancy of its policy, and an Adam step on a linear
reward. Random MDPs with five successors of each pair, held dense and sparse, and grids held as shifted arrays; the peer
holds them all dense, as it must. Both sides start from weights 0 and get the exact visits of the expert, the peer with
its own count of the state after the last step. One run of ours is the whole fit, one of the peer's is an iteration.
Quality is the value difference when the learned reward is planned with (0 none, 1 as bad as acting at random), and how
soon it fell to 0.02 to stay: iterations times the median iteration, without compilation. NumPy float64 judges both.
"""

import statistics
from typing import Any

import jax
import jax.numpy as jnp
import optax

from benchmarks.irl_problem import dense, make_problem, summarise
from benchmarks.measure import Measurement, measure
from jaxalign import train
from jaxalign.irl import linear_reward, max_causal_entropy_irl
from jaxalign.mdp import SparseTransition, TabularMDP, gridworld

GRIDS = {28: (4, 7), 100: (10, 10), 256: (16, 16), 1024: (32, 32)}


def cases(quick: bool) -> list[dict[str, Any]]:
    """The sizes, each as a random MDP held dense and sparse, and as a grid."""
    shared = {
        "horizon": 10 if quick else 100, "features": 4 if quick else 16, "seed": 0, "iterations": 5 if quick else 40,
        "learning_rate": 0.05, "threshold": 0.02, "repeats": 3,
    }  # fmt: skip
    found = []
    for states in (28,) if quick else GRIDS:
        random = {"states": states, "actions": 4, "branching": 5}
        found += [{"name": f"random, S {states}, {form}", **random, "form": form} for form in ("dense", "sparse")]
        height, width = GRIDS[states]
        found.append({"name": f"grid, S {states}", "height": height, "width": width, "slip": 0.1, "form": "grid"})
    return [{**case, **shared} for case in found]


def run(case: dict[str, Any]) -> Measurement:
    """Iterations per second of a whole fit."""
    problem = make_problem(case)
    if case["form"] == "grid":
        mdp = gridworld(case["height"], case["width"], slip=case["slip"], discount=1.0)
    else:
        probability = jnp.asarray(problem.probability, jnp.float32)
        sparse = SparseTransition(jnp.asarray(problem.next_state, jnp.int32), probability)
        transition = sparse if case["form"] == "sparse" else jnp.asarray(dense(problem), jnp.float32)
        mdp = TabularMDP(transition, problem.initial, jnp.zeros(problem.initial.size, bool), 1.0)
    zero = {"weights": jnp.zeros(case["features"])}
    network = linear_reward(case["features"]).starting_from(zero)

    def fit(mdp: TabularMDP, features: jax.Array, occupancy: jax.Array) -> jax.Array:
        # The data are arguments: with sparse ones as constants XLA's CPU code is slower.
        algorithm = max_causal_entropy_irl(
            mdp, network, optax.adam(case["learning_rate"]), occupancy, features=features, horizon=case["horizon"]
        )

        def step(state: Any, batch: None) -> tuple[Any, dict[str, Any]]:
            state, metrics = algorithm.step(state, batch)
            return state, {**metrics, **state.params}

        _, history = train(algorithm._replace(step=step), jax.random.key(0), None, length=case["iterations"])
        return history["weights"]

    weights = []
    measurement = measure(
        fit,
        mdp,
        jnp.asarray(problem.features, jnp.float32),
        jnp.asarray(problem.expert, jnp.float32),
        unit="iterations",
        amount=case["iterations"],
        warmup=0,
        repeats=case["repeats"],
        quality=lambda out: weights.extend(jax.device_get(out)) or {},
    )
    seconds = statistics.median(measurement.samples) / case["iterations"]
    measurement.quality = summarise(problem, weights, case["threshold"], seconds)
    measurement.details = {"weights": weights[-1].tolist()}
    return measurement
