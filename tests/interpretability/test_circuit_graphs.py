"""Circuit graphs: keep = 1 is the network, keep = 0 the corrupted run, and the derivative is that of the sum."""

import dataclasses
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxalign.interpretability.transformer_graph as transformer_graph_module
from jaxalign.interpretability.activations import capture, patch
from jaxalign.interpretability.circuit_graph import circuit_values, circuits_by_score, edge_names, kept_edges, prune
from jaxalign.interpretability.indirect_object import (
    TEMPLATES,
    indirect_object_prompts,
    logit_difference,
    negative_kl,
)
from jaxalign.interpretability.mlp_graph import mlp_graph
from jaxalign.interpretability.transformer_graph import transformer_graph
from jaxalign.networks.mlp import MLP
from jaxalign.networks.transformer import TransformerConfig, transformer

CONFIG = TransformerConfig(
    vocab_size=11, hidden_size=8, intermediate_size=12, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=4,
    attention_bias=True, tie_embeddings=False, remat="none",
)  # fmt: skip


WITHOUT = {"nothing": [], "a head": [("head 0.2", None)], "an edge": [("head 0.1", "mlp 0")], "everything": None}


def keep_of(graph, cut):
    """keep [U, V] without the edges (source, reader), reader None for all of them."""
    keep = np.ones(graph.allowed.shape)
    for source, reader in cut or ():
        keep[graph.sources.index(source), slice(None) if reader is None else graph.readers.index(reader)] = 0
    return 0 * keep if cut is None else keep


@pytest.fixture(scope="module")
def tiny():
    """A random transformer whose layers matter, its graph, and runs of it on clean and corrupted tokens [3, 5]."""
    network, graph = transformer(CONFIG), transformer_graph(CONFIG)
    shapes, tree = jax.tree.flatten(jax.eval_shape(network.init, jax.random.key(0)))
    rng = np.random.default_rng(0)
    params = tree.unflatten([jnp.asarray(0.4 * rng.normal(size=leaf.shape), jnp.float32) for leaf in shapes])
    clean, corrupted = (jnp.asarray(rng.integers(0, CONFIG.vocab_size, (3, 5)), jnp.int32) for _ in range(2))
    keeps = jnp.array([keep_of(graph, cut) for cut in WITHOUT.values()])

    @jax.jit
    def everything(params, clean, corrupted):
        inside = capture(network, ["resid_post", "mlp_out", "attention_z"])
        other = graph.messages(params, corrupted)
        runs = jax.lax.map(lambda keep: graph.run(params, graph.embed(params, clean), keep, other), keeps)
        return {
            "clean": inside.apply(params, clean), "corrupted": inside.apply(params, corrupted), "other": other,
            "messages": graph.messages(params, clean), "runs": dict(zip(WITHOUT, runs, strict=True)),
        }  # fmt: skip

    return network, graph, params, clean, corrupted, everything(params, clean, corrupted)


def assert_close(found, expected):
    np.testing.assert_allclose(found, expected, rtol=2e-4, atol=2e-5)


def test_transformer_runs_are_the_network(tiny):
    found = tiny[-1]
    assert_close(found["runs"]["nothing"], found["clean"][0])
    assert_close(found["runs"]["everything"], found["corrupted"][0])
    assert np.abs(found["clean"][0] - found["corrupted"][0]).max() > 0.1


@pytest.mark.slow
def test_one_position_in_half_precision_with_tied_embeddings(tiny):
    _, _, params, clean, corrupted, _ = tiny
    config = dataclasses.replace(CONFIG, tie_embeddings=True, dtype="bfloat16", attention_bias=False)
    graph = transformer_graph(config, position=-1)

    def both(params):
        logits = graph.run(params, clean, jnp.ones(graph.allowed.shape), graph.messages(params, corrupted))
        return logits, transformer(config).apply(params, clean)[:, -1]

    logits, expected = jax.jit(both)(params)
    assert logits.dtype == expected.dtype
    np.testing.assert_allclose(logits, expected, atol=0.05 * float(jnp.abs(expected).max()))


def test_messages_add_up_to_the_residual_stream(tiny):
    messages, inside = tiny[-1]["messages"], tiny[-1]["clean"][1]
    each = CONFIG.num_heads + 1
    for layer in range(2):
        assert_close(messages[: 1 + (layer + 1) * each].sum(axis=0), inside["resid_post"][layer])
        assert_close(messages[(layer + 1) * each], inside["mlp_out"][layer])


def test_patching_a_whole_head_is_patching_its_z(tiny):
    network, _, params, clean, _, found = tiny
    theirs = found["corrupted"][1]["attention_z"][0]
    swapped = patch(network, {"attention_z[0]": lambda x: x.at[:, :, 2].set(theirs[:, :, 2])})
    assert_close(found["runs"]["a head"], jax.jit(swapped.apply)(params, clean))


def test_a_cut_edge_reaches_its_reader_alone(tiny):
    """Written out by hand for layer 0's MLP, which no longer hears head 0.1."""
    network, _, params, clean, _, found = tiny
    messages, other = (np.asarray(found[name], np.float64) for name in ("messages", "other"))
    heard = messages[:5].sum(axis=0) + other[2] - messages[2]
    weights = jax.tree.map(lambda x: np.asarray(x[0], np.float64), params["layers"])
    normal = heard / np.sqrt((heard**2).mean(axis=-1, keepdims=True) + 1e-5) * weights["mlp_norm"]["scale"]
    gate, up = (normal @ weights["mlp"][name]["kernel"] for name in ("gate", "up"))
    written = jnp.asarray((gate / (1 + np.exp(-gate)) * up) @ weights["mlp"]["down"]["kernel"], jnp.float32)
    moved = patch(network, {"mlp_out[0]": lambda x: written})
    assert_close(found["runs"]["an edge"], jax.jit(moved.apply)(params, clean))


@pytest.fixture(scope="module")
def wide(tiny):
    """The same in float64 (attention, by JAX, in float32): (graph, value of all that is differentiated, where)."""
    _, _, params, clean, _, found = tiny
    rng = np.random.default_rng(0)
    weights = rng.normal(size=(3, 5, CONFIG.vocab_size))
    with jax.enable_x64(True):
        graph = transformer_graph(dataclasses.replace(CONFIG, dtype="float64"))
        params, other = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), (params, found["other"]))
        where = jnp.asarray(rng.uniform(size=graph.allowed.shape)), params, other, graph.embed(params, clean)

    def value(keep, params, other, x):
        return (weights * graph.run(params, x, keep, other)).sum()

    return graph, value, where


def test_the_derivative_is_that_of_finite_differences(wide):
    graph, value, (keep, *rest) = wide
    with jax.enable_x64(True):
        both = jax.jit(jax.value_and_grad(value))
        _, slope = both(keep, *rest)
        direction = np.random.default_rng(1).normal(size=keep.shape)
        ahead, behind = (both(keep + h * direction, *rest)[0] for h in (1e-3, -1e-3))
        np.testing.assert_allclose((slope * direction).sum(), (ahead - behind) / 2e-3, rtol=1e-3)
        assert (slope[~graph.allowed] == 0).all()


@pytest.mark.slow
def test_the_derivative_is_that_of_the_scan(wide, monkeypatch):
    _, value, where = wide
    slopes = lambda: jax.jit(jax.grad(lambda *given: value(*given), argnums=(0, 1, 2, 3)))(*where)  # noqa: E731
    with jax.enable_x64(True):
        found = slopes()
        monkeypatch.setattr(transformer_graph_module, "_gaps", transformer_graph_module._gaps.fun)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), found, slopes())


def test_the_transformer_graph_names_what_it_has(tiny):
    graph = tiny[1]
    assert len(graph.sources) == 11
    assert len(graph.readers) == 2 * (4 + 2 + 2 + 1) + 1
    feeds = {
        v: [graph.sources[u] for u in np.flatnonzero(row)] for v, row in zip(graph.readers, graph.feeds, strict=True)
    }
    assert feeds["head 1.1 k"] == feeds["head 1.1 v"] == ["head 1.2", "head 1.3"]
    assert feeds["head 0.3 q"] == ["head 0.3"]
    assert feeds["logits"] == []
    into = {v: graph.allowed[:, i].sum() for i, v in enumerate(graph.readers)}
    assert (into["head 0.0 q"], into["mlp 0"], into["head 1.0 v"], into["mlp 1"], into["logits"]) == (1, 5, 6, 10, 11)
    with pytest.raises(ValueError, match=r"tokens \[B, T\]"):
        graph.messages(tiny[2], jnp.zeros(5, jnp.int32))
    with pytest.raises(ValueError, match="merge the adapters"):
        transformer_graph(dataclasses.replace(CONFIG, lora_rank=2))


def test_mlp_runs_are_the_network():
    network = MLP((5, 4, 2), activation=jnp.tanh)
    rng = np.random.default_rng(0)
    clean, corrupted = (jnp.asarray(rng.normal(size=(6, 3)), jnp.float32) for _ in range(2))
    params = {
        f"Dense_{i}": {"kernel": jnp.asarray(rng.normal(size=(n, m)), jnp.float32), "bias": jnp.full(m, 0.1)}
        for i, (n, m) in enumerate(((3, 5), (5, 4), (4, 2)))
    }
    graph = mlp_graph(3, (5, 4, 2), activation=jnp.tanh)
    keeps = np.stack([np.ones(graph.allowed.shape), np.zeros(graph.allowed.shape), np.ones(graph.allowed.shape)])
    keeps[2, :3, 1] = 0  # neuron 0.1 hears the corrupted inputs

    @jax.jit
    def everything(params, clean, corrupted):
        runs = circuit_values(
            graph, lambda output, _: output[:, 1], params, clean, corrupted, None, keeps, batch_size=2
        )
        return runs, [network.apply({"params": params}, x)[:, 1] for x in (clean, corrupted)]

    runs, expected = everything(params, clean, corrupted)
    w, v, o = (np.asarray(params[f"Dense_{i}"]["kernel"]) for i in range(3))
    hidden = np.tanh(clean @ w + 0.1)
    hidden[:, 1] = np.tanh(corrupted @ w + 0.1)[:, 1]
    expected.append((np.tanh(hidden @ v + 0.1) @ o + 0.1)[:, 1])
    np.testing.assert_allclose(runs, np.stack(expected, axis=1), atol=1e-5)
    with pytest.raises(ValueError, match=r"inputs \[B, 3\]"):
        graph.messages(params, clean[:, :2])
    with pytest.raises(ValueError, match="Dense_1/kernel must be"):
        mlp_graph(3, (5, 7, 2)).messages(params, clean)
    with pytest.raises(ValueError, match="at least 1"):
        mlp_graph(0, (5,))


def test_pruning_keeps_the_paths_from_inputs_to_outputs():
    graph = mlp_graph(2, (2, 2, 1))
    names = lambda keep: edge_names(graph, kept_edges(graph, keep))  # noqa: E731
    keep = np.zeros_like(graph.allowed)
    for u, v in (("input 0", "neuron 0.0"), ("neuron 0.0", "neuron 1.0"), ("neuron 1.0", "output 0"),
                 ("input 1", "neuron 0.1"), ("neuron 1.1", "output 0")):  # fmt: skip
        keep[graph.sources.index(u), graph.readers.index(v)] = True
    assert names(prune(graph, keep)) == ["input 0 -> neuron 0.0", "neuron 0.0 -> neuron 1.0", "neuron 1.0 -> output 0"]
    np.testing.assert_array_equal(prune(graph, graph.allowed), graph.allowed)
    assert not prune(graph, keep & (np.arange(6) != 2)[:, None]).any()


def test_circuits_grow_from_the_output():
    graph = mlp_graph(2, (2, 1))  # edges: inputs into neurons 0, 1; neurons into the output
    scores = np.zeros(graph.allowed.shape)
    scores[0, 0], scores[1, 0], scores[0, 1], scores[1, 1], scores[2, 2], scores[3, 2] = -9, 1, 8, 7, 3, 2
    three, all_of_it = circuits_by_score(graph, scores, [3, 6])
    # output <- neuron 0 (3), then input 0 (9), then neuron 1 (2), as inputs of neuron 1 are out of reach before
    assert kept_edges(graph, three).tolist() == [[0, 0], [2, 2]]  # neuron 1 without inputs is pruned
    np.testing.assert_array_equal(all_of_it, graph.allowed)
    with pytest.raises(ValueError, match=r"1 \.\. 6"):
        circuits_by_score(graph, scores, [7])
    with pytest.raises(ValueError, match="finite"):
        circuits_by_score(graph, scores * np.nan, [1])


def words(text):
    """One token a word, except that a long word is two."""
    return [
        zlib.crc32(w.encode()) % 10**6 for w in text.replace(",", " ,").split() for _ in range(2 if len(w) > 8 else 1)
    ]


@pytest.mark.parametrize("template", range(len(TEMPLATES)))
def test_prompts_hide_the_answer_in_their_corruption(template):
    prompts = indirect_object_prompts(jax.random.key(3), 6, words, template=template)
    assert prompts.clean.shape == prompts.corrupted.shape == (6, len(prompts.slots))
    a, b, s = (prompts.slots.index(name) for name in "ABS")
    for row in range(6):
        first, second, giver = (int(prompts.clean[row, i]) for i in (a, b, s))
        receiver, subject = int(prompts.indirect_object[row]), int(prompts.subject[row])
        assert giver == subject != receiver
        assert (first, second) == ((receiver, giver) if row % 2 == 0 else (giver, receiver))
        assert len({int(prompts.corrupted[row, i]) for i in (a, b, s)} | {receiver, giver}) == 5
    same = np.asarray(prompts.clean == prompts.corrupted).all(axis=0)
    assert [name for name, kept in zip(prompts.slots, same, strict=True) if not kept] == ["A", "B", "S"]
    assert words(prompts.texts[0]) == prompts.clean[0].tolist()
    np.testing.assert_array_equal(
        indirect_object_prompts(jax.random.key(3), 6, words, template=template)[0], prompts[0]
    )


def test_prompts_refuse_what_they_cannot_do():
    with pytest.raises(ValueError, match="template 0"):
        indirect_object_prompts(jax.random.key(0), 2, words, template=9)
    with pytest.raises(ValueError, match="0 names are one token"):
        indirect_object_prompts(jax.random.key(0), 2, list)


def test_metrics_by_hand():
    logits = jnp.log(jnp.array([[0.5, 0.25, 0.25], [0.2, 0.2, 0.6]]))
    target = jnp.array([0, 2]), jnp.array([1, 0])
    np.testing.assert_allclose(logit_difference(logits, target), np.log([2, 3]), rtol=1e-6)
    np.testing.assert_allclose(
        logit_difference(jnp.stack([0 * logits, logits], axis=1), target), np.log([2, 3]), rtol=1e-6
    )
    uniform = jnp.zeros((2, 3))
    expected = [0.5 * np.log(1.5) + 0.5 * np.log(0.75), 0.4 * np.log(0.6) + 0.6 * np.log(1.8)]
    np.testing.assert_allclose(negative_kl(uniform, logits), -np.array(expected), rtol=1e-5)
    np.testing.assert_allclose(negative_kl(logits + 3, logits), 0, atol=1e-6)
