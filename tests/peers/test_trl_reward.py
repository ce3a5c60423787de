"""The reward model's loss, its metrics and a whole language model's rewards against TRL and transformers.

KTO's loss is compared in test_trl_losses.py.
"""

from collections import defaultdict
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxalign import Network
from jaxalign.interop import load_pretrained
from jaxalign.preferences.comparisons import Comparisons
from jaxalign.preferences.reward_model import reward_model
from jaxalign.preferences.reward_networks import language_reward

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
reward_trainer = pytest.importorskip("trl.trainer.reward_trainer")

pytestmark = pytest.mark.peer

PAIRS = 6


class Accelerator:
    def gather(self, x):
        return x

    gather_for_metrics = gather


def trl_loss(rewards, *, margin=None, centering=None):
    """TRL's loss, metrics, and gradient with respect to the rewards [2 PAIRS], chosen first."""
    given = torch.tensor(rewards, dtype=torch.float64, requires_grad=True)

    class Model:
        training = True

        def __call__(self, **_):
            return SimpleNamespace(logits=given[:, None])

    trainer = SimpleNamespace(
        model=Model(),
        accelerator=Accelerator(),
        args=SimpleNamespace(center_rewards_coefficient=centering),
        _metrics={"train": defaultdict(list)},
        _total_train_tokens=0,
        _tp_size=1,
    )
    inputs = {"attention_mask": torch.ones((2 * PAIRS, 3), dtype=torch.int64)}
    if margin is not None:
        inputs["margin"] = torch.tensor(margin)
    loss = reward_trainer.RewardTrainer.compute_loss(trainer, trainer.model, inputs)
    loss.backward()
    return loss.item(), {name: values[0] for name, values in trainer._metrics["train"].items()}, given.grad.numpy()


@pytest.mark.parametrize("centering", [None, 0.01])
@pytest.mark.parametrize("with_margin", [False, True])
def test_loss_gradient_and_metrics(with_margin, centering):
    rng = np.random.default_rng(3)
    rewards = 2 * rng.normal(size=2 * PAIRS)
    margin = rng.uniform(0, 2, PAIRS) if with_margin else None
    # The parameters are the rewards themselves: each row names its own.
    table = Network(lambda key: {"r": jnp.asarray(rewards)}, lambda params, rows, mask: params["r"][rows[:, 0]])
    rows, mask = np.arange(2 * PAIRS)[:, None], np.ones((PAIRS, 1))
    with jax.enable_x64(True):
        algorithm = reward_model(table, optax.sgd(1.0), centering=centering or 0.0)
        state = algorithm.init(jax.random.key(0))
        batch = Comparisons(rows[:PAIRS], mask, rows[PAIRS:], mask, margin=margin)
        new, metrics = algorithm.step(state, batch)
        gradient = np.asarray(state.params["r"] - new.params["r"])
    metrics = jax.tree.map(np.asarray, metrics)
    loss, theirs, expected = trl_loss(rewards, margin=margin, centering=centering)
    np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-9)
    np.testing.assert_allclose(gradient, expected, rtol=1e-7, atol=1e-12)
    np.testing.assert_allclose(metrics["rewards/margins"], theirs["margin"], rtol=1e-9)
    np.testing.assert_allclose(metrics["rewards/accuracies"], theirs["accuracy"], rtol=1e-6)
    both = (metrics["rewards/chosen"] + metrics["rewards/rejected"]) / 2
    np.testing.assert_allclose(both, theirs["mean_reward"], rtol=1e-9)


def test_rewards_of_padded_rows_are_those_of_a_sequence_classifier(tmp_path):
    """transformers' LlamaForSequenceClassification reads the last token that is not padding, as we do."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_labels=1, pad_token_id=0, tie_word_embeddings=True,
    )  # fmt: skip
    theirs = transformers.LlamaForSequenceClassification(config).eval()
    language = transformers.LlamaForCausalLM(config)
    language.model.load_state_dict(theirs.model.state_dict())
    language.save_pretrained(tmp_path / "model")
    pretrained = load_pretrained(tmp_path / "model")
    lengths = np.array([9, 4, 7])
    mask = np.arange(9) < lengths[:, None]
    tokens = np.where(mask, np.random.default_rng(0).integers(1, 64, (3, 9)), 0).astype(np.int32)
    with torch.no_grad():
        expected = theirs(torch.tensor(tokens), attention_mask=torch.tensor(mask)).logits[:, 0].numpy()
    head = {"kernel": jnp.asarray(theirs.score.weight[0].detach().numpy())}
    rewards = language_reward(pretrained.network).apply({"model": pretrained.params, "head": head}, tokens, mask)
    np.testing.assert_allclose(rewards, expected, rtol=1e-4, atol=1e-5)
