"""`jaxalign dpo` from files to report, on a tiny model written to disk."""

import json
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers

from jaxalign.cli import main
from jaxalign.cli.dpo import Dpo
from jaxalign.cli.dpo_report import MEASURES, measure
from jaxalign.interop import Tokenizer, load_pretrained, save_pretrained
from jaxalign.networks import TransformerConfig, transformer
from jaxalign.preferences import PairLogProbs
from jaxalign.runtime import read_metrics

CONFIG = TransformerConfig(
    vocab_size=257, hidden_size=16, intermediate_size=24, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=8
)
QUICK = ["--batch-size", "4", "--microbatch", "2", "--max-length", "24", "--learning-rate", "0.02"]


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    """A model folder, and a file in which the answer "yes" is always preferred."""
    root = tmp_path_factory.mktemp("dpo")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Backend(models.BPE(vocab={c: i for i, c in enumerate([*alphabet, "<end>"])}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = Tokenizer(backend, eos_token="<end>", pad_token="<end>")
    save_pretrained(root / "model", (transformer(CONFIG).init(jax.random.key(0)), CONFIG, tokenizer))
    rows = [{"prompt": f"Is {i} a number?", "chosen": " yes", "rejected": " no"} for i in range(20)]
    (root / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


def run(material, out, *more):
    main(["dpo", "--model", str(material / "model"), "--data", str(material / "pairs.jsonl"), "--out", str(out),
          *QUICK, *more])  # fmt: skip


@pytest.fixture(scope="module")
def finished(material):
    """One whole run with adapters and two seeds."""
    out = material / "run"
    run(material, out, "--lora", "--lora-rank", "2", "--seeds", "2", "--epochs", "4")
    return out


def test_a_learnable_preference_is_learned_and_reported(finished):
    results = json.loads((finished / "results.json").read_text())
    accuracy, low, high = results["reward_accuracy"]["after"]
    assert accuracy == 1.0
    assert low <= accuracy <= high
    assert results["reward_accuracy"]["before"] is None
    assert len(results["reward_accuracy"]["seeds"]) == 2
    assert results["reward_margin"]["after"][1] > 0
    page = (finished / "report.html").read_text()
    assert "implicit reward prefers chosen" in page
    assert page.count("data:image/png") == 3
    assert {"loss.png", "rewards.png", "logps.png", "tensorboard"} <= {p.name for p in finished.iterdir()}


def test_metrics_have_trl_names_and_a_lane_per_seed(finished):
    metrics = read_metrics(finished)
    assert metrics["rewards/margins"].shape == (16, 2)
    assert {"rewards/chosen", "rewards/rejected", "rewards/accuracies", "logps/chosen", "logps/rejected", "entropy",
            "displacement/chosen", "loss", "gradient_norm"} <= metrics.keys()  # fmt: skip
    np.testing.assert_allclose(metrics["loss"][0], np.log(2.0), rtol=1e-4)


def test_the_tuned_model_is_exported_with_merged_adapters(material, finished):
    before, after = load_pretrained(material / "model"), load_pretrained(finished / "model")
    assert after.config.lora_rank == 0
    tokens = np.array([after.tokenizer.encode("Is 3 a number?")])
    assert np.abs(after.network.apply(after.params, tokens) - before.network.apply(before.params, tokens)).max() > 1e-3
    assert after.tokenizer.decode(tokens[0]) == "Is 3 a number?"


def test_a_finished_run_is_not_overwritten_but_can_be_reported_again(material, finished, capsys):
    with pytest.raises(SystemExit) as stop:
        run(material, finished, "--lora", "--lora-rank", "2", "--seeds", "2", "--epochs", "4")
    assert stop.value.code == 2
    assert "--resume" in capsys.readouterr().err
    before = (finished / "results.json").read_text()
    run(material, finished, "--lora", "--lora-rank", "2", "--seeds", "2", "--epochs", "4", "--resume")
    assert (finished / "results.json").read_text() == before


@pytest.mark.slow
def test_a_killed_job_goes_on_to_the_same_bits(material, tmp_path):
    """kill -9 in mid-run, then --resume: metrics, results and exported weights equal an uninterrupted run's."""
    options = ["--model", str(material / "model"), "--data", str(material / "pairs.jsonl"), *QUICK, "--epochs", "200",
               "--lora", "--lora-rank", "2", "--checkpoint-every", "50"]  # fmt: skip
    command = [sys.executable, "-m", "jaxalign", "dpo", *options, "--out"]
    subprocess.run([*command, str(tmp_path / "whole")], check=True, capture_output=True)
    killed = subprocess.Popen([*command, str(tmp_path / "cut")], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    metrics = tmp_path / "cut" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not metrics.exists() or metrics.read_bytes().count(b"\n") < 60:
        assert killed.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    killed.kill()
    assert killed.wait() == -9
    assert metrics.read_bytes().count(b"\n") < 800
    subprocess.run([*command, str(tmp_path / "cut"), "--resume"], check=True, capture_output=True)
    for name in ("metrics.jsonl", "results.json", "model/model.safetensors"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name


def test_resuming_with_other_options_names_them(material, finished, capsys):
    same = ["--lora", "--lora-rank", "2", "--seeds", "2", "--epochs", "4", "--resume"]
    with pytest.raises(SystemExit):
        run(material, finished, *same, "--beta", "0.3")
    assert "beta: 0.1 then, 0.3 now" in capsys.readouterr().err


@pytest.mark.parametrize("loss", ["simpo", *(pytest.param(name, marks=pytest.mark.slow) for name in ("ipo", "aot"))])
def test_other_losses_train_all_weights(material, tmp_path, loss):
    run(material, tmp_path / "run", "--loss", loss, "--limit", "12", "--no-export")
    assert np.isfinite(read_metrics(tmp_path / "run")["loss"]).all()
    assert not (tmp_path / "run" / "model").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--batch-size", "5"], "--microbatch 2"),
        (["--loss", "exo"], "--label-smoothing"),
        (["--loss", "ipo", "--label-smoothing", "0.1"], "--label-smoothing"),
        (["--model", "/nowhere"], "/nowhere"),
        (["--seeds", "0"], "--seeds must be positive"),
        (["--microbatch", "0"], "--microbatch must be positive"),
        (["--beta", "0"], "--beta must be positive"),
    ],
)
def test_bad_options_are_one_line(material, tmp_path, capsys, options, message):
    with pytest.raises(SystemExit) as stop:
        run(material, tmp_path / "run", *options)
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


def test_a_malformed_file_is_named(material, tmp_path, capsys):
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"prompt": "a", "chosen": "b", "rejected": "b"}\n' * 3)
    with pytest.raises(SystemExit):
        main(["dpo", "--model", str(material / "model"), "--data", str(bad), "--out", str(tmp_path / "run")])
    assert "bad.jsonl" in capsys.readouterr().err


def test_help_teaches(capsys):
    with pytest.raises(SystemExit):
        main(["dpo", "--help"])
    text = capsys.readouterr().out
    assert "Preference pairs" in text
    assert "jaxalign dpo --data pairs.jsonl.gz --lora" in text
    assert Dpo().beta == 0.1


def test_measures_by_hand():
    def logps(chosen, rejected, shape=()):
        values = [np.broadcast_to(np.asarray(x, np.float32), (*shape, 2)) for x in (chosen, rejected)]
        return PairLogProbs(*values, *(np.full((*shape, 2), n, np.float32) for n in (2, 4)), np.zeros((*shape, 2)))

    before = logps([-4.0, -6.0], [-6.0, -8.0])
    after = logps([-3.0, -8.0], [-6.0, -8.0], shape=(1,))
    found = measure(before, after, beta=0.5, seed=0)
    assert found.keys() == MEASURES.keys()
    assert found["prefers_chosen"]["before"][0] == 1.0
    assert found["prefers_chosen"]["after"][0] == 0.75  # one tie
    assert found["prefers_chosen_per_token"]["before"][0] == 0.0  # -2 > -1.5 and -3 > -2 are both false
    assert found["reward_accuracy"]["after"][0] == 0.5
    assert found["reward_margin"]["after"][0] == pytest.approx((0.5 * 1.0 + 0.5 * -2.0) / 2)
    assert found["chosen_displacement"]["after"][0] == pytest.approx(-0.5)
