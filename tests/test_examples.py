"""The examples run as they are printed."""

import pathlib
import subprocess
import sys

import pytest

EXAMPLES = pathlib.Path(__file__).parent.parent / "examples"


def run(name, edits=()):
    source = (EXAMPLES / name).read_text()
    for old, new in edits:
        assert old in source
        source = source.replace(old, new)
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_loss_in_your_own_loop():
    assert "P(good" in run("your_own_loop.py")


@pytest.mark.slow
def test_the_off_switch_game(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "0.3989" in run("off_switch_game.py")


@pytest.mark.slow
def test_active_queries():
    smaller = ("6, 6, 400, 32, 12, 20, 5, 32, 4", "3, 3, 20, 6, 4, 4, 2, 3, 2")
    assert "chosen as a batch" in run("active_queries.py", [smaller])


@pytest.mark.slow
def test_airl_transfer():
    assert "slippery" in run("airl_transfer.py", [("5, 16, 600", "3, 2, 20")])


@pytest.mark.slow
def test_recover_reward(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    smaller = ("6, 9, 40, 20, 2.0, 200, 300", "4, 2, 20, 10, 2.0, 20, 20")
    assert "acting at random loses" in run("recover_reward.py", [smaller])
    assert (tmp_path / "reward.png").exists()


@pytest.mark.slow
def test_sweep():
    smaller = ("8, 60, 16, 48", "2, 4, 4, 48")
    assert len(run("sweep_beta.py", [smaller]).splitlines()) == 7


@pytest.mark.slow
def test_side_effects():
    worlds = 'WORLDS = ("corner_box", "crossing", "shutdown", "belt_vase", "belt_sushi", "omelette")'
    assert "utility, AUP" in run("side_effects.py", [(worlds, 'WORLDS = ("shutdown",)')])


@pytest.mark.slow
def test_fault_tolerance(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    smaller = ("HEIGHT, WIDTH, RATES, LEVELS = 5, 10, 11, 2", "HEIGHT, WIDTH, RATES, LEVELS = 3, 5, 3, 2")
    assert "robust transitions" in run("fault_tolerance.py", [smaller])


@pytest.mark.slow
def test_curiosity(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "with RND" in run("curiosity.py", [("10, 8, 200, 16", "4, 2, 3, 2")])


@pytest.mark.slow
def test_imitate_cartpole():
    smaller = [("8, 48, 1000, 32", "2, 1, 5, 2"), ('"num_steps": 512', '"num_steps": 32')]
    assert "PPO, constant reward" in run("imitate_cartpole.py", smaller)


@pytest.mark.slow
def test_sweep_ppo(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    smaller = ("SEEDS, STEPS = 8, 60_000", "SEEDS, STEPS = 2, 2_000")
    assert len(run("sweep_ppo.py", [smaller]).splitlines()) == 8


@pytest.mark.slow
def test_successive_halving():
    smaller = ("SETTINGS, SEEDS, STEPS = 16, 4, 8_192", "SETTINGS, SEEDS, STEPS = 4, 2, 1_024")
    assert "best" in run("successive_halving.py", [smaller])


@pytest.mark.slow
def test_group_methods():
    smaller = ("4, 60, 8, 8, 16, 1e-2", "2, 3, 2, 3, 16, 1e-2")
    assert "Dr. GRPO" in run("group_methods.py", [smaller])


@pytest.mark.slow
def test_reward_model():
    assert "true" in run("reward_model.py")


@pytest.mark.slow
def test_rlhf_on_cartpole():
    few = 'QUERIES = ((2, "random"), (2, "disagreement"), (8, "random"), (8, "disagreement"), (32, "disagreement"))'
    edits = [("8, 30, 4, 32", "2, 2, 1, 4"), (few, 'QUERIES = ((2, "disagreement"),)')]
    assert "disagreement" in run("rlhf_cartpole.py", edits)


@pytest.mark.slow
def test_over_optimization():
    assert "64 preferences" in run("over_optimization.py", [("8, (4, 16, 64, 256, 1024)", "2, (4, 1024)")])


@pytest.mark.slow
def test_forgetting():
    pytest.importorskip("sklearn")
    assert "replay" in run("forgetting.py", [("5, 5, 200, 32, 128, 0.1", "2, 2, 5, 8, 8, 0.1")])


@pytest.mark.slow
def test_shift():
    pytest.importorskip("sklearn")
    smaller = [("8, 600, 64, 10", "8, 20, 16, 10"), ("100, 100, 0.05", "20, 4, 0.05")]
    assert "energy" in run("shift.py", smaller)


@pytest.mark.slow
def test_attack_policy():
    assert "PGD, epsilon 0.20" in run("attack_policy.py", [("60, 8, 16, 5", "2, 2, 2, 2")])


@pytest.mark.slow
def test_attack_embeddings():
    assert "epsilon 0.80" in run("attack_embeddings.py")


@pytest.mark.slow
def test_gan_digits(tmp_path, monkeypatch):
    pytest.importorskip("sklearn")
    monkeypatch.chdir(tmp_path)
    assert "classes covered" in run("gan_digits.py", [("6000, 64, 32, 128, 16, 1500", "20, 32, 8, 16, 4, 20")])


@pytest.mark.slow
def test_smoothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "mean radius" in run("smoothing.py", [('"steps": 1500, "n": 2_000', '"steps": 30, "n": 200')])


@pytest.mark.slow
def test_certify():
    assert "certified" in run("certify.py")


@pytest.mark.slow
def test_superposition(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "0.95" in run("superposition.py", [("40, 10, 16, 3000, 256", "6, 2, 3, 20, 16")])


@pytest.mark.slow
def test_circuits():
    assert "ACDC leaves" in run("circuits.py")


@pytest.mark.slow
def test_explain_digits(tmp_path, monkeypatch):
    pytest.importorskip("sklearn")
    monkeypatch.chdir(tmp_path)
    smaller = ("STEPS, EXPLAINED, LAYERS = 1000, 64", "STEPS, EXPLAINED, LAYERS = 40, 16")
    assert "Grad-CAM" in run("explain_digits.py", [smaller])


@pytest.mark.slow
def test_visualize_features(tmp_path, monkeypatch):
    pytest.importorskip("sklearn")
    monkeypatch.chdir(tmp_path)
    assert "class" in run("visualize_features.py", [("1500, 0.3, 20.0, 5", "20, 0.3, 20.0, 2")])
