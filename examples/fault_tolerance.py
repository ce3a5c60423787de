"""What broken controls cost on a cliff, and what planning for them, or noticing them, saves.

A robot walks along a cliff (discount 0.97; a step costs 1, a fall 40) and, at the fault rate, a random move is made and
not its own. Five plans meet each rate, evaluated exactly: the one for no faults; one against an adversary that acts a
tenth of the time; one that lets three tenths of each transition be the worst; one for any rate with equal chance; and
the first, until a detector finds that what happens looks broken and goes over to the second.
Run: python examples/fault_tolerance.py   (ten seconds; with the extra viz it draws fault_tolerance.png)
"""

import jax
import jax.numpy as jnp

from jaxalign.mdp import Contamination, arrival_reward, cliff, cliff_reward, robust_value_iteration, value_iteration
from jaxalign.rl import (
    action_faults,
    alarm_evidence,
    degradation_curves,
    domain_randomized_plan,
    fallback_policy,
    probabilistic_robust_value_iteration,
    with_alarm,
)

HEIGHT, WIDTH, RATES, LEVELS = 5, 10, 11, 2
rates = jnp.linspace(0.0, 0.5, RATES)
world = cliff(HEIGHT, WIDTH, slip=0.01, discount=0.97)
pays = cliff_reward(HEIGHT, WIDTH, fall=-40.0)


def world_at(rate):
    """The world and what its actions earn, at one fault rate."""
    broken = action_faults(world, rate=rate)
    return broken, arrival_reward(broken, pays)


def watched_at(rate):
    """The same with a detector, which counts evidence for a fault rate of 0.3 in nats."""
    broken, reward = world_at(rate)
    evidence = alarm_evidence(world, world_at(0.3)[0], unit=1.0, most=2)
    return with_alarm(broken, evidence, levels=LEVELS), jnp.tile(reward, (LEVELS + 1, 1))


@jax.jit
def curves():
    """{plan: expected return at each rate [R]}."""
    reward = arrival_reward(world, pays)
    # Paid by the transition, so that the worst transition is the one that falls: [S, A, S].
    on_arrival = jnp.broadcast_to(pays, (world.num_states, world.num_actions, world.num_states))
    plans = {
        "for no faults": value_iteration(world, reward).policy,
        "against an adversary": probabilistic_robust_value_iteration(world, reward, alpha=0.1).policy,
        "robust transitions": robust_value_iteration(world, on_arrival, Contamination(0.3)).policy,
        "for any rate": domain_randomized_plan(world_at, rates).policy,
    }
    log_plans = {name: jnp.log(plan) for name, plan in plans.items()}
    fallback = fallback_policy(log_plans["for no faults"], log_plans["against an adversary"], levels=LEVELS)
    found = degradation_curves(world_at, log_plans, rates)
    found["falls back"] = degradation_curves(watched_at, fallback, rates)
    found["(rate known)"] = jax.vmap(lambda rate: world.initial @ value_iteration(*world_at(rate)).value)(rates)
    return found


def draw(found):
    """The curves as a picture, where Matplotlib is installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print('no picture: pip install "jaxalign[viz]"')
        return
    figure = Figure(figsize=(6.4, 4.0), dpi=150, layout="constrained")
    axes = figure.add_subplot(xlabel="fault rate", ylabel="expected return")
    for name, returns in found.items():
        axes.plot(rates, returns, label=name, linestyle=":" if name == "(rate known)" else "-", linewidth=1.4)
    axes.legend(frameon=False, fontsize=8)
    figure.savefig("fault_tolerance.png")


if __name__ == "__main__":
    found = curves()
    print(f"{'expected return at fault rate':30}" + "".join(f"{float(rate):8.2f}" for rate in rates) + "    mean")
    for name, returns in found.items():
        print(f"{name:30}" + "".join(f"{float(x):8.2f}" for x in returns) + f"{float(returns.mean()):8.2f}")
    draw(found)
