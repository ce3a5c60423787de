"""`jaxalign circuits`: it finds a known circuit, goes on where it was cut, and refuses what makes no sense."""

import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from jaxalign import Network, interop
from jaxalign.cli import circuit_problems, circuits_run
from jaxalign.cli.circuit_problems import Problem, boolean_problem, signed_logit
from jaxalign.cli.circuits import Circuits
from jaxalign.cli.circuits_run import Stages, run
from jaxalign.interpretability.mlp_graph import mlp_graph
from jaxalign.networks.mlp import MLP
from jaxalign.networks.transformer import TransformerConfig, transformer
from jaxalign.runtime.circuit_figures import circuit_drawing, faithfulness_curve, patching_heatmap

QUIET = Console(quiet=True)
SMALL = {
    "prompts": 8, "exact_prompts": 4, "batch_size": 3, "steps": 2, "sizes": (6, 12), "random_circuits": 1,
    "exact_edges": 8, "acdc_edges": 8, "threshold": 0.02,
}  # fmt: skip


def known_problem(options, console):
    """output 0 = |x0 - x1| by neurons 0 and 1, output 1 = x2 by neuron 2."""
    kernels = [[1.0, -1, 0], [-1, 1, 0], [0, 0, 1]], [[1.0, 0], [1, 0], [0, 1]]
    params = {f"Dense_{i}": {"kernel": jnp.array(w), "bias": jnp.zeros(len(w[0]))} for i, w in enumerate(kernels)}
    network = Network.from_linen(MLP((3, 2)), jnp.zeros((1, 3)))
    x = np.random.default_rng(options.seed).integers(0, 2, (options.prompts, 3)).astype(np.float32)
    x[:, 1] = 1 - x[:, 0]
    corrupted = x.copy()
    corrupted[np.arange(len(x)), np.arange(len(x)) % 2] = x[np.arange(len(x)), 1 - np.arange(len(x)) % 2]
    return Problem(
        mlp_graph(3, (3, 2)), signed_logit, network, params, jnp.asarray(x), jnp.asarray(corrupted),
        jnp.ones(len(x)), (), ("input 0", "input 1"), ("A network made by hand.",),
    )  # fmt: skip


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("circuits") / "run"
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(circuits_run, "problem_of", known_problem)
        run(Circuits(out=out, **SMALL), QUIET)
    return out


def test_it_finds_a_known_circuit(finished):
    results = json.loads((finished / "results.json").read_text())
    assert results["clean"] == [1, 1, 1]
    assert results["corrupted"] == [0, 0, 0]
    circuit = results["circuit"]
    assert circuit["edges"] == 6
    assert circuit["nodes"] == ["input 0", "input 1", "neuron 0.0", "neuron 0.1"]
    np.testing.assert_allclose([circuit["faithfulness"], circuit["rest"]], [[1] * 3, [0] * 3], atol=1e-6)
    assert results["acdc"]["edges"] == 6
    assert results["minimality"]["worth"].keys() == set(circuit["nodes"])
    with np.load(finished / "circuit.npz") as file:
        assert file["keep"].sum() == 6
        assert file["sources"][0] == "input 0"
    page = (finished / "report.html").read_text()
    assert page.count("data:image/png") == 3
    assert "6 of 15 edges" in page


def test_what_is_done_is_kept(finished, monkeypatch):
    monkeypatch.setattr(circuits_run, "problem_of", known_problem)
    with pytest.raises(FileExistsError, match="add --resume"):
        run(Circuits(out=finished, **SMALL), QUIET)
    with pytest.raises(ValueError, match="holds another run: seed, steps differ"):
        run(Circuits(out=finished, resume=True, **SMALL | {"seed": 3, "steps": 4}), QUIET)
    asked = []
    monkeypatch.setattr(circuits_run, "write_report", lambda options, problem, found: ({}, found))
    monkeypatch.setattr(circuits_run, "_shown", lambda report, options, console: None)
    compute = Stages._in_batches
    monkeypatch.setattr(
        Stages, "_in_batches", lambda self, name, *given: asked.append(name) or compute(self, name, *given)
    )
    found = run(Circuits(out=finished, resume=True, **SMALL), QUIET)
    assert asked == []
    (finished / "stages" / "task.npz").write_bytes(b"cut off")
    again = run(Circuits(out=finished, resume=True, **SMALL), QUIET)
    assert asked == ["task"]
    np.testing.assert_array_equal(again.task["clean"], found.task["clean"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"task": "ioi"}, "--task ioi does not fit --model mlp"),
        ({"model": "smollm2-135m", "task": "boolean"}, "--task boolean does not fit"),
        ({"prompts": 7}, "--prompts must be even"),
        ({"steps": 0}, "--steps must be at least 1, got 0"),
        ({"sizes": (8, 4)}, "--sizes must be positive and rise"),
        ({"threshold": 0.0}, "--threshold above 0"),
        ({"seed": -1}, "--seed must not be negative"),
    ],
)
def test_what_makes_no_sense_is_refused(tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        run(Circuits(out=tmp_path / "run", **SMALL | arguments), QUIET)


def test_figures_refuse_what_does_not_fit():
    with pytest.raises(ValueError, match=r"needs effect \[L, 2\]"):
        patching_heatmap(np.zeros((3, 4)), ["a", "b"])
    with pytest.raises(ValueError, match=r"needs \[2, 3\]"):
        faithfulness_curve([1, 2], {"mine": np.zeros((2, 2))})
    with pytest.raises(ValueError, match="no edges"):
        circuit_drawing(mlp_graph(1, (1,)), np.zeros((1, 1)), np.zeros((1, 1)))


@pytest.mark.slow
def test_the_network_that_is_trained_uses_the_inputs_it_needs(tmp_path):
    problem = boolean_problem(0, 64, QUIET)
    right = problem.metric(problem.network.apply(problem.params, problem.clean), problem.target)
    wrong = problem.metric(problem.network.apply(problem.params, problem.corrupted), problem.target)
    assert right.min() > 0 > wrong.max()
    results = run(Circuits(out=tmp_path / "run", prompts=16), QUIET)
    assert {"input 0", "input 1"} <= set(results["circuit"]["nodes"])
    assert [name for name in results["acdc"]["nodes"] if "input" in name] == ["input 0", "input 1"]
    assert abs(results["circuit"]["faithfulness"][0] - 1) < 0.15


@pytest.mark.slow
def test_a_language_model_is_patched_as_well(tmp_path, monkeypatch):
    config = TransformerConfig(400, 8, 8, 2, 2, 1, 4, remat="none")
    model = transformer(config)
    encode = lambda text: [sum(map(ord, w)) % 400 for w in text.replace(",", " ,").split()]  # noqa: E731
    loaded = types.SimpleNamespace(
        network=model,
        params=model.init(jax.random.key(0)),
        tokenizer=types.SimpleNamespace(encode=encode),
        config=config,
    )
    monkeypatch.setattr(interop, "load_pretrained", lambda name: loaded)
    problem = circuit_problems.problem_of(Circuits(model="tiny", prompts=4), QUIET)
    assert problem.clean.shape == (4, len(problem.slots))
    results = run(Circuits(model="tiny", out=tmp_path / "run", **SMALL | {"acdc_edges": 0}), QUIET)
    assert -1 <= results["heads_rank_correlation"] <= 1
    assert len(results["heads"]) == 4
    page = (tmp_path / "run" / "report.html").read_text()
    assert page.count("data:image/png") >= 4
    assert "Heads and positions" in page
