"""The peer of the bayesian_irl benchmark: PolicyWalk in NumPy, one reward after another; JSON in, JSON out.

As Ramachandran & Amir 2007 have it: one entry of the reward moves, and policy iteration starts from the last policy, so
that most proposals cost one or two linear solves. Steps are of any size up to `peer_step_size`, not of a grid, so that
both sides sample the same density; a step out of the box is refused. The time includes the burn-in.

The problem and the summary of samples are here, in NumPy alone, for both sides.
"""

import contextlib
import json
import pathlib
import statistics
import sys
import time

import numpy as np

MOVES = ((-1, 0), (0, 1), (1, 0), (0, -1), (0, 0))  # (down, right) of up, right, down, left, stay


def make_problem(case):
    """(transition [S, A, S], reward [S], states [N, T], actions [N, T]): a grid and a Boltzmann demonstrator on it."""
    rng = np.random.default_rng(case["seed"])
    height, width = case["height"], case["width"]
    cells = [(y, x) for y in range(height) for x in range(width)]
    moved = np.zeros((len(MOVES), len(cells), len(cells)))
    for m, (down, right) in enumerate(MOVES):
        for s, (y, x) in enumerate(cells):
            inside = 0 <= y + down < height and 0 <= x + right < width
            moved[m, s, (y + down) * width + x + right if inside else s] = 1.0
    transition = np.swapaxes((1 - case["slip"]) * moved + case["slip"] * moved[:4].mean(axis=0), 0, 1)
    reward = rng.uniform(-1.0, 1.0, len(cells))
    q, _ = plan(transition, case["discount"], reward, np.zeros(len(cells), int))
    policy = np.exp(log_softmax(case["beta"] * q))
    states, actions = np.zeros((2, case["demonstrations"], case["length"]), int)
    for n in range(case["demonstrations"]):
        state = rng.integers(len(cells))
        for t in range(case["length"]):
            action = rng.choice(len(MOVES), p=policy[state])
            states[n, t], actions[n, t] = state, action
            state = rng.choice(len(cells), p=transition[state, action])
    return transition, reward, states, actions


def log_softmax(x):
    """Over the last axis."""
    shifted = x - x.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def plan(transition, discount, reward, policy):
    """(q [S, A], optimal policy [S]) by policy iteration from `policy`."""
    each = np.arange(len(reward))
    while True:
        value = np.linalg.solve(np.eye(len(reward)) - discount * transition[each, policy], reward)
        q = reward[:, None] + discount * transition @ value
        if (q.max(axis=1) <= q[each, policy] + 1e-9).all():
            return q, policy
        policy = q.argmax(axis=1)


def policy_walk(rng, case, transition, counts):
    """(samples [peer_steps / peer_thinning, S], share of proposals accepted); uniform prior on [-1, 1]^S."""
    reward = rng.uniform(-1.0, 1.0, len(counts))
    q, policy = plan(transition, case["discount"], reward, np.zeros(len(counts), int))
    density = (counts * log_softmax(case["beta"] * q)).sum()
    samples, accepted = [], 0
    for step in range(case["peer_burn_in"] + case["peer_steps"]):
        proposed = reward.copy()
        entry = rng.integers(len(reward))
        proposed[entry] += rng.uniform(-case["peer_step_size"], case["peer_step_size"])
        if abs(proposed[entry]) <= 1.0:
            q, new_policy = plan(transition, case["discount"], proposed, policy)
            new = (counts * log_softmax(case["beta"] * q)).sum()
            if np.log(rng.uniform()) < new - density:
                reward, policy, density, accepted = proposed, new_policy, new, accepted + 1
        if step >= case["peer_burn_in"] and step % case["peer_thinning"] == 0:
            samples.append(reward)
    return np.array(samples), accepted / (case["peer_burn_in"] + case["peer_steps"])


def summarise(samples):
    """What chains [C, N, S] amount to: the least bulk effective sample size, the largest split R-hat, the mean."""
    half = samples.shape[1] // 2
    split = np.concatenate([samples[:, :half], samples[:, half : 2 * half]]).astype(np.float64)
    scores = [normal_scores(split[..., s]) for s in range(split.shape[2])]
    return {
        "min_ess": min(effective_samples(z) for z in scores),
        "max_rhat": max(rhat(z) for z in scores),
        "posterior_mean": [round(x, 3) for x in samples.mean(axis=(0, 1)).tolist()],
    }


def normal_scores(x):
    """Values [C, N] as normal quantiles of their ranks, ties sharing the middle one (Vehtari et al. 2021, eq. 14)."""
    _, place, count = np.unique(x, return_inverse=True, return_counts=True)
    rank = np.cumsum(count) - (count - 1) / 2
    quantile = statistics.NormalDist().inv_cdf
    scores = np.array([quantile(p) for p in (rank - 0.375) / (x.size + 0.25)])
    return scores[place.reshape(x.shape)]


def rhat(z):
    """sqrt of the pooled variance over the variance within chains [C, N]."""
    within, between = z.var(axis=1, ddof=1).mean(), z.mean(axis=1).var(ddof=1)
    return float(np.sqrt((z.shape[1] - 1) / z.shape[1] + between / within))


def effective_samples(z):
    """C N / tau of chains [C, N], tau by Geyer's initial monotone sequence (Vehtari et al. 2021, eq. 10-11)."""
    length = z.shape[1]
    centred = z - z.mean(axis=1, keepdims=True)
    spectrum = np.fft.rfft(centred, 2 * length, axis=1)
    covariance = np.fft.irfft(np.abs(spectrum) ** 2, axis=1)[:, :length].mean(axis=0) / length
    within = covariance[0] * length / (length - 1)
    pooled = covariance[0] + z.mean(axis=1).var(ddof=1)
    correlation = 1.0 - (within - covariance) / pooled
    correlation[0] = 1.0
    pairs = correlation[: length // 2 * 2].reshape(-1, 2).sum(axis=1)
    negative = np.flatnonzero(pairs <= 0.0)
    pairs = np.minimum.accumulate(pairs[: negative[0] if negative.size else None])
    tau = max(2.0 * pairs.sum() - 1.0, 1.0 / np.log10(z.size))
    return float(z.size / tau)


def process_peak_bytes():
    """Peak resident memory of this process, or None where the system does not tell."""
    status = pathlib.Path("/proc/self/status")
    if not status.exists():
        return None
    return next(int(line.split()[1]) * 1024 for line in status.open() if line.startswith("VmHWM:"))


def run(case):
    """One long chain, timed from its first proposal."""
    transition, _, states, actions = make_problem(case)
    counts = np.zeros(transition.shape[:2])
    np.add.at(counts, (states, actions), 1.0)
    cpu_began, began = time.process_time(), time.perf_counter()
    samples, accepted = policy_walk(np.random.default_rng(1), case, transition, counts)
    cpu, seconds = time.process_time() - cpu_began, time.perf_counter() - began
    quality = summarise(samples[None])
    return {
        "side": f"numpy {np.__version__} PolicyWalk",
        "unit": "effective samples",
        "amount": quality["min_ess"],
        "first": None,
        "samples": [seconds],
        "cpu_samples": [cpu],
        "arithmetic": "float64",
        "process_peak_bytes": process_peak_bytes(),
        "quality": {**quality, "acceptance_rate": accepted},
        "details": {"steps_per_second": (case["peer_burn_in"] + case["peer_steps"]) / seconds},
        "environment": {"device_kind": "cpu", "python": sys.version.split()[0], "numpy": np.__version__},
    }


if __name__ == "__main__":
    with contextlib.redirect_stdout(sys.stderr):
        record = run(json.load(sys.stdin))
    print(json.dumps(record))
