"""The ground the benchmarks stand on: discovery, one process per case, peers present and absent, ratios, the file."""

import json
import math
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from benchmarks import environment, peers, report
from benchmarks.__main__ import main
from benchmarks.measure import measure, measure_host, pool
from benchmarks.one_case import load
from benchmarks.schedule import compare, discover, run_benchmark

SCRIPT = '''"""How fast is a matrix product?

More about it.
"""

import jax.numpy as jnp

from benchmarks.measure import measure


def cases(quick):
    return [{"name": f"n {n}", "n": n, "ids": [[1, 2]] * 50} for n in ((8,) if quick else (8, 16))]


def run(case):
    n = case["n"]
    print("chatter does not harm")
    quality = lambda out: {"trace": float(jnp.trace(out)), "row": [1.0] * 2}
    return measure(jnp.matmul, jnp.eye(n), jnp.eye(n), unit="products", amount=1, flops=2.0 * n**3, quality=quality)
'''

PEER = """
import json, sys
case = json.load(sys.stdin)
print("chatter")
print(json.dumps({"side": "other 1.0", "unit": "products", "amount": 1.0, "first": 3.0, "samples": [1.0, 2.0, 9.0],
    "arithmetic": "float32", "process_peak_bytes": 1000, "quality": {"trace": float(case["n"])},
    "environment": {"device_kind": "cpu", "other": "1.0"}}))
"""


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "product.py").write_text(SCRIPT)
    (tmp_path / "not_a_benchmark.py").write_text("def run(case): ...\n")
    return tmp_path


def with_peer(folder, monkeypatch, text=PEER):
    (folder / "peer").mkdir()
    (folder / "peer" / "product.py").write_text(text)
    monkeypatch.setenv(peers.VARIABLE, sys.executable)


def run_main(folder, *arguments):
    out = folder / "out.json"
    status = main(["product", "--quick", "--folder", str(folder), "--out", str(out), *arguments])
    return status, json.loads(out.read_text())


def test_list_names_every_benchmark_with_its_question(folder, capsys):
    assert main(["--list", "--folder", str(folder)]) == 0
    assert capsys.readouterr().out == "product: How fast is a matrix product?\n"
    assert main(["--list"]) == 0
    listed = capsys.readouterr().out
    assert "sweep: " in listed
    assert "log_probs: " in listed
    assert "schedule" not in listed


@pytest.mark.parametrize("name", sorted(discover()))
def test_every_benchmark_has_a_question_and_named_json_cases_and_less_to_do_when_quick(name):
    benchmark = discover()[name]
    assert "?" in benchmark.question.partition("\n\n")[0]
    module = load(benchmark.script)
    quick, full = module.cases(True), module.cases(False)
    assert json.loads(json.dumps(full)) == full
    for cases in (quick, full):
        names = [case["name"] for case in cases]
        assert names
        assert len(set(names)) == len(names)
    assert len(quick) <= len(full)


def test_a_quick_run_writes_every_field(folder, capsys):
    status, document = run_main(folder, "--no-peer")
    assert status == 0
    assert document["question"].startswith("How fast")
    assert (document["quick"], document["rounds"], [c["name"] for c in document["cases"]]) == (True, 1, ["n 8"])
    for field in ("platform", "device_kind", "devices", "jax", "jaxlib", "flax", "optax", "numpy", "python", "cores"):
        assert document["environment"][field], field
    assert {"load_average", "commit", "date"} <= document["environment"].keys()
    case = document["cases"][0]
    assert case["case"] == {"name": "n 8", "n": 8, "ids": "50 items of 2 each"}
    ours = case["jaxalign"]
    assert 0 < ours["p10"] <= ours["median"] <= ours["p90"]
    assert ours["compile"] > 0
    assert ours["first"] > 0
    assert len(ours["samples"]) == len(ours["cpu_samples"]) == 10
    assert ours["rate"] == pytest.approx(1 / ours["median"])
    assert ours["flops_per_second"] == pytest.approx(2 * 8**3 / ours["median"])
    assert ours["process_peak_bytes"] > 1e7
    assert isinstance(ours["temp_bytes"], int)
    assert ours["quality"]["trace"] == 8.0
    # unknown is None with a reason, never 0
    assert ours["mfu"] is None
    assert ours["device_peak_bytes"] is None
    assert set(ours["unmeasured"]) == {"mfu", "device_peak_bytes"}
    assert case["peer"] == {"absent": "this benchmark has no peer"}
    assert case["ratio"] is None
    assert "product: How fast is a matrix product?" in capsys.readouterr().out


def test_a_peer_is_compared(folder, monkeypatch):
    with_peer(folder, monkeypatch)
    status, document = run_main(folder, "--rounds", "2")
    case = document["cases"][0]
    assert status == 0
    assert case["peer"]["samples"] == [1.0, 2.0, 9.0] * 2
    assert (case["peer"]["median"], case["peer"]["side"], case["peer"]["rounds"]) == (2.0, "other 1.0", 2)
    assert case["peer"]["flops_per_second"] == 2 * 8**3 / 2.0
    assert case["peer"]["unmeasured"]["compile"] == "part of the first run"
    assert case["ratio"]["rate"] == pytest.approx(case["jaxalign"]["rate"] * 2.0)
    assert case["ratio"]["process_peak_bytes"] == pytest.approx(case["jaxalign"]["process_peak_bytes"] / 1000)
    assert document["peer_environment"] == {"device_kind": "cpu", "other": "1.0"}


@pytest.fixture
def asked(monkeypatch):
    """The sides that were asked, in order, by a stand-in that answers at once."""
    sides = []

    def ask(command, case, *, timeout):
        sides.append("peer" if command[-1].endswith("peer/product.py") else "ours")
        side = {"unit": "u", "amount": 1.0, "first": 1.0, "samples": [1.0], "quality": {}, "arithmetic": "float32"}
        where = {"device_kind": "cpu"}
        if sides[-1] == "peer":
            return {**side, "environment": where}
        return {"measurement": {**side, "flops": None, "compile": 1.0, "temp_bytes": 0}, "environment": where}

    monkeypatch.setattr(peers, "ask", ask)
    return sides


def test_sides_take_turns(folder, monkeypatch, asked):
    with_peer(folder, monkeypatch)
    run_benchmark(discover(folder)["product"], quick=True, rounds=3, say=lambda line: None)
    assert asked == ["peer", "ours"] * 3


def test_an_absent_peer_environment_is_absent(folder, monkeypatch, tmp_path, asked, capsys):
    with_peer(folder, monkeypatch)
    monkeypatch.delenv(peers.VARIABLE)
    monkeypatch.setattr(peers, "ROOT", tmp_path)
    document = run_benchmark(discover(folder)["product"], quick=True, rounds=1, say=lambda line: None)
    assert asked == ["ours"]
    case = document["cases"][0]
    assert list(case["peer"]) == ["absent"]
    assert "`python -m benchmarks peers` makes one" in case["peer"]["absent"]
    assert document["peer_environment"] == case["peer"]
    assert case["ratio"] is None
    document["environment"] = None
    report.show(document)
    assert "absent: no peer environment" in capsys.readouterr().out


def test_a_side_that_fails_is_recorded_with_its_reason_and_without_its_folder(folder, monkeypatch, capsys):
    with_peer(folder, monkeypatch, "raise SystemExit('no model in /some/where/deep/model.bin')")
    status, document = run_main(folder)
    assert status == 1
    assert document["cases"][0]["peer"]["failed"] == "ended with status 1: no model in model.bin"
    assert document["cases"][0]["jaxalign"]["rate"] > 0
    assert "failed: ended with status 1" in capsys.readouterr().out


def test_a_script_that_prints_no_json_is_named():
    with pytest.raises(peers.RunFailed, match="no JSON object: 'hello"):
        peers.ask([sys.executable, "-c", "print('hello')"], {}, timeout=60)
    with pytest.raises(peers.RunFailed, match="longer than 1 s"):
        peers.ask([sys.executable, "-c", "import time; time.sleep(60)"], {}, timeout=1)


@pytest.mark.slow
@pytest.mark.peer
@pytest.mark.parametrize("tuning", ["full", "lora"])
def test_the_dpo_peer_trains_a_tiny_model_from_the_loss_of_an_untrained_one(tuning):
    if peers.interpreter("dpo") is None:
        pytest.skip("no peer environment")
    case = {
        "model": {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1,
                  "num_attention_heads": 2, "num_key_value_heads": 1, "tie_word_embeddings": True},
        "prompt_ids": [[1, 2, 3], [4, 5]], "chosen_ids": [[6, 7], [8]], "rejected_ids": [[9], [10, 11, 12]],
        "batch": 2, "warmup": 1, "steps": 3, "beta": 0.5, "learning_rate": 1e-2, "device": "cpu", "threads": 1,
        "tuning": tuning, "lora_rank": 2, "lora_alpha": 4, "lora_targets": ["q_proj", "v_proj"],
    }  # fmt: skip
    script = peers.ROOT / "benchmarks" / "peer" / "dpo.py"
    record = peers.ask([str(peers.interpreter("dpo")), str(script)], case, timeout=300)
    losses = record["quality"]["losses"]
    assert losses[0] == pytest.approx(math.log(2), abs=1e-6)  # policy and reference agree before the first step
    assert losses[-1] < losses[0]
    assert record["amount"] == 2 * 3 + 3 + 2 * 2 + 4
    assert (len(record["samples"]), len(losses)) == (3, 4)
    assert record["process_peak_bytes"] > 1e7
    trained, every = record["details"]["trained_parameters"], record["details"]["parameters"]
    assert trained == every if tuning == "full" else trained < every


def test_the_file_keeps_every_case_and_sample_and_shortens_settings_only(tmp_path):
    settings = {"name": "n", "ids": [[1, 2]] * 9, "long": [0.5] * 40, "short": [1, 2], "folder": "/home/me/models/tiny"}
    cases = [{"name": f"{i}", "case": settings, "jaxalign": {"samples": [1.0] * 100}} for i in range(60)]
    report.write({"benchmark": "b", "cases": cases}, tmp_path / "new" / "out.json")
    written = json.loads((tmp_path / "new" / "out.json").read_text())["cases"]
    assert [case["name"] for case in written] == [str(i) for i in range(60)]
    assert written[0]["jaxalign"]["samples"] == [1.0] * 100
    assert written[0]["case"] == {
        "name": "n", "ids": "9 items of 2 each", "long": "40 items", "short": [1, 2], "folder": "tiny",
    }  # fmt: skip


def side(rate, **more):
    return {"unit": "u", "amount": 1.0, "rate": rate, "process_peak_bytes": 100, "temp_bytes": 10, **more}


def test_baseline_ratio(folder):
    def document(rate, kind="cpu", name="a"):
        cases = [{"name": name, "jaxalign": side(rate)}, {"name": "gone", "jaxalign": {"failed": "x"}}]
        return {"benchmark": "b", "environment": {"device_kind": kind}, "cases": cases}

    new = document(6.0)
    report.add_baseline(new, document(4.0))
    assert new["cases"][0]["baseline"] == {"rate": 1.5, "process_peak_bytes": 1.0, "temp_bytes": 1.0}
    assert "absent" in new["cases"][1]["baseline"]
    assert "baseline_device" not in new
    report.add_baseline(new, document(4.0, kind="NVIDIA H100", name="other"))
    assert new["cases"][0]["baseline"] == {"absent": "not measured in the older file"}
    assert new["baseline_device"] == "NVIDIA H100"
    with pytest.raises(ValueError, match="baseline is of 'c', this is 'b'"):
        report.add_baseline(new, {**document(4.0), "benchmark": "c"})
    (folder / "old.json").write_text("[]")
    with pytest.raises(ValueError, match="is not a file of"):
        report.load_baseline(folder / "old.json")


def test_measuring_counts_runs_and_advances_a_state():
    def step(state, x):
        return state + x, state * 2

    result = measure(
        step, jnp.zeros(()), jnp.ones(()), unit="steps", amount=1, warmup=2, repeats=5,
        advance=lambda args, out: (out[0], args[1]), quality=lambda out: {"state": float(out[0])},
    )  # fmt: skip
    assert result.quality == {"state": 8.0}  # 1 first, 2 warm, 5 timed
    assert len(result.samples) == 5
    donated = measure(
        step, jnp.zeros(()), jnp.ones(()), unit="steps", amount=1, donate=(0,), repeats=3,
        advance=lambda args, out: (out[0], args[1]),
    )  # fmt: skip
    assert len(donated.samples) == 3


def test_the_budget_ends_the_repeats_but_leaves_three():
    calls = []
    result = measure_host(lambda: calls.append(0), unit="u", amount=1, repeats=50, budget=0.0)
    assert (len(result.samples), len(calls), result.compile) == (3, 5, None)
    with pytest.raises(ValueError, match="repeats >= 1"):
        measure_host(lambda: None, unit="u", amount=1, repeats=0)


def test_pooled_rounds_by_hand():
    one = {"unit": "u", "amount": 6.0, "compile": 1.0, "first": 2.0, "samples": [1.0, 2.0], "quality": {"loss": 1.0}}
    two = {**one, "compile": 3.0, "samples": [3.0, 4.0, 5.0], "temp_bytes": 7, "quality": {"loss": 2.0}, "flops": 9.0}
    record = pool([one, two])
    assert (record["median"], record["rate"], record["compile"], record["temp_bytes"]) == (3.0, 2.0, 2.0, 7)
    assert (record["p10"], record["p90"]) == pytest.approx((1.4, 4.6))
    assert record["flops_per_second"] == 3.0
    assert record["cpu_median"] is None
    assert record["details"] == {"differs between rounds": ["loss"]}


def test_utilisation_is_achieved_over_peak_where_the_peak_is_known():
    record = {
        "jaxalign": side(1.0, flops_per_second=98.94e12, flops=1.0, arithmetic="bfloat16", details={}),
        "peer": {"absent": "here"},
    }
    compare(record, {"device_kind": "NVIDIA H100 80GB HBM3"}, None)
    assert record["jaxalign"]["mfu"] == pytest.approx(0.1)
    assert environment.peak_flops("NVIDIA H100 PCIe", "bfloat16") == 756e12
    assert environment.peak_flops("TPU v5 lite", "bfloat16") == 197e12
    assert environment.peak_flops("TPU v5", "bfloat16") == 459e12
    assert environment.peak_flops("cpu", "float32") is None
    assert environment.peak_flops("TPU v4", "float32") is None
    assert environment.matmul_arithmetic("float32") == "float32" or jax.default_backend() != "cpu"


def test_peak_memory_is_the_process_own_and_not_its_starters():
    command = [sys.executable, "-c", "from benchmarks.environment import process_peak_bytes as p; print(p())"]
    ballast = bytearray(300 * 2**20)
    child = int(subprocess.run(command, capture_output=True, text=True, check=True, cwd=peers.ROOT).stdout)
    own = environment.process_peak_bytes()
    assert own > len(ballast)
    assert math.isfinite(child)
    if sys.platform == "linux":
        assert 2**20 < child < len(ballast)


def test_peer_environment_is_torch_at_its_pin_first(tmp_path):
    packages = peers.environment_of("dpo").packages
    create, torch, rest = peers.install_commands(tmp_path, packages, cpu_only=True)
    assert create[1:3] == ["-m", "venv"]
    assert torch[-3:] == [peers.TORCH, "--index-url", peers.TORCH_CPU_INDEX]
    assert rest[-4:] == ["transformers", "trl", "peft", "psutil"]
    assert peers.install_commands(tmp_path, packages, cpu_only=False)[1][-1] == peers.TORCH


def test_a_wrong_peer_interpreter_is_an_error_and_not_an_absence(monkeypatch):
    monkeypatch.setenv(peers.VARIABLE, "/nowhere/python")
    with pytest.raises(FileNotFoundError, match="JAXALIGN_PEER_PYTHON is set to /nowhere/python"):
        peers.interpreter("dpo")


def test_every_benchmark_with_a_peer_has_its_environment():
    named = {name for environment in peers.ENVIRONMENTS for name in environment.benchmarks}
    assert named == {name for name, benchmark in discover(peers.ROOT / "benchmarks").items() if benchmark.peer.exists()}
    assert peers.environment_of("irl").folder != peers.environment_of("dpo").folder


def test_bad_requests_are_refused(folder, capsys):
    for arguments, message in (
        (["sweeep"], "no benchmark named sweeep; there are "),
        (["sweep", "log_probs", "--out", "x.json"], "--out and --baseline go with one benchmark"),
        (["sweep", "--rounds", "0"], "at least 1"),
    ):
        with pytest.raises(SystemExit):
            main(arguments)
        assert message in capsys.readouterr().err
    with pytest.raises(ValueError, match="no case with 'q' in its name"):
        run_benchmark(discover(folder)["product"], quick=True, rounds=1, only="q")
