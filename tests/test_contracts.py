"""One suite for every Algorithm in the package; `test_no_algorithm_is_left_out` sees that each has its case."""

import functools
import importlib
import inspect
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxalign
from jaxalign import (
    Algorithm,
    Network,
    certification,
    environments,
    gradient_algorithm,
    interpretability,
    irl,
    mdp,
    networks,
    preferences,
    rl,
    rlhf,
    robustness,
)
from jaxalign.runtime.checkpoint import Checkpoints
from jaxalign.runtime.chunks import split_frozen
from jaxalign.types import EPISODE


class Case(NamedTuple):
    algorithm: Algorithm
    batch: Any


def regression() -> Case:
    network = Network.from_linen(networks.MLP((4, 1)), jnp.zeros((1, 3)))

    def objective(params, batch, key):
        x, y = batch
        noise = 0.01 * jax.random.normal(key, y.shape)
        error = network.apply(params, x)[:, 0] - y - noise
        return jnp.mean(error**2), {"mse": jnp.mean(error**2)}

    x = jax.random.normal(jax.random.key(3), (8, 3))
    return Case(gradient_algorithm(network, objective, optax.adam(1e-2), microbatches=2), (x, x.sum(axis=1)))


def replicated() -> Case:
    inner, (x, y) = regression().algorithm, regression().batch
    return Case(jaxalign.replicate(inner, 2), (jnp.stack([x, x]), jnp.stack([y, -y])))


def pairs(batch: int = 4, length: int = 6) -> preferences.PreferenceBatch:
    tokens = jax.random.randint(jax.random.key(5), (2, batch, length), 0, 11)
    mask = jnp.arange(length)[None, :] >= jnp.arange(2, 2 + batch)[:, None]
    return preferences.PreferenceBatch(tokens[0], mask, tokens[1], mask)


def language_model(**options) -> networks.TransformerConfig:
    sizes = {"vocab_size": 11, "hidden_size": 8, "intermediate_size": 12, "num_layers": 2}
    return networks.TransformerConfig(**sizes, num_heads=2, num_kv_heads=1, head_dim=4, **options)


def direct() -> Case:
    network = networks.transformer(language_model())
    return Case(preferences.dpo(network, optax.adamw(1e-2), beta=0.1), pairs())


def direct_lora() -> Case:
    network = networks.transformer(language_model(lora_rank=2, lora_alpha=4.0))
    algorithm = preferences.dpo(
        network, optax.adam(1e-2), beta=0.1, trainable=networks.is_adapter, microbatches=2, loss=preferences.ipo_loss
    )
    return Case(algorithm, pairs())


def reference_free(factory, **options) -> Case:
    return Case(factory(networks.transformer(language_model()), optax.sgd(1e-2), beta=0.5, **options), pairs())


GRID = mdp.gridworld(2, 2, slip=0.2, goal=3)


def uniform_visits() -> jax.Array:
    return mdp.occupancy_measure(GRID, jnp.full((4, 5), -jnp.log(5.0)))


def maximum_entropy() -> Case:
    return Case(irl.max_causal_entropy_irl(GRID, irl.linear_reward(4), optax.adam(0.1), None), uniform_visits())


def posterior() -> Case:
    pytest.importorskip("blackjax")
    prior = irl.gaussian_prior(4)

    def log_posterior(reward, visits):
        return prior.log_prob(reward) + jnp.sum(visits * irl.boltzmann_policy(GRID, reward, beta=1.0))

    return Case(irl.posterior_chains(log_posterior, prior, num_chains=2, num_samples=4, num_warmup=4), uniform_visits())


def mean_field() -> Case:
    prior = irl.gaussian_prior(4)
    log_posterior = lambda reward: prior.log_prob(reward) - jnp.sum(jnp.cosh(reward))  # noqa: E731
    return Case(irl.mean_field(log_posterior, prior, optax.adam(0.1)), jnp.zeros(1))


def avril() -> Case:
    demonstrations = irl.Trajectories(jnp.array([[0, 1]]), jnp.array([[1, 2]]), jnp.ones((1, 2), bool))
    q, reward = (Network.from_linen(networks.MLP((4, size)), jnp.zeros((1, 4))) for size in (5, 10))
    algorithm = irl.avril(q, reward, optax.adam(1e-2), beta=1.0, discount=0.9)
    return Case(algorithm, irl.demonstrated_transitions(demonstrations, jnp.eye(4)))


def expert_steps() -> irl.Transitions:
    return irl.occupancy_transitions(GRID, uniform_visits())


def telling_apart() -> Case:
    expert = expert_steps()
    other = expert._replace(weights=jnp.ones_like(expert.weights))
    return Case(irl.discriminator(irl.gail_reward(irl.state_table(4, 5)), optax.adam(1e-2)), (expert, other))


def imitation(factory) -> Case:
    return Case(factory(irl.policy_mirror_descent(GRID, step_size=0.1)), expert_steps())


def gail(learner) -> Algorithm:
    return irl.gail(learner, irl.state_table(4, 5), optax.adam(1e-2))


def adversarial(learner) -> Algorithm:
    return irl.adversarial_imitation(learner, irl.gail_reward(irl.state_table(4)), optax.adam(1e-2))


def airl(learner) -> Algorithm:
    return irl.airl(learner, irl.state_table(4), irl.state_table(4), optax.adam(1e-2), discount=0.9)


def joint() -> Case:
    reward, human = irl.linear_reward(4), irl.linear_reward(4)
    algorithm = irl.joint_reward_learning(GRID, reward, human, optax.adam(0.1), uniform_visits(), coherence=1.0)
    visits = jax.random.uniform(jax.random.key(1), (2, 3, 4, 5))
    return Case(algorithm, irl.ComparedVisits(visits[0], visits[1], jnp.array([True, False, True])))


def constrained() -> Case:
    def objective(x, batch, key):
        return jnp.sum((x["weights"] - batch) ** 2), {}

    algorithm = irl.constrained(
        irl.linear_reward(4), objective, lambda x, *_: x["weights"][:1] - 0.1, optax.sgd(0.1), num_constraints=1,
        dual_learning_rate=0.1,
    )  # fmt: skip
    return Case(algorithm, jnp.ones(4))


def aligned() -> Case:
    algorithm = irl.align_values(
        GRID, irl.linear_reward(4), jnp.arange(4.0), optax.adam(0.1), costs=jnp.ones((1, 4, 5)),
        budgets=jnp.array([2.0]), temperature=0.5, dual_learning_rate=0.1,
    )  # fmt: skip
    return Case(algorithm, jnp.zeros(1))


WORLD = environments.tabular_environment(GRID, jnp.arange(4.0), max_steps=3)
MODEL = rl.actor_critic(WORLD, hidden=(4,))
STEERED = rl.adaptive_kl(initial=0.1, target=1.0, horizon=10)
NOTHING = jnp.zeros(1)  # a batch for those that make their own data
FEW = {"num_envs": 2, "num_steps": 4}


def acting(factory, model=MODEL, **options) -> Case:
    return Case(factory(WORLD, model, optax.adam(1e-2), **FEW, **options), NOTHING)


def ppo() -> Algorithm:
    return rl.ppo(WORLD, MODEL, optax.adam(1e-2), num_epochs=1, num_minibatches=2, normalize_rewards=True, **FEW)


def remembering() -> Case:
    model = rl.recurrent_actor_critic(WORLD, hidden=(4,), memory=4)
    return acting(rl.recurrent_ppo, model, num_epochs=1, num_minibatches=2)


def evaluated() -> Case:
    def evaluation(state, key):
        return {"evaluation/step": state.step.astype(jnp.float32)}

    return Case(rl.with_evaluation(regression().algorithm, evaluation, every=2), regression().batch)


def reinforce() -> Case:
    algorithm = rl.reinforce(WORLD, MODEL, optax.adam(1e-2), num_steps=3, num_starts=2, group_size=2)
    return Case(algorithm, NOTHING)


def cloning() -> Case:
    shown = irl.Transitions(jnp.eye(4), jnp.arange(4), jnp.eye(4), jnp.zeros(4, bool))
    return Case(rl.behavioural_cloning(MODEL, optax.adam(1e-2)), shown)


def dqn() -> Case:
    sizes = {"num_updates": 2, "batch_size": 4, "replay_size": 16, "warmup": 8}
    return acting(rl.dqn, rl.q_network(WORLD, hidden=(4,)), **sizes)


def compared() -> Case:
    reward = preferences.trajectory_reward(Network(lambda key: jax.random.normal(key, (2,)), lambda w, x: x @ w))
    return Case(preferences.reward_model(reward, optax.adam(1e-2)), segments_compared())


def segments_compared() -> preferences.Comparisons:
    x = jax.random.normal(jax.random.key(1), (2, 4, 3, 2))
    mask = jnp.arange(3)[None, :] < jnp.array([1, 2, 3, 3])[:, None]
    return preferences.Comparisons(x[0], mask, x[1], mask, outcome=jnp.array([0, 1, 2, 0]), index=jnp.arange(4))


def ensemble() -> Case:
    reward = preferences.trajectory_reward(Network(lambda key: jax.random.normal(key, (2,)), lambda w, x: x @ w))
    return Case(preferences.reward_ensemble(reward, optax.adam(1e-2), size=2), segments_compared())


def stopping_early() -> Case:
    inner, batch = regression()
    algorithm = jaxalign.with_early_stopping(
        inner, lambda state: sum(jnp.sum(x**2) for x in jax.tree.leaves(state.params)), every=1, patience=3
    )
    return Case(algorithm, batch)


def from_feedback(factory, **who) -> Case:
    width = 4 + 5 + 1  # states, actions, whether it ended
    linear = Network(lambda key: 0.1 * jax.random.normal(key, (width,)), lambda w, x: x @ w)
    algorithm = factory(
        WORLD, MODEL, optax.adam(1e-2), preferences.trajectory_reward(linear), optax.adam(1e-2), ensemble_size=2,
        segment_length=2, queries_per_round=2, rollouts_per_round=1, reward_steps=2, reward_batch=4, capacity=8,
        num_epochs=1, num_minibatches=2, **FEW, **who,
    )  # fmt: skip
    return Case(algorithm, NOTHING)


def online(factory, **options) -> Case:
    network = networks.transformer(language_model(remat="none"))
    reward = rlhf.reward_of(lambda prompts, completions: completions.mask.sum(axis=1) + completions.tokens[:, 2])
    prompts = rlhf.Prompts(jnp.array([[1, 2], [3, 0]]), jnp.array([2, 1]), jnp.arange(2))
    algorithm = factory(
        network, optax.adam(1e-2), reward, samples=2, max_new_tokens=3, stop_ids=(0,), chunk_size=8, **options
    )
    return Case(algorithm, prompts)


IMAGES = (jax.random.uniform(jax.random.key(1), (4, 3)), jnp.array([0, 1, 2, 1]))
LINEAR = Network(lambda key: jax.random.normal(key, (3, 3)), lambda w, x: x @ w)


def classifying(factory, *, attack_steps=None, example=None, groups=None, **options) -> Case:
    """A linear classifier of three numbers."""
    arguments = (LINEAR, optax.adam(1e-2)) if example is None else (LINEAR, optax.adam(1e-2), example)
    if attack_steps is not None:
        options |= {"attack": functools.partial(robustness.pgd, steps=attack_steps), "epsilon": 0.1}
    batch = robustness.LabelledBatch(*IMAGES, group=groups)
    return Case(factory(*arguments, **options), batch)


def generating() -> Case:
    generator = Network(lambda key: jax.random.normal(key, (2, 3)), lambda w, z: jax.nn.sigmoid(z @ w))
    critic = Network(lambda key: jax.random.normal(key, (3,)), lambda w, x: x @ w)
    return Case(robustness.gan(generator, critic, optax.adam(1e-2), latent_size=2, gradient_penalty=1.0), IMAGES[0])


def perturbing() -> Case:
    weights = jax.random.normal(jax.random.key(2), (3, 3))
    algorithm = robustness.perturbation_generator(LINEAR, lambda x: x @ weights, optax.adam(1e-2), epsilon=0.1)
    return Case(algorithm, IMAGES)


def perturbed() -> Case:
    algorithm = robustness.adversarial_generator_training(LINEAR, LINEAR, optax.adam(1e-2), epsilon=0.1)
    return Case(algorithm, IMAGES)


def autoencoder(activation: str, factory=interpretability.sparse_autoencoder, *arguments, **options) -> Case:
    config = interpretability.SAEConfig(4, 8, activation, **options)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-2))
    return Case(factory(config, optimizer, *arguments), jax.random.normal(jax.random.key(1), (8, 4)))


SABR = functools.partial(certification.certified_training, method="sabr", attack_steps=1)

# These are `grpo`, `preference_rl`, `dpo`, `ppo` and `adversarial_imitation` with other choices.
SLOW = ("rloo", "dr_grpo", "dapo", "score_rl", "simpo", "orpo", "cpo", "recurrent_ppo", "airl", "gail", "crown_ibp")
CASES = {
    "sparse_autoencoder": lambda: autoencoder("topk", k=2),
    "sparse_autoencoder, matryoshka": lambda: autoencoder("matryoshka", k=2, widths=(2, 8)),
    "sparse_autoencoder, gated": lambda: autoencoder("gated"),
    "target_l0": lambda: autoencoder("jumprelu", interpretability.target_l0, 2.0),
    "toy_model": lambda: Case(interpretability.toy_model(5, 2, sparsity=0.5, batch=8), jnp.zeros(1)),
    "adversarial_training": lambda: classifying(robustness.adversarial_training, attack_steps=2, clean_weight=0.5),
    "trades": lambda: classifying(robustness.trades, epsilon=0.1, steps=2),
    "fast_adversarial_training": lambda: classifying(robustness.fast_adversarial_training, epsilon=0.1),
    "free_adversarial_training": lambda: classifying(
        robustness.free_adversarial_training, example=IMAGES[0], epsilon=0.1, replays=2
    ),
    "smooth_adversarial_training": lambda: classifying(
        robustness.smooth_adversarial_training, sigma=0.1, epsilon=0.1, steps=1, samples=2
    ),
    "gaussian_augmentation": lambda: classifying(robustness.gaussian_augmentation, sigma=0.1),
    "cvar_training": lambda: classifying(robustness.cvar_training, alpha=0.5),
    "group_dro": lambda: classifying(
        robustness.group_dro, num_groups=2, step_size=0.1, groups=jnp.array([0, 1, 1, 0])
    ),
    "certified_training": lambda: classifying(certification.certified_training, epsilon=0.1, warm_up=0, ramp=2),
    "crown_ibp": lambda: classifying(
        certification.certified_training, method="crown-ibp", epsilon=0.1, warm_up=0, ramp=2
    ),
    "sabr": lambda: classifying(SABR, epsilon=0.1, warm_up=0, ramp=2),
    "gan": generating,
    "perturbation_generator": perturbing,
    "adversarial_generator_training": perturbed,
    "elastic_weight_consolidation": lambda: classifying(robustness.elastic_weight_consolidation, strength=1.0),
    "replay": lambda: Case(
        robustness.replay(LINEAR, optax.adam(1e-2), example=IMAGES, capacity=4, replayed=2), IMAGES
    ),
    "reward_model": compared,
    "reward_ensemble": ensemble,
    "with_early_stopping": stopping_early,
    "preference_rl": lambda: from_feedback(rlhf.preference_rl, annotator=rlhf.boltzmann_annotator(beta=1.0)),
    "score_rl": lambda: from_feedback(rlhf.score_rl, scorer=rlhf.return_scorer()),
    "grpo": lambda: online(rlhf.grpo),
    "rloo": lambda: online(rlhf.rloo),
    "dr_grpo": lambda: online(rlhf.dr_grpo),
    "dapo": lambda: online(rlhf.dapo),
    "ppo_lm": lambda: online(rlhf.ppo_lm, num_minibatches=2, num_epochs=1, kl_controller=STEERED),
    "ppo": lambda: Case(ppo(), NOTHING),
    "recurrent_ppo": remembering,
    "with_evaluation": evaluated,
    "reinforce": reinforce,
    "behavioural_cloning": cloning,
    "dqn": dqn,
    "max_causal_entropy_irl": maximum_entropy,
    "posterior_chains": posterior,
    "mean_field": mean_field,
    "avril": avril,
    "discriminator": telling_apart,
    "gail": lambda: imitation(gail),
    "adversarial_imitation": lambda: imitation(adversarial),
    "airl": lambda: imitation(airl),
    "joint_reward_learning": joint,
    "constrained": constrained,
    "align_values": aligned,
    "gradient_algorithm": regression,
    "replicate": replicated,
    "dpo": direct,
    "dpo with adapters": direct_lora,
    "simpo": lambda: reference_free(preferences.simpo, gamma=0.5),
    "orpo": lambda: reference_free(preferences.orpo),
    "cpo": lambda: reference_free(preferences.cpo),
}


@pytest.fixture(scope="module", params=[pytest.param(n, marks=pytest.mark.slow) if n in SLOW else n for n in CASES])
def case(request) -> Case:
    return CASES[request.param]()


@pytest.fixture(scope="module")
def run(case):
    """Two jitted steps; the traces are counted."""
    traces = []

    def counted(state, batch):
        traces.append(1)
        return case.algorithm.step(state, batch)

    step = jax.jit(counted)

    def two_steps(key):
        state = jax.jit(case.algorithm.init)(key)
        state, _ = step(state, case.batch)
        return step(state, case.batch)

    state, metrics = two_steps(jax.random.key(0))
    return two_steps, state, metrics, traces


def leaf_bytes(tree) -> list[bytes]:
    data = jax.tree.map(lambda x: jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x, tree)
    return [np.asarray(x).tobytes() for x in jax.tree.leaves(data)]


def test_state_is_arrays_only(case):
    state = case.algorithm.init(jax.random.key(0))
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(state))
    assert not [leaf for leaf in jax.tree.leaves(state) if getattr(leaf, "weak_type", False)]


def test_step_keeps_the_type_of_the_state(case):
    state = jax.eval_shape(case.algorithm.init, jax.random.key(0))
    new, _ = jax.eval_shape(case.algorithm.step, state, case.batch)
    assert jax.tree.structure(state) == jax.tree.structure(new)
    assert [(x.shape, x.dtype) for x in jax.tree.leaves(state)] == [(x.shape, x.dtype) for x in jax.tree.leaves(new)]


def test_second_call_does_not_recompile(run):
    two_steps, _, _, traces = run
    two_steps(jax.random.key(8))
    assert len(traces) == 1


def test_metrics_are_finite(run):
    _, _, metrics, _ = run
    assert metrics
    # A metric over the episodes that ended is NaN where none did; nothing else may be.
    assert all(np.isfinite(np.asarray(x)).all() for name, x in metrics.items() if not name.startswith(EPISODE))


def test_same_seed_is_bit_equal(run):
    two_steps, state, metrics, _ = run
    again = two_steps(jax.random.key(0))
    assert leaf_bytes((state, metrics)) == leaf_bytes(again)


def test_seeds_differ(run):
    two_steps, state, _, _ = run
    other, _ = two_steps(jax.random.key(1))
    assert leaf_bytes(state.params) != leaf_bytes(other.params)


def test_step_changes_what_is_trained_and_nothing_else(case, run):
    _, state, _, _ = run
    start = jax.jit(case.algorithm.init)(jax.random.key(0))
    assert leaf_bytes(start.params) != leaf_bytes(state.params)
    assert leaf_bytes(start.frozen) == leaf_bytes(state.frozen)
    assert leaf_bytes(start.reference) == leaf_bytes(state.reference)


def test_vmap_over_seeds_equals_each_seed(case, run):
    two_steps, *_ = run
    keys = jax.random.split(jax.random.key(2), 2)

    def last_loss(key):
        _, metrics = jaxalign.train(case.algorithm, key, jax.tree.map(lambda x: jnp.stack([x, x]), case.batch))
        return metrics["loss"][-1]

    together = jax.jit(jax.vmap(last_loss))(keys)
    alone = jnp.stack([two_steps(key)[1]["loss"] for key in keys])
    np.testing.assert_allclose(together, alone, rtol=2e-4, atol=1e-6)


def test_state_round_trips_through_a_checkpoint(case, run, tmp_path):
    _, state, _, _ = run
    carried, frozen = split_frozen(state)
    options = {"keep": 1, "fingerprint": None, "frozen": frozen}
    with Checkpoints(tmp_path, **options) as checkpoints:
        checkpoints.save(2, carried, {})
    with Checkpoints(tmp_path, **options) as checkpoints:
        restored = checkpoints.restore(carried)
    assert restored is not None
    assert leaf_bytes(restored.state) == leaf_bytes(carried)


def test_no_algorithm_is_left_out():
    found = set()
    for name in ("jaxalign", *(f"jaxalign.{domain}" for domain in jaxalign.DOMAINS)):
        module = importlib.import_module(name)
        for attribute in getattr(module, "__all__", ()):
            value = getattr(module, attribute)
            if inspect.isfunction(value) and inspect.get_annotations(value).get("return") in (Algorithm, "Algorithm"):
                found.add(attribute)
    assert found
    assert found <= CASES.keys(), f"give these a case: {sorted(found - CASES.keys())}"
