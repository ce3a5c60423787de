"""The peer of the irl benchmark: imitation's MCEIRL, one JSON case on stdin, one JSON object on stdout.

The case is one of benchmarks/irl.py; the problem is made from its seed by the same NumPy code as for our side. The
transition matrix is given in float64, which imitation computes in: its own random MDPs are float32, which NumPy
converts anew at every step, so `details` tells the median iteration with such a matrix as well.
"""

import contextlib
import importlib.metadata
import json
import pathlib
import statistics
import sys
import time

import numpy as np
import torch
from imitation.algorithms.mce_irl import MCEIRL
from imitation.rewards.reward_nets import RewardNet
from seals.base_envs import TabularModelPOMDP

from benchmarks.irl_problem import dense, make_problem, summarise


class LinearReward(RewardNet):
    """features @ weights, from weights 0."""

    def __init__(self, env, size):
        super().__init__(env.observation_space, env.action_space)
        self.weights = torch.nn.Parameter(torch.zeros(size))

    def forward(self, state, action, next_state, done):
        return state @ self.weights


class TimedMCEIRL(MCEIRL):
    """MCEIRL that keeps the seconds of each iteration and the weights after it."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.seconds, self.cpu_seconds, self.history = [], [], []

    def _train_step(self, observations):
        cpu_began, began = time.process_time(), time.perf_counter()
        result = super()._train_step(observations)
        self.seconds.append(time.perf_counter() - began)
        self.cpu_seconds.append(time.process_time() - cpu_began)
        self.history.append(self.reward_net.weights.detach().numpy().copy())
        return result


def fit(case, problem, dtype, iterations):
    """Train for so many iterations, with no early end, on a transition matrix of this dtype."""
    env = TabularModelPOMDP(
        transition_matrix=dense(problem).astype(dtype),
        observation_matrix=problem.features.astype(np.float32),
        reward_matrix=problem.reward,
        horizon=case["horizon"],
        initial_state_dist=problem.initial,
    )
    learner = TimedMCEIRL(
        problem.expert.sum(axis=(0, 2)) + problem.final,  # imitation counts the state after the last step too
        env,
        LinearReward(env, case["features"]),
        np.random.default_rng(0),
        optimizer_kwargs={"lr": case["learning_rate"]},
        linf_eps=0.0,
        grad_l2_eps=0.0,
        log_interval=None,
    )
    learner.train(max_iter=iterations)
    return learner


def process_peak_bytes():
    """Peak resident memory of this process, or None where the system does not tell."""
    status = pathlib.Path("/proc/self/status")
    if not status.exists():
        return None
    return next(int(line.split()[1]) * 1024 for line in status.open() if line.startswith("VmHWM:"))


def run(case):
    """The record: samples in seconds per iteration, the first apart, and the quality reached."""
    problem = make_problem(case)
    learner = fit(case, problem, np.float64, case["iterations"])
    peak = process_peak_bytes()
    single = fit(case, problem, np.float32, min(4, case["iterations"])).seconds[1:]
    steady = learner.seconds[1:]
    return {
        "side": f"imitation {importlib.metadata.version('imitation')}",
        "unit": "iterations",
        "amount": 1.0,
        "first": learner.seconds[0],
        "samples": steady,
        "cpu_samples": learner.cpu_seconds[1:],
        "arithmetic": "float64",
        "process_peak_bytes": peak,
        "quality": summarise(problem, learner.history, case["threshold"], statistics.median(steady)),
        "details": {
            "weights": learner.history[-1].tolist(),
            "float32_transition_median": statistics.median(single),
            "threads": torch.get_num_threads(),
        },
        "environment": {
            "device_kind": "cpu",
            "python": sys.version.split()[0],
            **{name: importlib.metadata.version(name) for name in ("imitation", "seals", "torch", "numpy")},
        },
    }


if __name__ == "__main__":
    with contextlib.redirect_stdout(sys.stderr):
        record = run(json.load(sys.stdin))
    print(json.dumps(record))
