"""dpo as an Algorithm: the loss by hand, references, padding, accumulation, adapters, and what it must learn."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxalign import Network, preferences, train
from jaxalign.networks import TransformerConfig, is_adapter, merge_lora, transformer
from jaxalign.preferences import PreferenceBatch, pair_log_probs
from jaxalign.preferences.direct_training import completion_log_probs

SIZES = {"vocab_size": 13, "hidden_size": 8, "intermediate_size": 12, "num_layers": 2, "num_heads": 2}


def small(**options) -> TransformerConfig:
    return TransformerConfig(**SIZES, num_kv_heads=1, head_dim=4, **options)


def pairs(key=0, batch=4, length=8) -> PreferenceBatch:
    """Pairs with prompts and completions of unequal length."""
    tokens = jax.random.randint(jax.random.key(key), (2, batch, length), 0, 13)
    start = jnp.arange(batch)[:, None] % 3 + 1
    end = length - jnp.arange(batch)[:, None] % 4
    mask = (jnp.arange(length)[None, :] >= start) & (jnp.arange(length)[None, :] < end)
    return PreferenceBatch(tokens[0], mask, tokens[1], mask)


def table_network(logits) -> Network:
    """A model whose next-token logits are one constant row, so that log-probabilities are known."""

    def apply(params, tokens):
        return jnp.broadcast_to(params[None, None, :], (*tokens.shape, params.shape[0]))

    return Network(init=lambda key: jnp.asarray(logits, jnp.float32), apply=apply)


def test_loss_by_hand():
    # Softmax of [0, log 3] is [1/4, 3/4]: token 0 has log-probability log 1/4, token 1 log 3/4.
    network = table_network([0.0, np.log(3.0)])
    batch = PreferenceBatch(
        chosen_tokens=jnp.array([[0, 1, 1]]), chosen_mask=jnp.array([[0, 1, 1]]),
        rejected_tokens=jnp.array([[0, 0, 0]]), rejected_mask=jnp.array([[0, 1, 0]]),
        reference_chosen_logps=jnp.array([-1.0]), reference_rejected_logps=jnp.array([-2.0]),
    )  # fmt: skip
    algorithm = preferences.dpo(network, optax.sgd(0.1), beta=0.5, reference="batch")
    _, metrics = algorithm.step(algorithm.init(jax.random.key(0)), batch)
    chosen, rejected = 2 * np.log(0.75), np.log(0.25)
    margin = 0.5 * ((chosen + 1.0) - (rejected + 2.0))
    expected = {
        "loss": -np.log(1 / (1 + np.exp(-margin))), "rewards/margins": margin, "logps/chosen": chosen,
        "logps/rejected": rejected, "displacement/chosen": chosen + 1.0, "rewards/accuracies": float(margin > 0),
        "entropy": 0.25 * np.log(4.0) + 0.75 * np.log(4 / 3),
    }  # fmt: skip
    for name, value in expected.items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-5, err_msg=name)


def test_a_language_model_scores_as_its_logits_do():
    network = transformer(small())
    params = network.init(jax.random.key(1))
    batch = pairs()
    plain = Network(network.init, network.apply)
    args = (params, batch.chosen_tokens, batch.chosen_mask)
    chunked, full = completion_log_probs(network, *args, chunk_size=5), completion_log_probs(plain, *args)
    np.testing.assert_allclose(chunked[0], full[0], rtol=1e-5)
    np.testing.assert_allclose(chunked[1], full[1], rtol=1e-5)
    # Under a gradient the entropy comes from another program, and stays the same.
    def total(p):
        logps, entropy = completion_log_probs(network, p, *args[1:], chunk_size=5)
        return logps.sum(), entropy

    gradient, entropy = jax.grad(total, has_aux=True)(params)
    np.testing.assert_allclose(entropy, full[1], rtol=1e-5)
    expected = jax.grad(lambda p: completion_log_probs(plain, p, *args[1:])[0].sum())(params)
    chex.assert_trees_all_close(gradient, expected, rtol=1e-3, atol=1e-5)
    scored = pair_log_probs(network, params, batch)
    np.testing.assert_array_equal(scored.chosen_lengths, batch.chosen_mask.sum(axis=1))


@pytest.fixture(scope="module")
def trained():
    """One step under several settings, from the same start."""
    network = transformer(small())

    def after(batch, **options):
        algorithm = preferences.dpo(network, optax.sgd(1.0), **{"beta": 0.3, **options})
        return jax.jit(algorithm.step)(jax.jit(algorithm.init)(jax.random.key(0)), batch)

    return after


def test_the_first_loss_is_log_two(trained):
    _, metrics = trained(pairs())
    np.testing.assert_allclose(metrics["loss"], np.log(2.0), rtol=1e-5)
    np.testing.assert_allclose(metrics["displacement/chosen"], 0.0, atol=1e-5)


@pytest.mark.slow
def test_reference_in_the_batch_equals_the_initial_one(trained):
    network = transformer(small())
    start = preferences.dpo(network, optax.sgd(1.0), beta=0.3).init(jax.random.key(0)).params
    scored = pair_log_probs(network, start, pairs())
    with_reference = pairs()._replace(reference_chosen_logps=scored.chosen, reference_rejected_logps=scored.rejected)
    one, _ = trained(pairs())
    other, _ = trained(with_reference, reference="batch")
    chex.assert_trees_all_close(one.params, other.params, rtol=1e-4, atol=1e-6)


def test_mappings_are_batches_too(trained):
    one, _ = trained(pairs())
    fields = {name: value for name, value in pairs()._asdict().items() if value is not None}
    other, _ = trained(fields)
    chex.assert_trees_all_equal(one.params, other.params)


def test_padding_changes_nothing(trained):
    def pad(x):
        return jnp.pad(x, ((0, 0), (0, 5)))

    padded = PreferenceBatch(*(pad(x) for x in pairs()[:4]))
    one, metrics = trained(pairs())
    other, padded_metrics = trained(padded)
    chex.assert_trees_all_close(one.params, other.params, rtol=1e-4, atol=1e-6)
    chex.assert_trees_all_close(metrics, padded_metrics, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("reference", ["initial", pytest.param("none", marks=pytest.mark.slow)])
def test_accumulated_equals_full_batch_with_uneven_rows(trained, reference):
    batch = pairs()._replace(valid=jnp.array([True, True, True, False]))
    full, full_metrics = trained(batch, reference=reference, nll_weight=0.5)
    split, split_metrics = trained(batch, reference=reference, nll_weight=0.5, microbatches=2)
    chex.assert_trees_all_close(full.params, split.params, rtol=1e-4, atol=1e-6)
    chex.assert_trees_all_close(full_metrics, split_metrics, rtol=1e-4, atol=1e-5)
    only_valid, _ = trained(jax.tree.map(lambda x: x[:3], batch), reference=reference, nll_weight=0.5)
    chex.assert_trees_all_close(full.params, only_valid.params, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "loss", [preferences.aot_loss, pytest.param(preferences.aot_unpaired_loss, marks=pytest.mark.slow)]
)
def test_filler_rows_enter_no_quantile(trained, loss):
    batch = pairs()._replace(valid=jnp.array([True, True, False, True]))
    one, metrics = trained(batch, loss=loss, reference="none")
    alone, expected = trained(jax.tree.map(lambda x: x[jnp.array([0, 1, 3])], batch), loss=loss, reference="none")
    chex.assert_trees_all_close(one.params, alone.params, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(metrics["loss"], expected["loss"], rtol=1e-5)


def test_average_divides_by_length(trained):
    _, metrics = trained(pairs(), loss=preferences.ipo_loss, average=True)
    # At the start all log-ratios are 0, so IPO's loss is (1 / (2 beta))^2.
    np.testing.assert_allclose(metrics["loss"], (1 / 0.6) ** 2, rtol=1e-5)
    _, summed = trained(pairs(), reference="none")
    np.testing.assert_allclose(metrics["logps/chosen"], summed["logps/chosen"], rtol=1e-5)
    assert "displacement/chosen" in metrics
    assert "displacement/chosen" not in summed  # there is nothing it could have moved from


def test_adapters_train_alone_and_merge_to_the_same_function():
    config = small(lora_rank=2, lora_alpha=4.0)
    network = transformer(config)
    algorithm = preferences.dpo(network, optax.adam(0.05), beta=0.3, trainable=is_adapter)
    state = algorithm.init(jax.random.key(0))
    step = jax.jit(algorithm.step)
    for _ in range(3):
        state, metrics = step(state, pairs())
    assert float(metrics["loss"]) < np.log(2.0)
    assert state.params["layers"]["mlp"]["up"]["kernel"] is None
    merged = merge_lora(state.all_params, scale=2.0)
    plain = transformer(small())
    tokens = pairs().chosen_tokens
    np.testing.assert_allclose(
        plain.apply(merged, tokens), network.apply(state.all_params, tokens), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize(
    "factory",
    [
        lambda net, opt: preferences.dpo(net, opt, beta=0.5),
        lambda net, opt: preferences.dpo(net, opt, beta=0.5, loss=preferences.ipo_loss),
        lambda net, opt: preferences.simpo(net, opt, beta=2.0, gamma=0.5),
        lambda net, opt: preferences.orpo(net, opt, beta=1.0),
        lambda net, opt: preferences.cpo(net, opt, beta=0.5),
    ],
    ids=["dpo", "ipo", "simpo", "orpo", "cpo"],
)
def test_training_learns_a_preference_with_a_known_answer(factory, request):
    """Token 1 is always preferred to token 0: the learned logit must favour it and every pair must be ranked right."""
    network = table_network([0.0, 0.0, 0.0])
    tokens = jnp.array([[2, 1, 1], [2, 1, 2]])
    mask = jnp.array([[0, 1, 1], [0, 1, 0]])
    batch = PreferenceBatch(tokens, mask, jnp.where(tokens == 1, 0, tokens), mask)
    batches = jax.tree.map(lambda x: jnp.broadcast_to(x[None], (60, *x.shape)), batch)
    algorithm = factory(network, optax.adam(0.1))
    state, metrics = jax.jit(lambda key: train(algorithm, key, batches))(jax.random.key(0))
    preference = float(state.params[1] - state.params[0])
    if "ipo" in request.node.name:
        # With the difference of logits d, IPO minimises (2 d - 1 / (2 beta))^2 + (d - 1 / (2 beta))^2 at beta = 0.5.
        assert preference == pytest.approx(0.6, abs=0.02)
    else:
        assert preference > 1.0
    assert float(metrics["loss"][-1]) < float(metrics["loss"][0])
    np.testing.assert_array_equal(metrics["rewards/accuracies"][-1], 1.0)


def test_beta_and_learning_rate_sweep_in_one_trace():
    from jaxalign import sweep

    network = table_network([0.0, 0.0, 0.0])
    tokens = jnp.array([[2, 1, 1]])
    batch = PreferenceBatch(tokens, jnp.array([[0, 1, 1]]), jnp.zeros_like(tokens), jnp.array([[0, 1, 1]]))
    batches = jax.tree.map(lambda x: jnp.broadcast_to(x[None], (5, *x.shape)), batch)
    traces = []

    def run(hyper, key):
        traces.append(1)
        algorithm = preferences.dpo(network, optax.adam(hyper["learning_rate"]), beta=hyper["beta"])
        return train(algorithm, key, batches)[1]["loss"]

    hypers = {"learning_rate": jnp.array([0.01, 0.1]), "beta": jnp.array([0.1, 1.0])}
    losses = sweep(run, hypers, jax.random.split(jax.random.key(0), 2))
    assert losses.shape == (2, 2, 5)
    assert len(traces) == 1
    assert float(losses[1, 0, -1]) < float(losses[0, 0, -1])


def test_errors_name_what_is_wrong(trained):
    with pytest.raises(ValueError, match="reference must be one of"):
        preferences.dpo(table_network([0.0]), optax.sgd(1.0), beta=0.1, reference="frozen")
    with pytest.raises(ValueError, match="no reference_chosen_logps"):
        trained(pairs(), reference="batch")
    with pytest.raises(ValueError, match="no reference_rejected_logps"):
        trained(pairs()._replace(reference_chosen_logps=jnp.zeros(4)), reference="batch")
    with pytest.raises(ValueError, match=r"\[4\].*3 microbatches"):
        trained(pairs(), microbatches=3)


