"""Reinforcement learning from human preferences, online: act, ask, learn what is wanted, and be paid that."""

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax

from jaxalign.algorithm import Algorithm, Network, TrainState, gradient_algorithm
from jaxalign.environments.protocol import Environment
from jaxalign.preferences.reward_ensemble import ensemble_mean, ensemble_rewards, reward_ensemble
from jaxalign.rl.actor_critic import ActorCritic
from jaxalign.rl.incentives import Incentive
from jaxalign.rl.ppo import PPOState, experience, ppo_parts
from jaxalign.rl.rollout import Steps
from jaxalign.rlhf.annotators import TIE, Annotator, Scorer, segment_returns
from jaxalign.rlhf.human_feedback import (
    Features,
    FeedbackBuffer,
    Scored,
    Segments,
    add_rows,
    at_random,
    choose_pairs,
    comparisons,
    disagreement,
    draw_rows,
    information_gain,
    init_buffer,
    learned_reward,
    pairwise_agreement,
    segments,
    step_features,
)
from jaxalign.sweeps import replicate
from jaxalign.types import EPISODE, Array, Key, Metrics, Params

SELECTIONS = {"disagreement": disagreement, "information": information_gain, "random": at_random}
CANDIDATES = 10  # pairs considered for each that is asked about, as Christiano et al. do

Ask = Callable[[Key, Params, Steps, Array], tuple[Any, Metrics]]
Judged = Callable[[Steps], Array]


@flax.struct.dataclass
class FeedbackState(PPOState):
    """A PPOState whose `step` counts rounds, and what people have taught.

    reward: TrainState of the ensemble of reward networks, params [E, ...]
    buffer: their FeedbackBuffer
    steps: Steps [T, N], taken and not yet learned from
    """

    reward: Any = None
    buffer: FeedbackBuffer | None = None
    steps: Any = None


def _true_rewards(steps: Steps) -> Array:
    return steps.rewards


def preference_rl(
    environment: Environment,
    model: ActorCritic,
    ppo_optimizer: optax.GradientTransformation,
    reward_network: Network,
    reward_optimizer: optax.GradientTransformation,
    *,
    annotator: Annotator,
    ensemble_size: int = 3,
    segment_length: int = 25,
    queries_per_round: int = 16,
    select: str = "disagreement",
    stride: int | None = None,
    features: Features | None = None,
    judged: Judged = _true_rewards,
    aggregate: Callable[[Array], Array] = ensemble_mean,
    ensemble_options: dict[str, Any] | None = None,
    **options: Any,
) -> Algorithm:
    """PPO that is paid what comparisons of its own behaviour say is wanted. Christiano et al., arXiv:1706.03741.

    A step is a round of `feedback_rl`: of the newest rollout's segments, `queries_per_round` pairs are chosen and
    compared by the annotator; the ensemble learns from all comparisons so far; PPO is paid `learned_reward`. The
    environment's own reward reaches the annotator, the metrics, and nothing else.

    Args:
        reward_network: apply(params, features [B, L, F], mask [B, L]) -> [B], such as
            `trajectory_reward(Network.from_linen(MLP((32, 32, 1)), jnp.zeros((1, F))))`.
        annotator: who compares; see `jaxalign.rlhf.annotators`.
        ensemble_size, segment_length, queries_per_round: E, L and Q, static; L <= num_steps.
        select: which of 10 Q random pairs are asked about: those with the largest "disagreement" or expected
            "information", or any ("random").
        stride: between the beginnings of segments; None: a fifth of L, at least 1.
        features: what the reward may depend on, Steps [T, N] -> [T, N, F]; None: `step_features(environment)`.
        judged: Steps -> the rewards [T, N] the annotator judges by; a bias by anything a step holds goes here.
        aggregate: of the members' rewards, [E, T, N] -> [T, N].
        ensemble_options: for `reward_ensemble`.
        options: for `feedback_rl`.

    Segments end where episodes do (see `segments`), and the reward keeps its offset (see `learned_reward`). On
    CartPole, where every step pays 1, all there is to compare is how soon the pole fell, and all there is to learn is
    that steps are good and the last one less so.

    Metrics: those of `feedback_rl`, "episode/agreement" (the part of the new segments' pairs that the ensemble orders
    as their true rewards do, before it hears the answers; NaN where all are equal), and "feedback/ties" (part of the
    answers).
    Raises ValueError for another `select`, and as `feedback_rl`, `segments` and `choose_pairs`.
    """
    if select not in SELECTIONS:
        raise ValueError(f"preference_rl: select must be one of {', '.join(SELECTIONS)}, got {select!r}")
    seen = step_features(environment) if features is None else features

    def ask(key: Key, params: Params, steps: Steps, asked: Array) -> tuple[Any, Metrics]:
        choose_key, answer_key = jax.random.split(key)
        pool = segments(steps, seen(steps), judged(steps), segment_length, stride=_stride(stride, segment_length))
        predicted = ensemble_rewards(reward_network, params, pool.features, pool.mask)
        first, second = choose_pairs(
            choose_key, predicted,
            queries=queries_per_round, candidates=CANDIDATES * queries_per_round, acquisition=SELECTIONS[select],
        )  # fmt: skip
        outcome = annotator(answer_key, pool.rewards[first], pool.mask[first], pool.rewards[second], pool.mask[second])
        rows = comparisons(pool, first, second, outcome, asked + jnp.arange(queries_per_round))
        return rows, {**_agreement(pool, predicted), "feedback/ties": jnp.mean(outcome == TIE, dtype=jnp.float32)}

    return feedback_rl(
        environment, model, ppo_optimizer, ask,
        reward_ensemble(reward_network, reward_optimizer, size=ensemble_size, **(ensemble_options or {})),
        learned_reward(reward_network, seen, aggregate=aggregate), **options,
    )  # fmt: skip


def score_rl(
    environment: Environment,
    model: ActorCritic,
    ppo_optimizer: optax.GradientTransformation,
    reward_network: Network,
    reward_optimizer: optax.GradientTransformation,
    *,
    scorer: Scorer,
    ensemble_size: int = 3,
    segment_length: int = 25,
    queries_per_round: int = 16,
    select: str = "disagreement",
    stride: int | None = None,
    features: Features | None = None,
    judged: Judged = _true_rewards,
    aggregate: Callable[[Array], Array] = ensemble_mean,
    **options: Any,
) -> Algorithm:
    """`preference_rl` with a number for each segment instead of comparisons: each member descends on

    mean_i (score_i - reward_network.apply(params, features_i, mask_i))^2

    Args:
        scorer: who scores, (key, rewards [Q, L], mask [Q, L]) -> [Q]; see `return_scorer`.
        select: which segments are scored: those whose predicted scores have the largest variance over members
            ("disagreement"), or any ("random").

    All else as `preference_rl`. (For scores added to the environment's reward, see `scored_feedback`.)
    """
    if select not in ("disagreement", "random"):
        raise ValueError(f"score_rl: select must be disagreement or random, got {select!r}")
    seen = step_features(environment) if features is None else features

    def ask(key: Key, params: Params, steps: Steps, asked: Array) -> tuple[Scored, Metrics]:
        choose_key, score_key = jax.random.split(key)
        pool = segments(steps, seen(steps), judged(steps), segment_length, stride=_stride(stride, segment_length))
        predicted = ensemble_rewards(reward_network, params, pool.features, pool.mask)
        by_chance = jax.random.uniform(choose_key, predicted.shape[1:])
        worth = jnp.var(predicted, axis=0) if select == "disagreement" else by_chance
        chosen = jax.lax.top_k(worth, queries_per_round)[1]
        scores = scorer(score_key, pool.rewards[chosen], pool.mask[chosen])
        return Scored(pool.features[chosen], pool.mask[chosen], scores), _agreement(pool, predicted)

    return feedback_rl(
        environment, model, ppo_optimizer, ask, score_ensemble(reward_network, reward_optimizer, size=ensemble_size),
        learned_reward(reward_network, seen, aggregate=aggregate), **options,
    )  # fmt: skip


def score_ensemble(network: Network, optimizer: optax.GradientTransformation, *, size: int) -> Algorithm:
    """Regression of scores by `size` = E networks that differ in how they began; a batch is Scored [B], for all.

    loss[e] = mean_i (network.apply(params[e], features_i, mask_i) - scores_i)^2, in squared units of score.
    State: TrainState with leaves [E, ...]; metrics [E].
    """

    def objective(params: Params, batch: Scored, key: Key) -> tuple[Array, Metrics]:
        return jnp.mean(jnp.square(network.apply(params, batch.features, batch.mask) - batch.scores)), {}

    members = replicate(gradient_algorithm(network, objective, optimizer), size)

    def step(state: TrainState, batch: Scored) -> tuple[TrainState, Metrics]:
        for_all = jax.tree.map(lambda x: jnp.broadcast_to(x, (size, *x.shape)), batch)
        return members.step(state, for_all)

    return Algorithm(members.init, step)


def feedback_rl(
    environment: Environment,
    model: ActorCritic,
    ppo_optimizer: optax.GradientTransformation,
    ask: Ask,
    learner: Algorithm,
    incentive: Incentive,
    *,
    rollouts_per_round: int = 4,
    reward_steps: int = 50,
    reward_batch: int = 64,
    capacity: int = 1024,
    **options: Any,
) -> Algorithm:
    """PPO with a reward that is learned from feedback as it goes. A step is a round:

    1. ask about the newest rollout and put the answers into the buffer;
    2. `reward_steps` gradient steps of the reward's learner, each on `reward_batch` rows drawn from the buffer;
    3. `rollouts_per_round` times: pay the newest rollout, improve the policy, and act for the next rollout.

    Args:
        ask: (key, reward params, Steps [T, N], rows asked for so far []) -> (rows [Q], metrics). The only one who sees
            what the environment paid.
        learner: batch = rows [B]; its state's `params` are what `incentive` is given as its state. It is told "loss"
            in the metrics as "reward/loss", and the like for the others.
        incentive: pays; it gets the steps with rewards 0.
        rollouts_per_round, reward_steps, reward_batch, capacity: static.
        options: for `ppo_parts`.

    State: FeedbackState. Metrics: PPO's, means over the round's rollouts, "episode/return" and "reward" of the true
    reward, the learner's last, the ask's and the incentive's, and "labels", how many were asked for so far.
    Raises ValueError as `ppo_parts` and `add_rows`.
    """
    parts = ppo_parts(environment, model, ppo_optimizer, **options)

    def init(key: Key) -> FeedbackState:
        start_key, act_key, learner_key = jax.random.split(key, 3)
        start, steps = parts.collect(parts.init(start_key), act_key)
        steps = _own_types(steps)
        reward = learner.init(learner_key)
        rows, _ = jax.eval_shape(ask, act_key, reward.params, steps, jnp.zeros((), jnp.int32))
        return FeedbackState(
            **{field.name: getattr(start, field.name) for field in dataclasses.fields(start)},
            reward=reward, buffer=init_buffer(rows, capacity), steps=steps,
        )  # fmt: skip

    def teach(state: FeedbackState, key: Key) -> tuple[FeedbackState, Metrics]:
        ask_key, draw_key = jax.random.split(key)
        rows, said = ask(ask_key, state.reward.params, state.steps, state.buffer.count)
        buffer = add_rows(state.buffer, rows)

        def learn(reward: Any, key: Key) -> tuple[Any, Metrics]:
            return learner.step(reward, draw_rows(key, buffer, reward_batch))

        reward, learned = jax.lax.scan(learn, state.reward, jax.random.split(draw_key, reward_steps))
        learned = {f"reward/{name.removeprefix('rewards/')}": jnp.mean(x[-1]) for name, x in learned.items()}
        labels = {"labels": buffer.count.astype(jnp.float32)}
        return state.replace(buffer=buffer, reward=reward), {**said, **learned, **labels}

    def rollout(state: FeedbackState, key: Key) -> tuple[FeedbackState, Metrics]:
        pay_key, improve_key, act_key = jax.random.split(key, 3)
        unpaid = state.steps._replace(rewards=jnp.zeros_like(state.steps.rewards))
        _, pay, paid = incentive.apply(state.reward.params, unpaid, pay_key)
        after, metrics = parts.improve(state, unpaid, pay, improve_key)
        metrics = {**metrics, **experience(state.steps), **paid}
        after, steps = parts.collect(after, act_key)
        return after.replace(steps=_own_types(steps)), metrics

    def step(state: FeedbackState, batch: None) -> tuple[FeedbackState, Metrics]:
        key, teach_key, rollouts_key = jax.random.split(state.key, 3)
        taught, said = teach(state.replace(key=key), teach_key)
        after, metrics = jax.lax.scan(rollout, taught, jax.random.split(rollouts_key, rollouts_per_round))
        mean = {name: jnp.nanmean(x) if name.startswith(EPISODE) else jnp.mean(x) for name, x in metrics.items()}
        return after.replace(step=state.step + 1), {**mean, **said}

    return Algorithm(jax.jit(init), step)


def _stride(stride: int | None, length: int) -> int:
    return max(1, length // 5) if stride is None else stride


def _own_types(steps: Steps) -> Steps:
    # A reward that is a Python number is weakly typed, and a state must keep its types.
    return jax.tree.map(lambda x: x.astype(x.dtype), steps)


def _agreement(pool: Segments, predicted: Array) -> Metrics:
    true = segment_returns(pool.rewards, pool.mask)
    return {f"{EPISODE}agreement": pairwise_agreement(jnp.mean(predicted, axis=0), true)}
