"""`jaxalign ppo`: train a policy by reinforcement, many seeds and settings at once."""

import dataclasses
from pathlib import Path
from typing import Literal


@dataclasses.dataclass(frozen=True)
class Ppo:
    """Train policies by proximal policy optimisation: every seed of every setting, in one compiled program.

    Options left out are those known to work for the environment. Several --learning-rate or --entropy make a sweep:
    each pair of them is trained with every seed. The run directory gets results.json, report.html with learning curves
    and returns in the tail, the policies (policy.npz), metrics, TensorBoard logs and checkpoints. A stopped run goes on
    with --resume.

    Environments: cartpole, acrobot, pendulum, bandit, deep-sea, key-door, side-effects; with `pip install
    "jaxalign[envs]"` also gymnax:NAME (such as gymnax:MountainCar-v0) and gymnasium:NAME, which runs on the host.

    Examples:
      jaxalign ppo --env cartpole --seeds 16
      jaxalign ppo --env pendulum
      jaxalign ppo --env deep-sea --intrinsic counts
      jaxalign ppo --learning-rate 3e-4 1e-3 3e-3 --entropy 0 0.01 --seeds 8
    """

    env: str = "cartpole"
    """The environment's name."""
    out: Path = Path("runs/ppo")
    """The run directory."""
    resume: bool = False
    """Go on with the run in --out."""
    steps: int | None = None
    """Environment steps of each seed."""
    seeds: int = 8
    """Seeds of each setting."""
    seed: int = 0
    """Where the seeds' random numbers begin."""
    learning_rate: tuple[float, ...] = ()
    """Of Adam, falling linearly to 0 over the run."""
    entropy: tuple[float, ...] = ()
    """Coefficient of the policy's entropy, per nat."""
    num_envs: int | None = None
    """Environments that act side by side."""
    num_steps: int | None = None
    """Steps of each environment in a rollout."""
    epochs: int | None = None
    """Passes over a rollout."""
    minibatches: int | None = None
    """Gradient steps in a pass."""
    discount: float | None = None
    """What a reward is worth a step later."""
    gae_lambda: float | None = None
    """0 trusts the value function, 1 the returns."""
    clip: float | None = None
    """How far a probability ratio may gain from moving."""
    target_kl: float | None = None
    """End a rollout's learning once the policy has moved so far (nats)."""
    normalize: bool | None = None
    """Normalise observations and scale rewards by running moments."""
    intrinsic: Literal["none", "rnd", "icm", "counts"] = "none"
    """A bonus for what is new: random network distillation, intrinsic curiosity, or visit counts."""
    intrinsic_coefficient: float = 0.1
    """What the bonus counts for, beside the environment's reward."""
    hidden: tuple[int, ...] = (64, 64)
    """Widths of the hidden layers."""
    evaluations: int = 20
    """Points of the learning curve: a checkpoint and an evaluation each."""
    episodes: int = 16
    """Episodes of an evaluation, with starts of their own; the last takes eight times as many."""

    def run(self) -> None:
        """Train, evaluate, report."""
        from rich.console import Console

        from jaxalign.cli.ppo_run import run

        run(self, Console())
