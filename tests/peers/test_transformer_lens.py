"""Head patching and edge attribution against TransformerLens hooks on the same weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.interpretability.edge_attribution import edge_attribution_patching
from jaxalign.interpretability.indirect_object import logit_difference
from jaxalign.interpretability.patching import activation_patching, last_position
from jaxalign.interpretability.transformer_graph import transformer_graph
from jaxalign.networks.transformer import TransformerConfig, transformer

pytestmark = pytest.mark.peer
CONFIG = TransformerConfig(11, 8, 12, 2, 2, 2, 4, tie_embeddings=False, remat="none")


@pytest.fixture(scope="module")
def ours():
    """Random parameters and a task: (params, clean, corrupted, target)."""
    rng = np.random.default_rng(0)
    shapes, tree = jax.tree.flatten(jax.eval_shape(transformer(CONFIG).init, jax.random.key(0)))
    params = tree.unflatten([jnp.asarray(0.4 * rng.normal(size=leaf.shape), jnp.float32) for leaf in shapes])
    clean, corrupted = (jnp.asarray(rng.integers(0, 11, (3, 5)), jnp.int32) for _ in range(2))
    return params, clean, corrupted, (jnp.array([1, 2, 3]), jnp.array([4, 5, 6]))


@pytest.fixture(scope="module")
def theirs(ours):
    """The same network as a HookedTransformer."""
    torch = pytest.importorskip("torch")
    lens = pytest.importorskip("transformer_lens")
    config = lens.HookedTransformerConfig(
        n_layers=2, d_model=8, n_ctx=16, d_head=4, n_heads=2, d_vocab=11, d_mlp=12, act_fn="silu", gated_mlp=True,
        normalization_type="RMS", final_rms=True, eps=CONFIG.rms_norm_epsilon, positional_embedding_type="rotary",
        rotary_dim=4, rotary_base=10_000, use_split_qkv_input=True, use_attn_result=True, use_hook_mlp_in=True,
        device="cpu",
    )  # fmt: skip
    model = lens.HookedTransformer(config)
    layers = jax.tree.map(np.asarray, ours[0]["layers"])
    state = {"embed.W_E": ours[0]["embedding"], "unembed.W_U": ours[0]["unembedding"].T}
    state["ln_final.w"] = ours[0]["final_norm"]["scale"]
    for i in range(2):
        block, attention = f"blocks.{i}", layers["attention"]
        for name in "qkv":
            state[f"{block}.attn.W_{name.upper()}"] = attention[name]["kernel"][i].reshape(8, 2, 4).swapaxes(0, 1)
        state[f"{block}.attn.W_O"] = attention["o"]["kernel"][i].reshape(2, 4, 8)
        for norm, name in (("ln1", "attention_norm"), ("ln2", "mlp_norm")):
            state[f"{block}.{norm}.w"] = layers[name]["scale"][i]
        for weight, name in (("W_gate", "gate"), ("W_in", "up"), ("W_out", "down")):
            state[f"{block}.mlp.{weight}"] = layers["mlp"][name]["kernel"][i]
    loaded = {name: torch.tensor(np.array(value)) for name, value in state.items()}
    missing, unexpected = model.load_state_dict(loaded, strict=False)
    assert not unexpected
    assert not [name for name in missing if "W_" in name or name.endswith(".w")]
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".b_" in name:
                parameter.zero_()
    return model


def tokens_of(x):
    import torch

    return torch.tensor(np.array(x)).long()


def difference(logits, target):
    right, wrong = (tokens_of(answer)[:, None] for answer in target)
    last = logits[:, -1]
    return (last.gather(1, right) - last.gather(1, wrong))[:, 0]


def test_heads_patched_by_hooks(ours, theirs):
    params, clean, corrupted, target = ours
    found = activation_patching(
        last_position(transformer(CONFIG)), logit_difference, params, clean, corrupted, target, "attention_z", axes=(2,)
    )
    _, cache = theirs.run_with_cache(tokens_of(corrupted))
    before = difference(theirs(tokens_of(clean)), target)
    for layer in range(2):
        for head in range(2):
            name = f"blocks.{layer}.attn.hook_z"

            def swap(z, hook, name=name, head=head):
                z[:, :, head] = cache[name][:, :, head]
                return z

            after = difference(theirs.run_with_hooks(tokens_of(clean), fwd_hooks=[(name, swap)]), target)
            np.testing.assert_allclose(found[:, layer, head], (after - before).detach(), rtol=1e-3, atol=1e-5)


def test_edge_scores_are_messages_times_gradients_at_hooks(ours, theirs):
    params, clean, corrupted, target = ours
    graph = transformer_graph(CONFIG, position=-1)
    score = jax.jit(lambda *given: edge_attribution_patching(graph, logit_difference, *given))
    scores = np.asarray(score(params, clean, corrupted, target))

    _, clean_cache = theirs.run_with_cache(tokens_of(clean))
    _, other_cache = theirs.run_with_cache(tokens_of(corrupted))

    def written(cache, source):
        kind, _, place = source.partition(" ")
        if kind == "embedding":
            return cache["hook_embed"]
        if kind == "mlp":
            return cache[f"blocks.{place}.hook_mlp_out"]
        layer, head = place.split(".")
        return cache[f"blocks.{layer}.attn.hook_result"][:, :, int(head)]

    seen = {}

    def keep(x, hook):
        x.retain_grad()
        seen[hook.name] = x
        return x

    hooks = [f"blocks.{i}.hook_{part}" for i in range(2) for part in ("q_input", "k_input", "v_input", "mlp_in")]
    hooks.append("blocks.1.hook_resid_post")
    difference(theirs.run_with_hooks(tokens_of(clean), fwd_hooks=[(n, keep) for n in hooks]), target).sum().backward()

    def slope(reader):
        kind, *where = reader.split(" ")
        if kind == "logits":
            return seen["blocks.1.hook_resid_post"].grad
        if kind == "mlp":
            return seen[f"blocks.{where[0]}.hook_mlp_in"].grad
        layer, head = where[0].split(".")
        return seen[f"blocks.{layer}.hook_{where[1]}_input"].grad[:, :, int(head)]

    for u, source in enumerate(graph.sources):
        gap = written(clean_cache, source) - written(other_cache, source)
        for v in np.flatnonzero(graph.allowed[u]):
            expected = (gap * slope(graph.readers[v])).sum(dim=(1, 2)).detach().numpy()
            np.testing.assert_allclose(scores[:, u, v], expected, rtol=2e-3, atol=1e-5)
