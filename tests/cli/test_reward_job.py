"""`jaxalign reward` from files to report and back from disk, on a tiny model; and its measures by hand."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from rich.console import Console
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers

from jaxalign.cli.reward import Reward
from jaxalign.cli.reward_report import PairRewards, measure
from jaxalign.cli.reward_run import run as run_job
from jaxalign.interop import Tokenizer, save_pretrained
from jaxalign.interop.reward_models import load_reward_model
from jaxalign.networks import TransformerConfig, transformer
from jaxalign.runtime import read_metrics

CONFIG = TransformerConfig(
    vocab_size=257, hidden_size=16, intermediate_size=24, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=8
)


def quiet():
    return Console(quiet=True)


@pytest.fixture(scope="module")
def options(tmp_path_factory):
    """Quick ones, over a model folder and a file in which the answer "yes" is always preferred."""
    root = tmp_path_factory.mktemp("reward")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Backend(models.BPE(vocab={c: i for i, c in enumerate([*alphabet, "<end>"])}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = Tokenizer(backend, eos_token="<end>", pad_token="<end>")
    save_pretrained(root / "model", (jax.jit(transformer(CONFIG).init)(jax.random.key(0)), CONFIG, tokenizer))
    rows = [{"prompt": f"Is {i} a number?", "chosen": " yes", "rejected": " no"} for i in range(40)]
    (root / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Reward(
        data=root / "pairs.jsonl", model=str(root / "model"), out=root / "run", batch_size=4, microbatch=2,
        max_length=24, learning_rate=0.02, epochs=4, lora=True, lora_rank=2, ensemble=2, patience=1, check_every=12,
    )  # fmt: skip


@pytest.fixture(scope="module")
def results(options):
    """What one whole run of two members measured."""
    return run_job(options, quiet())


def test_a_learnable_preference_is_learned_and_reported(options, results):
    written = json.loads((options.out / "results.json").read_text())
    assert written == json.loads(json.dumps(results))
    accuracy, low, high = written["accuracy"]
    assert (accuracy, low, high) == (1.0, 1.0, 1.0)
    assert written["margin"][1] > 0
    assert written["log_loss"][0] < 0.3
    assert written["members"] == [1.0, 1.0]
    assert written["prefers_longer"][0] == 1.0  # "yes" is longer than "no"
    assert written["accuracy_similar_length"] is None
    assert written["best_step"] <= written["steps"]
    page = (options.out / "report.html").read_text()
    assert page.count("data:image/png") == 3
    assert "expected calibration error" in page
    assert {"loss.png", "rewards.png", "reliability.png", "tensorboard"} <= {p.name for p in options.out.iterdir()}


def test_metrics_have_a_lane_per_member_and_the_validation_loss(options, results):
    metrics = read_metrics(options.out)
    assert metrics["rewards/accuracies"].shape[1] == 2
    assert metrics["validation/loss"][-1] < np.log(2)
    assert (metrics["loss"][0] != metrics["loss"][0, 0]).any()  # they begin apart and see other bootstraps


def test_the_saved_ensemble_prefers_what_was_preferred(options, results):
    loaded = load_reward_model(options.out / "model")
    assert loaded.size == 2
    rewards = []
    for answer in (" yes", " no"):
        tokens = [*loaded.tokenizer.encode("Is 77 a number?" + answer), loaded.tokenizer.eos_id]
        row = np.asarray([tokens + [0] * (24 - len(tokens))], np.int32)
        rewards.append(loaded.rewards(row, np.arange(24)[None] < len(tokens))[:, 0])
    assert (rewards[0] > rewards[1]).all()


def test_a_run_is_not_overwritten(options, results):
    with pytest.raises(FileExistsError, match="--resume"):
        run_job(options, quiet())


@pytest.mark.slow
def test_a_finished_run_is_reported_again_and_other_options_are_named(options, results):
    again = run_job(dataclasses.replace(options, resume=True), quiet())
    assert again == results
    with pytest.raises(ValueError, match="centering"):
        run_job(dataclasses.replace(options, resume=True, centering=0.5), quiet())


@pytest.mark.slow
def test_all_weights_of_one_model(options, tmp_path):
    one = dataclasses.replace(options, ensemble=1, lora=False, out=tmp_path / "run")
    results = run_job(one, quiet())
    assert results["accuracy"][0] == 1.0
    assert results["disagreement"] is None
    assert load_reward_model(one.out / "model").size == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 5}, "--microbatch 2"),
        ({"ensemble": 0}, "--ensemble must be positive"),
        ({"patience": 0}, "--patience must be positive"),
        ({"label_smoothing": 0.5}, "--label-smoothing must lie between 0 and 0.5"),
        ({"validation": 0.0}, "--validation must lie between 0 and 1"),
        ({"centering": -1.0}, "--centering must not be negative"),
    ],
)
def test_bad_options_are_named(options, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        run_job(dataclasses.replace(options, out=tmp_path / "run", **changes), quiet())


def test_measures_by_hand():
    """Three pairs, two members: margins (2, 0), (1, -3), (0, 0)."""
    chosen = np.array([[2.0, 1.0], [1.0, -1.0], [0.5, 0.0]])
    rejected = np.array([[0.0, 1.0], [0.0, 2.0], [0.5, 0.0]])
    found = measure(PairRewards(chosen, rejected, np.array([10, 20, 8]), np.array([5, 21, 8])), seed=0)
    mean = np.array([1.0, -1.0, 0.0])
    assert found["accuracy"][0] == 0.5
    assert found["margin"][0] == pytest.approx(0.0)
    assert found["log_loss"][0] == pytest.approx(np.logaddexp(0, -mean).mean(), rel=1e-6)
    sure = 1 / (1 + np.exp(-1))
    assert found["brier_score"][0] == pytest.approx(((sure - 1) ** 2 + sure**2) / 3, rel=1e-5)
    assert found["calibration_error"][0] == pytest.approx(2 / 3 * abs(sure - 0.5), rel=1e-5)
    assert found["prefers_longer"][0] == 1.0  # the first chosen, and the second rejected, are longer
    assert found["labels_prefer_longer"][0] == 0.5
    assert found["accuracy_similar_length"][0] == 0.25  # the second, wrong, and the third, tied
    assert found["disagreement"][0] == pytest.approx((1 + 2 + 0) / 3)
    assert found["least_sure_accuracy"][0] == 0.5
    assert found["members"] == [pytest.approx(2.5 / 3), pytest.approx(1 / 3)]
    assert found["reliability"]["count"] == [1, 2]
    low, high = found["accuracy"][1:]
    assert low <= 0.5 <= high
    alone = measure(PairRewards(chosen[:, :1], rejected[:, :1], np.ones(3), np.ones(3)), seed=0)
    assert (alone["disagreement"], alone["least_sure_accuracy"], alone["prefers_longer"]) == (None, None, None)
