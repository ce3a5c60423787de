"""ONNX files against onnxruntime, as exported by PyTorch and as built; VNN-LIB files against the vnnlib package."""

import io

import jax
import numpy as np
import pytest

onnx = pytest.importorskip("onnx")

from jaxalign.interop.onnx_network import load_onnx  # noqa: E402
from jaxalign.interop.vnnlib import read_vnnlib  # noqa: E402

pytestmark = pytest.mark.peer


def assert_agrees(path, *, rtol=1e-4):
    """The network at random inputs, here and in onnxruntime."""
    runtime = pytest.importorskip("onnxruntime")
    network = load_onnx(path)
    session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    x = np.random.default_rng(0).normal(size=(4, *network.input_shape)).astype(np.float32)
    ours = jax.jit(network.apply)(network.params, x)
    for y, row in zip(ours, x, strict=True):
        (expected,) = session.run(None, {network.input_name: row[None]})
        np.testing.assert_allclose(y, expected.reshape(y.shape), rtol=rtol, atol=rtol / 10)


class Networks:
    """Small PyTorch networks with what feed-forward models are made of."""

    @staticmethod
    def convolutional(torch):
        nn = torch.nn
        return nn.Sequential(
            nn.Conv2d(1, 6, 3, stride=2, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.MaxPool2d(2, padding=1),
            nn.Conv2d(6, 6, 3, padding=2, dilation=2, groups=3), nn.LeakyReLU(0.1), nn.AvgPool2d(3, 1, 1),
            nn.Dropout(0.5), nn.Flatten(), nn.LazyLinear(16), nn.Tanh(), nn.Linear(16, 5), nn.Softmax(-1),
        ), (1, 1, 12, 12)  # fmt: skip

    @staticmethod
    def residual(torch):
        class Residual(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.first, self.second = torch.nn.Conv2d(2, 4, 1), torch.nn.Conv2d(4, 4, 3, padding=1)
                self.last = torch.nn.Linear(8, 3)

            def forward(self, x):
                h = self.first(x)
                h = torch.nn.functional.relu(self.second(h) + h)
                h = torch.cat([h.mean((2, 3)), h.clamp(0, 0.5).sum((2, 3))], 1)
                return self.last(h.view(h.size(0), -1)) / 2 - torch.sigmoid(h[:, 1:4])

        return Residual(), (1, 2, 5, 5)

    @staticmethod
    def dense(torch):
        nn = torch.nn
        return nn.Sequential(nn.Linear(5, 50), nn.ReLU(), nn.Linear(50, 50), nn.ReLU(), nn.Linear(50, 5)), (1, 5)


@pytest.mark.parametrize("name", ["convolutional", "residual", "dense"])
@pytest.mark.parametrize("dynamic", [False, True])
def test_what_pytorch_exports(name, dynamic, tmp_path):
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    model, shape = getattr(Networks, name)(torch)
    x = torch.randn(shape)
    model(torch.cat([x, x + 1]))
    stream = io.BytesIO()
    axes = {"x": {0: "batch"}, "y": {0: "batch"}} if dynamic else None
    torch.onnx.export(
        model.eval(), (x,), stream, dynamo=False, input_names=["x"], output_names=["y"], dynamic_axes=axes
    )
    (tmp_path / "net.onnx").write_bytes(stream.getvalue())
    assert_agrees(tmp_path / "net.onnx")


def test_softmax_before_opset_13_goes_over_all_axes_after_its_own(tmp_path):
    """Where onnx's own evaluator differs from the standard."""
    values = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1, 2, 3]) for name in "xy"]
    graph = onnx.helper.make_graph([onnx.helper.make_node("Softmax", ["x"], ["y"])], "g", values[:1], values[1:])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 11)], ir_version=8)
    onnx.save(model, tmp_path / "net.onnx")
    assert_agrees(tmp_path / "net.onnx")


def test_the_vnnlib_package_reads_the_same():
    """It reads version 2 of the language only; and bounds of inputs in one `and` it takes for another case."""
    pytest.importorskip("vnnlib")
    compat = pytest.importorskip("vnnlib.compat")
    import vnnlib

    text = """(vnnlib-version <2.0>)
    (declare-network N (declare-input X float32 [1,2]) (declare-output Y float32 [1,3]))
    (assert (>= X[0,0] -0.25)) (assert (<= X[0,0] 0.5)) (assert (>= X[0,1] 0.1)) (assert (<= X[0,1] 0.7))
    (assert (or (and (<= Y[0,0] Y[0,1]) (<= Y[0,0] Y[0,2])) (<= (+ Y[0,2] (* 2.0 Y[0,1])) 0.75)))
    """
    ours = read_vnnlib(text)
    theirs = compat.transform(vnnlib.parse_query_string(text))
    pairs = [(one.input_box, polytope) for one in theirs for polytope in one.output_constraints]
    for case, (box, polytope) in zip(ours.cases, pairs, strict=True):
        np.testing.assert_allclose(np.stack([case.lower, case.upper], 1), box, rtol=1e-12)
        np.testing.assert_allclose(case.weights, polytope.coeff_matrix)
        np.testing.assert_allclose(case.offsets, polytope.rhs)
