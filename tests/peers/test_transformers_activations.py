"""Captured activations and patches against what `transformers` says of the same weights, with hooks of its own."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.interop import load_pretrained
from jaxalign.interpretability.activations import capture, patch

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.peer

TOKENS = np.random.default_rng(0).integers(0, 96, (2, 30))


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    torch.manual_seed(0)
    sizes = transformers.LlamaConfig(
        vocab_size=96, hidden_size=32, intermediate_size=56, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.2, attn_implementation="eager", bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    theirs = transformers.AutoModelForCausalLM.from_config(sizes).eval()
    folder = tmp_path_factory.mktemp("llama")
    theirs.save_pretrained(folder)
    return theirs, load_pretrained(folder)


def test_activations_equal_theirs(models):
    theirs, ours = models
    seen = {}
    layer = theirs.model.layers[1]
    places = {"q": layer.self_attn.q_proj, "mlp_input": layer.mlp, "mlp_out": layer.mlp.down_proj}
    hooks = [
        module.register_forward_hook(lambda _, i, o, name=name: seen.update({name: (i[0] if "input" in name else o)}))
        for name, module in places.items()
    ]
    with torch.no_grad():
        out = theirs(torch.tensor(TOKENS), output_hidden_states=True, output_attentions=True)
    for hook in hooks:
        hook.remove()
    names = ("resid_post", "embedding", "final_norm", "attention_pattern")
    names += ("attention_q[1]", "mlp_input[1]", "mlp_out[1]")
    _, values = capture(ours.network, names).apply(ours.params, jnp.asarray(TOKENS))
    close = {"rtol": 1e-3, "atol": 1e-4}
    np.testing.assert_allclose(values["embedding"], out.hidden_states[0], **close)
    np.testing.assert_allclose(values["resid_post"][:2], torch.stack(out.hidden_states[1:3]), **close)
    np.testing.assert_allclose(values["final_norm"], out.hidden_states[3], **close)
    np.testing.assert_allclose(values["attention_pattern"], torch.stack(out.attentions), **close)
    np.testing.assert_allclose(values["attention_q[1]"].reshape(2, 30, 32), seen["q"], **close)
    np.testing.assert_allclose(values["mlp_input[1]"], seen["mlp_input"], **close)
    np.testing.assert_allclose(values["mlp_out[1]"], seen["mlp_out"], **close)


def test_a_patch_equals_a_hook_that_replaces_the_output(models):
    theirs, ours = models
    hook = theirs.model.layers[1].mlp.register_forward_hook(lambda module, inputs, output: 0.5 * output + 1.0)
    with torch.no_grad():
        expected = theirs(torch.tensor(TOKENS)).logits
    hook.remove()
    patched = patch(ours.network, {"mlp_out[1]": lambda x: 0.5 * x + 1.0})
    np.testing.assert_allclose(patched.apply(ours.params, jnp.asarray(TOKENS)), expected, rtol=1e-3, atol=1e-3)
