"""`jaxalign certify --onnx --property`: the answer, what is kept of it, and what is refused."""

import io
import json

import numpy as np
import pytest
from rich.console import Console

onnx = pytest.importorskip("onnx")
from onnx import TensorProto, helper, numpy_helper  # noqa: E402

from jaxalign.cli.certify_property import certify_property, verdict_report, verdict_results  # noqa: E402

LIMITS = {"time_limit": 20.0, "batch_size": 8}


@pytest.fixture(scope="module")
def network(tmp_path_factory):
    """y = [|x0 - 0.3|, x1] of an image [2, 1], as a file."""
    weights = {
        "w": np.float32([[1, -1, 0], [0, 0, 1]]), "b": np.float32([-0.3, 0.3, 9]),
        "v": np.float32([[1, 0], [1, 0], [0, 1]]), "c": np.float32([0, -9]),
    }  # fmt: skip
    nodes = [
        helper.make_node("Flatten", ["image"], ["x"]), helper.make_node("Gemm", ["x", "w", "b"], ["a"]),
        helper.make_node("Relu", ["a"], ["h"]), helper.make_node("Gemm", ["h", "v", "c"], ["y"]),
    ]  # fmt: skip
    graph = helper.make_graph(
        nodes, "bends", [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["batch", 2, 1])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 2])],
        [numpy_helper.from_array(value, name) for name, value in weights.items()],
    )  # fmt: skip
    path = tmp_path_factory.mktemp("net") / "bends.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)]), path)
    return path


def asked(folder, condition):
    """A file with the box [-1, 2] x [-1, 1]."""
    declared = "".join(f"(declare-const {name}_{i} Real)\n" for name in "XY" for i in range(2))
    box = "(assert (and (>= X_0 -1) (<= X_0 2) (>= X_1 -1) (<= X_1 1)))\n"
    path = folder / "p.vnnlib"
    path.write_text(f"{declared}{box}(assert {condition})")
    return path


def test_a_falsified_and_then_a_verified_property(network, tmp_path):
    """The second is true by a hair, which takes float64 to prove."""
    page = io.StringIO()
    console, out = Console(file=page, width=100), tmp_path / "run"
    verdict = certify_property(network, asked(tmp_path, "(<= Y_0 0.01)"), out=out, console=console, **LIMITS)
    kept = json.loads((out / "verdict.json").read_text())
    assert (verdict.status, kept["status"]) == ("falsified", "falsified")
    assert kept["onnx"] == str(network)
    with np.load(out / "counterexample.npz") as file:
        x, y = file["x"], file["y"]
    assert x.shape == (2, 1)
    assert 0.29 <= x[0, 0] <= 0.31
    np.testing.assert_allclose(y, [abs(x[0, 0] - 0.3), x[1, 0]], atol=1e-6)
    np.testing.assert_array_equal(kept["counterexample"], x.reshape(-1))
    assert "Falsified" in page.getvalue()
    assert f"{x[0, 0]:.9g}" in page.getvalue()

    verdict = certify_property(network, asked(tmp_path, "(<= Y_0 -0.000000001)"), out=out, console=console, **LIMITS)
    kept = json.loads((out / "verdict.json").read_text())
    assert (verdict.status, kept["status"], kept["boxes_left"]) == ("verified", "verified", 0)
    assert kept["counterexample"] is None
    assert not (out / "counterexample.npz").exists()
    assert "Verified" in page.getvalue()


def test_no_time_is_unknown_and_json_still(network, tmp_path):
    verdict = certify_property(network, asked(tmp_path, "(<= Y_1 -2)"), time_limit=1e-9, batch_size=8)
    assert verdict.status == "unknown"
    assert json.loads(json.dumps(verdict_results(verdict)))["lower_bound"] is None
    assert "1 left" in verdict_report("title", verdict).html()


def test_what_does_not_fit_is_refused(network, tmp_path):
    path = tmp_path / "one.vnnlib"
    path.write_text("(declare-const X_0 Real)(declare-const Y_0 Real)(assert (and (>= X_0 0) (<= X_0 1) (<= Y_0 0)))")
    with pytest.raises(ValueError, match=r"one\.vnnlib is about 1 inputs and 1 outputs; .*bends\.onnx has 2 and 2"):
        certify_property(network, path)


def test_a_network_that_onnx_reads_otherwise_is_refused(network, tmp_path, monkeypatch):
    """Were an operator wrong here, the first look at the network would tell."""
    from jaxalign.interop import onnx_operators

    relu = onnx_operators.OPERATORS["Relu"]
    monkeypatch.setitem(onnx_operators.OPERATORS, "Relu", relu._replace(compute=lambda node, x: x))
    with pytest.raises(ValueError, match=r"bends\.onnx: gives .* here and .* in onnx"):
        certify_property(network, asked(tmp_path, "(<= Y_0 -1)"))
