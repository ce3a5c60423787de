"""`jaxalign rlhf`: train policies on comparisons of their behaviour instead of a reward."""

import dataclasses
from pathlib import Path
from typing import Any, Literal


@dataclasses.dataclass(frozen=True)
class Rlhf:
    """Train policies from human feedback, given here by a synthetic annotator: every seed in one compiled program.

    Round after round the policy acts, an annotator compares pairs of segments of what it did (or scores them), an
    ensemble of reward networks learns from all answers so far, and PPO is paid by the ensemble. The environment's own
    reward is what the annotator judges by and what the report measures; the policy never gets it. PPO with the true
    reward runs beside it for comparison.

    The run directory gets results.json, report.html, the answers (feedback.jsonl) and the segments they are about
    (segments.npz), the policies and reward networks (learned.npz), metrics, TensorBoard logs and checkpoints. A
    stopped run goes on with --resume.

    Environments: cartpole (1 a step until the pole falls), cartpole-mark (1 - |x - 1| / 2 a step: balance at the
    mark), gridworld (reach the goal around three pits).

    Examples:
      jaxalign rlhf --env cartpole --seeds 8
      jaxalign rlhf --env gridworld --annotator noisy --flip 0.2 --select information
      jaxalign rlhf --env cartpole-mark --annotator scores
    """

    env: Literal["cartpole", "cartpole-mark", "gridworld"] = "cartpole"
    """What is to be done."""
    out: Path = Path("runs/rlhf")
    """The run directory."""
    resume: bool = False
    """Go on with the run in --out."""
    seeds: int = 8
    """Policies, each with an ensemble, and answers, of its own."""
    seed: int = 0
    """Where the seeds' random numbers begin."""
    rounds: int | None = None
    """How often the annotator is asked."""
    queries: int | None = None
    """Comparisons or scores asked for in a round."""
    segment: int | None = None
    """Steps of a segment."""
    annotator: Literal["boltzmann", "perfect", "noisy", "biased", "myopic", "intransitive", "scores"] = "boltzmann"
    """Who answers: by the difference of returns (boltzmann), the larger return always (perfect), with slips and ties
    (noisy), for length too (biased), by the end of a segment (myopic), in part in circles (intransitive); or scores
    for single segments instead of comparisons (scores)."""
    beta: float | None = None
    """How certain boltzmann, biased, myopic and intransitive are, per unit of return."""
    flip: float = 0.1
    """Of noisy: the probability of the opposite answer."""
    tie: float = 0.0
    """Of noisy: returns less than this apart are a tie."""
    bias: float = 0.5
    """Of biased: what a step more is worth, whatever it pays."""
    memory: float = 0.9
    """Of myopic: what a step counts beside the one after it."""
    circle: float = 1.0
    """Of intransitive: how strong the circle is, in log-odds."""
    period: float = 10.0
    """Of intransitive: how much return leads once round the circle."""
    score_noise: float = 0.0
    """Of scores: standard deviation, in units of return."""
    select: Literal["disagreement", "information", "random"] = "disagreement"
    """Which segments are asked about: those the ensemble disagrees on, or whose answer should tell most, or any."""
    ensemble: int = 3
    """Reward networks of each seed."""
    aggregate: Literal["mean", "lcb", "worst"] = "mean"
    """What the policy is paid of the ensemble's rewards: mean, mean - deviation, or the least."""
    learning_rate: float | None = None
    """Of PPO's Adam, falling linearly to 0 over the run."""
    baseline: bool = True
    """Run PPO with the true reward, too."""
    episodes: int = 64
    """Episodes of the last evaluations, with starts of their own."""

    def run(self) -> None:
        """Train, compare, report."""
        from rich.console import Console

        from jaxalign.cli.rlhf_run import run

        run(self, Console())


@dataclasses.dataclass(frozen=True)
class Settings:
    """What works for an environment; what `Rlhf` asks for otherwise takes its place."""

    rounds: int
    queries: int
    segment: int
    beta: float = 1.0
    learning_rate: float = 1e-3
    rollouts: int = 4
    """Of a round, each of num_envs x num_steps steps."""
    num_envs: int = 8
    num_steps: int = 128
    epochs: int = 5
    minibatches: int = 4
    discount: float = 0.98
    gae_lambda: float = 0.9
    entropy: float = 0.0
    reward_steps: int = 50
    reward_hidden: tuple[int, ...] = (32, 32)
    reward_rate: float = 3e-3
    max_steps: int = 500
    """An evaluation's longest episode: a property of the environment."""

    @property
    def steps(self) -> int:
        """Environment steps of a round."""
        return self.rollouts * self.num_envs * self.num_steps


SETTINGS = {
    "cartpole": Settings(rounds=30, queries=16, segment=25),
    "cartpole-mark": Settings(rounds=40, queries=24, segment=25),
    "gridworld": Settings(
        rounds=30, queries=24, segment=15, beta=5.0, num_steps=64, rollouts=2, epochs=3, entropy=0.05, max_steps=50
    ),
}


def settings_of(options: Rlhf) -> Settings:
    """The environment's settings with what was asked for in their place. Raises ValueError naming a bad option."""
    asked: dict[str, Any] = {
        field.name: value
        for field in dataclasses.fields(Settings)
        if (value := getattr(options, field.name, None)) is not None
    }
    settings = dataclasses.replace(SETTINGS[options.env], **asked)
    counts = {"seeds": options.seeds, "ensemble": options.ensemble, "episodes": options.episodes}
    counts |= {name: getattr(settings, name) for name in ("rounds", "queries", "segment")}
    for name, value in counts.items():
        if value < 1:
            raise ValueError(f"--{name} must be at least 1, got {value}")
    if settings.segment > settings.num_steps:
        raise ValueError(f"--segment {settings.segment} is longer than a rollout of {settings.num_steps} steps")
    for name in ("flip", "memory"):
        if not 0.0 <= getattr(options, name) <= 1.0:
            raise ValueError(f"--{name} must be in [0, 1], got {getattr(options, name)}")
    for name, value in {"beta": settings.beta, "tie": options.tie, "score-noise": options.score_noise}.items():
        if value < 0.0:
            raise ValueError(f"--{name} must not be below 0, got {value}")
    if settings.learning_rate <= 0.0 or options.period <= 0.0:
        raise ValueError("--learning-rate and --period must be above 0")
    if options.annotator == "scores" and options.select == "information":
        raise ValueError("--select information is for comparisons; scores are asked for by disagreement or random")
    return settings
