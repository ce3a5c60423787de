"""The group methods' loss against TRL's own trainers on the same logits: values, and gradients by logit."""

import functools
from collections import defaultdict
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign import LanguageModel
from jaxalign.rlhf.token_learner import token_objective
from jaxalign.rlhf.token_steps import (
    TokenSteps,
    constant_length,
    mean_sequence_ratio,
    sequence_mean,
    sequence_ratio,
    token_mean,
    token_ratio,
)

torch = pytest.importorskip("torch")
grpo_trainer = pytest.importorskip("trl.trainer.grpo_trainer")
rloo_trainer = pytest.importorskip("trl.trainer.rloo_trainer")

pytestmark = pytest.mark.peer

ROWS, PROMPT, LENGTH, WORDS, BETA, LOW, HIGH, LONGEST = 6, 2, 5, 7, 0.3, 0.1, 0.15, 9
RNG = np.random.default_rng(0)
LOGITS = RNG.normal(size=(ROWS, PROMPT + LENGTH, WORDS))
TOKENS = RNG.integers(0, WORDS, (ROWS, PROMPT + LENGTH))
LENGTHS = np.array([5, 1, 3, 4, 5, 2])
DONE = np.arange(LENGTH) < LENGTHS[:, None]
NOISE = 0.2 * RNG.normal(size=(2, ROWS, LENGTH))
ADVANTAGES = RNG.normal(size=ROWS)


def log_probs_of(logits):
    shifted = torch.log_softmax(logits, dim=-1)[:, PROMPT - 1 : -1]
    return torch.gather(shifted, 2, torch.tensor(TOKENS[:, PROMPT:])[..., None])[..., 0]


def theirs(trainer_class, **settings):
    """TRL's `_compute_loss` on a stand-in for the trainer whose model gives LOGITS."""
    logits = torch.tensor(LOGITS, requires_grad=True)
    current = log_probs_of(logits)
    old, reference = (current.detach() + torch.tensor(x) for x in NOISE)

    def reduce(x, **_):
        return x

    accelerator = SimpleNamespace(gather=reduce, gather_for_metrics=reduce, reduce=reduce, num_processes=1)
    trainer = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *a, **k: (current, torch.zeros_like(current), None),
        aux_loss_enabled=False, top_entropy_quantile=1.0, off_policy_mask_threshold=None, beta=BETA, epsilon_low=LOW,
        epsilon_high=HIGH, use_vllm=False, model=SimpleNamespace(training=True), accelerator=accelerator,
        current_gradient_accumulation_steps=1, max_completion_length=LONGEST, _entropy_bonus_enabled=False,
        use_adaptive_entropy=False,
        args=SimpleNamespace(use_bias_correction_kl=False, delta=None, steps_per_generation=1),
        _metrics=defaultdict(lambda: defaultdict(list)), **{"importance_sampling_level": "token", **settings},
    )  # fmt: skip
    mask = torch.tensor(DONE, dtype=torch.float64)
    inputs = {
        "prompt_ids": torch.tensor(TOKENS[:, :PROMPT]), "prompt_mask": torch.ones(ROWS, PROMPT),
        "completion_ids": torch.tensor(TOKENS[:, PROMPT:]), "completion_mask": mask,
        "advantages": torch.tensor(ADVANTAGES), "old_per_token_logps": old, "ref_per_token_logps": reference,
        "old_logps": (old * mask).sum(1), "num_items_in_batch": mask.sum(),
    }  # fmt: skip
    loss = trainer_class._compute_loss(trainer, None, inputs)
    loss.backward()
    return loss.item(), logits.grad.numpy(), *(x.numpy() for x in (old, reference))


def ours(old, reference, aggregation, ratio, kl_coefficient):
    # A model whose hidden states are the logits: its unembedding is the identity.
    model = LanguageModel(
        init=None, apply=None, hidden=lambda params, tokens: params, unembedding=lambda params: jnp.eye(WORDS),
        init_cache=None, decode=None,
    )  # fmt: skip
    wide = functools.partial(np.pad, pad_width=((0, 0), (PROMPT, 0)))
    mask = jnp.asarray(wide(DONE))
    weights, share = aggregation(mask)
    advantages = np.broadcast_to(ADVANTAGES[:, None], DONE.shape)
    steps = TokenSteps(
        jnp.asarray(TOKENS), mask, wide(old), wide(advantages), weights, share, reference_log_probs=wide(reference)
    )

    def loss(logits):
        value, _ = token_objective(
            model, {"policy": logits}, steps, clip_epsilon=LOW, clip_epsilon_high=HIGH, kl_coefficient=kl_coefficient,
            ratio=ratio,
        )  # fmt: skip
        return value

    return jax.value_and_grad(loss)(jnp.asarray(LOGITS))


@pytest.mark.parametrize(
    ("loss_type", "aggregation"),
    [
        ("grpo", sequence_mean),
        ("bnpo", token_mean),
        ("dapo", token_mean),
        ("dr_grpo", functools.partial(constant_length, length=LONGEST)),
    ],
)
def test_group_losses(loss_type, aggregation):
    value, gradient, old, reference = theirs(grpo_trainer.GRPOTrainer, loss_type=loss_type)
    with jax.enable_x64(True):
        loss, by_logit = ours(old, reference, aggregation, token_ratio, BETA)
        assert float(loss) == pytest.approx(value, rel=1e-6)
        np.testing.assert_allclose(by_logit, gradient, rtol=1e-6, atol=1e-8)


def test_leave_one_out_loss():
    value, gradient, old, reference = theirs(rloo_trainer.RLOOTrainer)
    with jax.enable_x64(True):
        loss, by_logit = ours(old, reference, sequence_mean, sequence_ratio, 0.0)
        assert float(loss) == pytest.approx(value, rel=1e-6)
        np.testing.assert_allclose(by_logit, gradient, rtol=1e-6, atol=1e-8)


def test_sequence_level_ratio():
    trainer = grpo_trainer.GRPOTrainer
    value, gradient, old, reference = theirs(trainer, loss_type="grpo", importance_sampling_level="sequence")
    with jax.enable_x64(True):
        loss, by_logit = ours(old, reference, sequence_mean, mean_sequence_ratio, BETA)
        assert float(loss) == pytest.approx(value, rel=1e-6)
        np.testing.assert_allclose(by_logit, gradient, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("centered", [True, False])
def test_advantages(centered):
    """TRL's arithmetic on groups, as its trainers write it."""
    from jaxalign.rl.group_relative import grpo_advantages, rloo_advantages

    scores = torch.tensor(RNG.normal(size=(3, 4)))
    if centered:
        mean, deviation = scores.mean(1, keepdim=True), scores.std(1, keepdim=True)
        expected, found = (scores - mean) / (deviation + 1e-4), grpo_advantages
    else:
        expected, found = scores - (scores.sum(1, keepdim=True) - scores) / 3, rloo_advantages
    with jax.enable_x64(True):
        np.testing.assert_allclose(found(jnp.asarray(scores.numpy())), expected.numpy(), rtol=1e-10)
