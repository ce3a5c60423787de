"""Best-of-n against a reward model learned from few preferences: it always looks better, and at some point it is worse.

A reward model of 64 answers, or of 4096, chooses among a random policy's trajectories; their true return is known.
Run: python examples/over_optimization.py   (about a minute on two cores)
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign import sweep
from jaxalign.rlhf import best_of_n_kl, over_optimization
from jaxalign.rlhf.overoptimization_study import Setting
from jaxalign.runtime import estimate
from jaxalign.statistics import bootstrap_interval

SEEDS, NS, PREFERENCES = 8, (4, 16, 64, 256, 1024), (64, 4096)

zeros = jnp.zeros((len(PREFERENCES), 1))
settings = Setting(jnp.array([32] * len(PREFERENCES)), jnp.array(PREFERENCES), zeros, zeros > 0, zeros)
run = functools.partial(over_optimization, ns=NS, checks=1, rollouts_per_check=1)  # hardly any PPO
curves = sweep(run, settings, jax.random.split(jax.random.key(0), SEEDS), mode="map")

print("In standard deviations of the policy's return: means over seeds, gold with its 95% bootstrap interval")
for count, proxy, gold in zip(PREFERENCES, curves.best_proxy[:, :, 0], curves.best_gold[:, :, 0], strict=True):
    low, high = bootstrap_interval(jax.random.key(1), gold)
    print(f"\n{count} preferences\n   n  sqrt(KL)  proxy  gold")
    for i, n in enumerate(NS):
        distance = np.sqrt(max(best_of_n_kl(n), 0.0))
        print(f"{n:4}  {distance:8.2f}  {proxy[:, i].mean():5.2f}  {estimate(gold[:, i].mean(), low[i], high[i])}")
