"""`jaxalign grpo` and `jaxalign ppo-lm` from end to end on a tiny model, and the mistakes they catch."""

import dataclasses
import json
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from jaxalign.cli.grpo import Grpo
from jaxalign.cli.online_run import job_of, run
from jaxalign.cli.ppo_lm import PpoLm
from jaxalign.interop import load_pretrained, save_reward_model
from jaxalign.preferences import language_reward
from jaxalign.rlhf import Completions
from jaxalign.runtime import read_metrics

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent / "interop"))
import tiny_models

SMALL = {
    "steps": 2, "prompts": 2, "samples": 2, "max_new_tokens": 4, "held_out": 3, "lora_rank": 2, "microbatch": 2,
    "checkpoint_every": 1, "learning_rate": 1e-2,
}  # fmt: skip


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("online")
    tiny_models.write_folder(folder / "model", tiny_models.random_tensors(0), config=tiny_models.config_json())
    rows = [{"prompt": f"{word} {number}", "wish": "h"} for word in ("hell", "hello", "st") for number in range(4)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "mine.py").write_text(
        "def reward(prompts, completions, wish):\n"
        "    return [len(text) / (1 + len(letter)) for text, letter in zip(completions, wish)]\n"
        "def broken(prompts, completions, wish):\n"
        "    broken.calls = getattr(broken, 'calls', 0) + 1\n"
        "    return [0.5 * (i % 2) if broken.calls < 4 else float('nan') for i, _ in enumerate(completions)]\n"
    )
    return folder


def options(files, out, kind=Grpo, **changes):
    chosen = {"data": files / "prompts.jsonl", "reward": f"{files / 'mine.py'}:reward", "model": str(files / "model")}
    return kind(**{**SMALL, **chosen, "out": out, **changes})


def quiet():
    return Console(file=open("/dev/null", "w"), force_terminal=False)


@pytest.fixture(scope="module")
def done(files, tmp_path_factory):
    job = options(files, tmp_path_factory.mktemp("runs") / "grpo")
    return job, run(job, quiet())


def test_a_run_leaves_what_it_promises(done):
    job, results = done
    assert results["held_out_prompts"] == 3
    written = json.loads((job.out / "results.json").read_text())["scores"]
    assert {name: tuple(x) for name, x in written.items()} == results["scores"]
    metrics = read_metrics(job.out)
    assert {"objective/scores", "objective/kl", "entropy", "completion/length"} <= metrics.keys()
    assert len(metrics["loss"]) == 2
    html = (job.out / "report.html").read_text()
    assert "held-out prompt" in html
    assert "hell" in html
    samples = [json.loads(line) for line in (job.out / "samples.jsonl").read_text().splitlines()]
    assert len(samples) == 3
    assert all(row["reward_after"] == len(row["after"]) / 2 for row in samples)
    tuned, start = load_pretrained(job.out / "model"), load_pretrained(job.model)
    difference = np.asarray(tuned.params["layers"]["attention"]["q"]["kernel"]) - np.asarray(
        start.params["layers"]["attention"]["q"]["kernel"]
    )
    assert np.abs(difference).max() > 0


def test_a_run_is_not_overwritten_and_goes_on_when_asked(done):
    job, results = done
    with pytest.raises(FileExistsError, match="add --resume"):
        run(job, quiet())
    again = run(dataclasses.replace(job, resume=True), quiet())
    assert again["scores"] == results["scores"]


def test_a_reward_model_pays_what_it_says(files, tmp_path):
    start = load_pretrained(files / "model")
    network = language_reward(start.network).starting_from({"model": start.params})
    params = jax.tree.map(lambda x: x[None], network.init(jax.random.key(0)))
    save_reward_model(tmp_path / "judge", start, params)
    job = job_of(options(files, tmp_path, kind=PpoLm, reward=None, reward_model=tmp_path / "judge"), start)
    tokens = jnp.array([[1, 5, 6, 7], [2, 9, 8, 0]])
    mask = jnp.array([[0, 0, 1, 1], [0, 1, 1, 0]]) != 0
    completions = Completions(tokens, mask, jnp.zeros(mask.shape), jnp.ones(2, bool))
    paid = job.network.apply(job.network.init(jax.random.key(0)), None, completions)
    np.testing.assert_allclose(paid, network.apply(jax.tree.map(lambda x: x[0], params), tokens, mask), rtol=1e-5)
    assert job.words is None


@pytest.mark.slow
def test_ppo_runs_too_with_an_adaptive_price(files, tmp_path):
    job = options(files, tmp_path / "ppo", kind=PpoLm, kl_target=1.0, epochs=2, minibatches=2)
    run(job, quiet())
    assert "value/explained_variance" in read_metrics(job.out)


def test_a_reward_that_breaks_in_training_is_named_and_nothing_is_lost(files, tmp_path):
    job = options(files, tmp_path / "broken", reward=f"{files / 'mine.py'}:broken", export=False)
    with pytest.raises(ValueError, match=r"the reward failed at step 1: ValueError: broken returned nan"):
        run(job, quiet())
    assert (job.out / "checkpoints").exists()
    assert len(read_metrics(job.out)["loss"]) >= 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"samples": 1}, "--samples must be at least 2"),
        ({"prompts": 3, "microbatch": 4}, "do not split into --minibatches 1 of a multiple of --microbatch 4"),
        ({"steps": 0}, "--steps must be positive"),
        ({"reward": None}, "give --reward or --reward-model"),
        ({"max_new_tokens": 500}, "more than the model's context of 128"),
        ({"max_prompt_length": 2}, r"prompt 0 .* tokens; allowed are 1 to 2"),
        ({"reward": "gone.py:reward"}, "gone.py: no such file"),
    ],
)
def test_mistakes_are_told_before_training(files, tmp_path, changes, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        run(options(files, tmp_path / "bad", **changes), quiet())
