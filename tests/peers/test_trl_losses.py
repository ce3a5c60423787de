"""Every loss that TRL 1.x also has, against TRL's own code on the same numbers: values, and gradients by log-prob.

DPO and KTO live inside TRL's `_compute_loss`, so it is called on a bare trainer whose model returns given token
log-probabilities; CPO, SimPO and ORPO have loss methods of their own.
"""

import functools
from collections import defaultdict
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign import preferences

torch = pytest.importorskip("torch")
dpo_trainer = pytest.importorskip("trl.trainer.dpo_trainer")
kto_trainer = pytest.importorskip("trl.trainer.kto_trainer")
cpo_trainer = pytest.importorskip("trl.experimental.cpo.cpo_trainer")
orpo_trainer = pytest.importorskip("trl.experimental.orpo.orpo_trainer")

pytestmark = pytest.mark.peer

PAIRS, LENGTH, WORDS, BETA, SMOOTHING = 6, 8, 10, 0.3, 0.1


class Accelerator:
    device = "cpu"

    def gather(self, x):
        return x

    gather_for_metrics = gather


class GivenModel:
    """Stands for a language model: returns what TRL's fused head would have computed from `logits`."""

    training = True

    def __init__(self, logits, dtype=torch.float64):
        self.logits = torch.tensor(logits, dtype=dtype, requires_grad=True)

    def __call__(self, labels, **_):
        logps = torch.log_softmax(self.logits, dim=-1)[:, :-1]
        kept = labels[:, 1:] != -100
        token_logps = torch.gather(logps, 2, labels[:, 1:].clamp(min=0)[..., None])[..., 0] * kept
        zeros = torch.zeros_like(token_logps)
        return SimpleNamespace(
            log_probs=token_logps,
            log_sum_sq_probs=torch.logsumexp(2 * logps, dim=-1),
            entropy=zeros,
            mean_logits=zeros,
            is_top1=zeros > 0,
        )


@pytest.fixture(scope="module")
def pairs():
    """Chosen rows then rejected rows, as TRL concatenates them; uneven completions after a prompt of two tokens."""
    rng = np.random.default_rng(11)
    ends = rng.integers(4, LENGTH + 1, 2 * PAIRS)
    mask = (np.arange(LENGTH) >= 2) & (np.arange(LENGTH) < ends[:, None])
    return SimpleNamespace(
        logits=2 * rng.normal(size=(2 * PAIRS, LENGTH, WORDS)),
        tokens=rng.integers(0, WORDS, (2 * PAIRS, LENGTH)),
        mask=mask.astype(np.int64),
        reference=-rng.uniform(5, 20, 2 * PAIRS),
    )


def trl_dpo(pairs, dtype=torch.float64, **options):
    """TRL's mean loss, and its gradient with respect to the logits [2 PAIRS, LENGTH, WORDS]."""
    settings = {
        "loss_types": ["sigmoid"],
        "loss_weights": [1.0],
        "beta": BETA,
        "label_smoothing": SMOOTHING,
        "f_divergence_type": "reverse_kl",
        "f_alpha_divergence_coef": 0.5,
        "ld_alpha": None,
        "use_weighting": False,
        **options,
    }
    model = GivenModel(pairs.logits, dtype)
    trainer = SimpleNamespace(
        model=model,
        accelerator=Accelerator(),
        args=SimpleNamespace(discopop_tau=0.05),
        aux_loss_enabled=False,
        precompute_ref_logps=True,
        _metrics={"train": defaultdict(list)},
        _total_train_tokens=0,
        _tp_size=1,
        **settings,
    )
    reference = torch.tensor(pairs.reference, dtype=dtype)
    inputs = {
        "input_ids": torch.tensor(pairs.tokens),
        "attention_mask": torch.ones(pairs.tokens.shape, dtype=torch.int64),
        "completion_mask": torch.tensor(pairs.mask),
        "ref_chosen_logps": reference[:PAIRS],
        "ref_rejected_logps": reference[PAIRS:],
    }
    loss = dpo_trainer.DPOTrainer._compute_loss(trainer, model, inputs, False)
    loss.backward()
    return loss.item(), model.logits.grad.numpy()


def ours(pairs, loss, *, mask=None, weigh=False):
    mask = pairs.mask if mask is None else mask

    def mean(logits):
        policy = preferences.sequence_log_probs(logits, pairs.tokens, mask)
        value = loss(*jnp.split(policy, 2), *jnp.split(jnp.asarray(pairs.reference), 2))
        if weigh:
            chosen, rejected = jnp.split(preferences.wpo_weights(logits, pairs.tokens, pairs.mask), 2)
            value = value * chosen * rejected
        return value.mean()

    with jax.enable_x64(True):
        return jax.value_and_grad(mean)(jnp.asarray(pairs.logits))


def assert_same(mine, theirs, rtol=1e-9, atol=1e-12):
    np.testing.assert_allclose(mine[0], theirs[0], rtol=rtol)
    assert np.abs(theirs[1]).max() > 1e-3
    np.testing.assert_allclose(mine[1], theirs[1], rtol=rtol, atol=atol)


def pair_loss(name, **keywords):
    return functools.partial(getattr(preferences, name), beta=BETA, **keywords)


def lengths(pairs):
    return dict(zip(("chosen_lengths", "rejected_lengths"), np.split(pairs.mask.sum(axis=1), 2), strict=True))


@pytest.mark.parametrize(
    ("loss_type", "loss"),
    [
        ("sigmoid", pair_loss("dpo_loss")),
        ("hinge", pair_loss("hinge_loss")),
        ("robust", pair_loss("robust_dpo_loss", label_smoothing=SMOOTHING)),
        ("exo_pair", pair_loss("exo_pair_loss", label_smoothing=SMOOTHING)),
        ("nca_pair", pair_loss("nca_pair_loss")),
        ("bco_pair", pair_loss("bco_pair_loss")),
        ("sppo_hard", pair_loss("sppo_hard_loss")),
        ("aot", pair_loss("aot_loss", label_smoothing=SMOOTHING)),
        ("aot_unpaired", pair_loss("aot_unpaired_loss", label_smoothing=SMOOTHING)),
        ("apo_zero", pair_loss("apo_zero_loss")),
        ("apo_down", pair_loss("apo_down_loss")),
        ("discopop", pair_loss("discopop_loss")),
    ],
)
def test_pair_losses(pairs, loss_type, loss):
    # TRL builds EXO's smoothing as a float32 tensor, which costs it digits.
    rtol = 1e-6 if loss_type == "exo_pair" else 1e-9
    assert_same(ours(pairs, loss), trl_dpo(pairs, loss_types=[loss_type]), rtol)


@pytest.mark.parametrize(("loss_type", "name"), [("ipo", "ipo_loss"), ("sigmoid_norm", "length_normalized_dpo_loss")])
def test_length_normalised_losses(pairs, loss_type, name):
    assert_same(ours(pairs, pair_loss(name, **lengths(pairs))), trl_dpo(pairs, loss_types=[loss_type]))


def test_sigmoid_in_trl_ignores_label_smoothing_and_ours_does_not(pairs):
    plain = trl_dpo(pairs, label_smoothing=0.0)[0]
    assert trl_dpo(pairs, label_smoothing=0.4)[0] == plain
    assert abs(float(ours(pairs, pair_loss("dpo_loss", label_smoothing=0.4))[0]) - plain) > 1e-2


@pytest.mark.parametrize(
    ("divergence", "coefficient", "score"),
    [
        ("forward_kl", 0.5, functools.partial(preferences.alpha_score, alpha=1.0)),
        ("js_divergence", 0.5, preferences.jensen_shannon_score),
        ("alpha_divergence", 0.7, functools.partial(preferences.alpha_score, alpha=0.3)),
        ("alpha_divergence", 1.0, functools.partial(preferences.alpha_score, alpha=0.0)),
    ],
)
def test_divergences(pairs, divergence, coefficient, score):
    loss = functools.partial(preferences.with_divergence(preferences.dpo_loss, score), beta=BETA)
    near = SimpleNamespace(**{**vars(pairs), "reference": token_sums(pairs) + np.linspace(-1.5, 1.5, 2 * PAIRS)})
    # TRL's alpha divergence knows no float64.
    dtype, rtol = (torch.float32, 2e-5) if divergence == "alpha_divergence" else (torch.float64, 1e-9)
    theirs = trl_dpo(near, dtype, f_divergence_type=divergence, f_alpha_divergence_coef=coefficient)
    assert_same(ours(near, loss), theirs, rtol, 1e-6 if dtype == torch.float32 else 1e-12)


def token_sums(pairs):
    with jax.enable_x64(True):
        return np.asarray(preferences.sequence_log_probs(pairs.logits, pairs.tokens, pairs.mask))


def test_mixture(pairs):
    mixed = preferences.mixture_loss([preferences.dpo_loss, preferences.sppo_hard_loss], [0.7, 0.2])
    theirs = trl_dpo(pairs, loss_types=["sigmoid", "sppo_hard"], loss_weights=[0.7, 0.2])
    assert_same(ours(pairs, functools.partial(mixed, beta=BETA)), theirs)


def test_wpo_weights(pairs):
    assert_same(ours(pairs, pair_loss("dpo_loss"), weigh=True), trl_dpo(pairs, use_weighting=True))


def test_length_desensitised(pairs):
    with jax.enable_x64(True):
        mask = np.concatenate(preferences.length_desensitized_masks(*np.split(pairs.mask, 2), alpha=0.4))
    # The references are given, so only the policy's side is weighed on either side of this comparison.
    assert_same(ours(pairs, pair_loss("dpo_loss"), mask=mask), trl_dpo(pairs, ld_alpha=0.4))


@pytest.mark.parametrize("offset", [-2.0, 3.0])
def test_kto(pairs, offset):
    """With the KL rows' log-ratios around `offset`: below 0 the reference point is clamped."""
    rows = 2 * PAIRS
    desirable = np.arange(rows) % 3 == 0
    model = GivenModel(pairs.logits)
    kl_policy, kl_reference = np.linspace(-9, -4, rows) + offset, np.linspace(-9, -4, rows)
    trainer = SimpleNamespace(
        model=model,
        accelerator=Accelerator(),
        aux_loss_enabled=False,
        precompute_ref_logps=True,
        calculate_KL=True,
        loss_type="kto",
        beta=BETA,
        desirable_weight=1.2,
        undesirable_weight=0.8,
        _compute_kl_logps=lambda model, batch: torch.tensor(kl_policy),
        _metrics={"train": defaultdict(list)},
        _total_train_tokens=0,
        _tp_size=1,
    )
    inputs = {
        "input_ids": torch.tensor(pairs.tokens),
        "attention_mask": torch.ones(pairs.tokens.shape, dtype=torch.int64),
        "completion_mask": torch.tensor(pairs.mask),
        "label": torch.tensor(desirable),
        "ref_logps": torch.tensor(pairs.reference),
        "ref_KL_logps": torch.tensor(kl_reference),
    }
    loss = kto_trainer.KTOTrainer._compute_loss(trainer, model, inputs, False)
    loss.backward()

    def mean(logits):
        policy = preferences.sequence_log_probs(logits, pairs.tokens, pairs.mask)
        kl = preferences.batch_kl(kl_policy, kl_reference)
        weights = {"desirable_weight": 1.2, "undesirable_weight": 0.8}
        return preferences.kto_loss(policy, pairs.reference, desirable, beta=BETA, kl=kl, **weights).mean()

    with jax.enable_x64(True):
        mine = jax.value_and_grad(mean)(jnp.asarray(pairs.logits))
    assert trainer._metrics["train"]["kl"] == [pytest.approx(max(offset, 0.0))]
    assert_same(mine, (loss.item(), model.logits.grad.numpy()))


@pytest.mark.parametrize("loss_type", ["simpo", "sigmoid"])
def test_simpo_and_cpo(pairs, loss_type):
    logits, tokens = torch.tensor(pairs.logits, requires_grad=True), torch.tensor(pairs.tokens)
    labels = tokens.masked_fill(torch.tensor(pairs.mask) == 0, -100)
    average = loss_type == "simpo"
    policy = cpo_trainer.CPOTrainer.get_batch_logps(logits, labels, average_log_prob=average)
    trainer = SimpleNamespace(
        accelerator=Accelerator(), alpha=0.0, beta=BETA, label_smoothing=SMOOTHING, loss_type=loss_type, simpo_gamma=0.7
    )
    theirs, _, _ = cpo_trainer.CPOTrainer.cpo_loss(trainer, *policy.chunk(2))
    theirs.sum().backward()

    def total(logits):
        policy = preferences.sequence_log_probs(logits, pairs.tokens, pairs.mask, average=average)
        chosen, rejected = jnp.split(policy, 2)
        if average:
            loss = preferences.simpo_loss(chosen, rejected, beta=BETA, gamma=0.7, label_smoothing=SMOOTHING)
        else:
            loss = preferences.cpo_loss(chosen, rejected, beta=BETA, label_smoothing=SMOOTHING)
        return loss.sum(), loss

    with jax.enable_x64(True):
        (_, mine), gradient = jax.value_and_grad(total, has_aux=True)(jnp.asarray(pairs.logits))
    assert_same((mine, gradient), (theirs.detach().numpy(), logits.grad.numpy()))


def test_orpo():
    """TRL's method casts to float32 and returns the negative of the term it adds."""
    chosen, rejected = -np.array([0.4, 2.0, 0.01, 9.0]), -np.array([1.1, 0.3, 5.0, 9.5])
    trainer = SimpleNamespace(accelerator=Accelerator(), beta=BETA)
    theirs, *_ = orpo_trainer.ORPOTrainer.odds_ratio_loss(trainer, torch.tensor(chosen), torch.tensor(rejected))
    np.testing.assert_allclose(preferences.orpo_loss(chosen, rejected, beta=BETA), -theirs.numpy(), rtol=1e-5)
    certain = torch.zeros(1)
    assert torch.isnan(orpo_trainer.ORPOTrainer.odds_ratio_loss(trainer, certain, certain)[0]).all()
    assert jnp.isfinite(preferences.orpo_loss(jnp.zeros(1), jnp.zeros(1), beta=BETA)).all()
