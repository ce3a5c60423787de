"""ONNX networks against onnx's own evaluator, which is NumPy alone."""

import gzip
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

onnx = pytest.importorskip("onnx")
from onnx import TensorProto, helper, numpy_helper  # noqa: E402
from onnx.reference import ReferenceEvaluator  # noqa: E402

from jaxalign.interop.onnx_network import load_onnx  # noqa: E402

NUMBERS = np.random.default_rng(0)


def node(op, *inputs, name=None, outputs=("y",), **attributes):
    return helper.make_node(op, inputs, outputs, name=name, **attributes)


def write(path, nodes, shape, *, opset=17, weights=None, inputs=("x",), output="y"):
    """A file whose graph has these nodes between input x of `shape` and output y."""
    tensors = [numpy_helper.from_array(np.asarray(value), name) for name, value in (weights or {}).items()]
    graph = helper.make_graph(
        nodes, "graph", [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name in inputs],
        [helper.make_tensor_value_info(output, TensorProto.FLOAT, None)], tensors,
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)])
    onnx.save(model, path)
    return path


def normal(*shape):
    return NUMBERS.normal(size=shape).astype(np.float32)


IMAGE, ROW = (1, 4, 6, 5), (1, 6)
AXES = np.array([1, 3])
# name: nodes, the shape of the input, the opset, weights
CASES = {
    "gemm": ([node("Gemm", "x", "w", "b")], ROW, 17, {"w": normal(6, 3), "b": normal(3)}),
    "gemm transposed and scaled": (
        [node("Gemm", "x", "w", "b", transB=1, alpha=0.5, beta=2.0)], ROW, 17, {"w": normal(3, 6), "b": normal(1, 3)},
    ),
    "gemm without bias": ([node("Gemm", "x", "w")], ROW, 13, {"w": normal(6, 3)}),
    "matmul and a row added": (
        [node("MatMul", "x", "w", outputs=["z"]), node("Add", "b", "z")], ROW, 17, {"w": normal(6, 3), "b": normal(3)},
    ),
    "sub": ([node("Sub", "x", "w")], IMAGE, 17, {"w": normal(5)}),
    "mul": ([node("Mul", "w", "x")], IMAGE, 17, {"w": normal(4, 1, 1)}),
    "div": ([node("Div", "x", "w")], ROW, 17, {"w": np.float32(4.0)}),
    "relu": ([node("Relu", "x")], ROW, 17, None),
    "leaky relu": ([node("LeakyRelu", "x", alpha=0.2)], ROW, 17, None),
    "leaky relu default": ([node("LeakyRelu", "x")], ROW, 17, None),
    "sigmoid and tanh": ([node("Sigmoid", "x", outputs=["z"]), node("Tanh", "z")], ROW, 17, None),
    "softmax": ([node("Softmax", "x", axis=1)], IMAGE, 13, None),
    "softmax before 13": ([node("Softmax", "x")], IMAGE, 11, None),
    "clip": ([node("Clip", "x", "", "high")], ROW, 17, {"high": np.float32(0.5)}),
    "clip before 11": ([node("Clip", "x", min=-0.5, max=0.5)], ROW, 9, None),
    "dropout and identity": ([node("Dropout", "x", outputs=["z"]), node("Identity", "z")], ROW, 17, None),
    "flatten": ([node("Flatten", "x")], IMAGE, 17, None),
    "flatten from 2": ([node("Flatten", "x", axis=2)], IMAGE, 17, None),
    "flatten all": ([node("Flatten", "x", axis=0)], IMAGE, 17, None),
    "reshape": ([node("Reshape", "x", "shape")], IMAGE, 17, {"shape": np.array([0, -1, 10])}),
    "reshape by a constant node": (
        [node("Constant", outputs=["shape"], value_ints=[1, 24, 5]), node("Reshape", "x", "shape")], IMAGE, 17, None,
    ),
    "transpose": ([node("Transpose", "x", perm=[0, 2, 3, 1])], IMAGE, 17, None),
    "transpose default": ([node("Transpose", "x")], ROW, 17, None),
    "concat": ([node("Concat", "x", "w", "x", axis=-1)], ROW, 17, {"w": normal(1, 2)}),
    "unsqueeze, squeeze": (
        [node("Unsqueeze", "x", "axes", outputs=["z"]), node("Squeeze", "z", "axis")], ROW, 17,
        {"axes": AXES, "axis": np.array([1])},
    ),
    "unsqueeze, squeeze before 13": (
        [node("Unsqueeze", "x", axes=[1, 3], outputs=["z"]), node("Squeeze", "z", axes=[3])], ROW, 11, None,
    ),
    "reduce": ([node("ReduceMean", "x", axes=[2, 3], keepdims=0)], IMAGE, 13, None),
    "reduce all": ([node("ReduceSum", "x")], ROW, 13, None),
    "slice and gather": (
        [node("Slice", "x", "start", "end", "axis", "step", outputs=["z"]), node("Gather", "z", "which", axis=1)],
        ROW, 17, {"start": np.array([-1]), "end": np.array([-9]), "axis": np.array([1]), "step": np.array([-2]),
                  "which": np.array([-1, 0])},
    ),
    "flatten as PyTorch writes it": (
        [node("Shape", "x", outputs=["sizes"]), node("Gather", "sizes", "zero", outputs=["batch"], axis=0),
         node("Unsqueeze", "batch", "front", outputs=["row"]), node("Concat", "row", "rest", outputs=["shape"], axis=0),
         node("Cast", "x", outputs=["z"], to=1), node("Reshape", "z", "shape")],
        IMAGE, 17, {"zero": np.array(0), "front": np.array([0]), "rest": np.array([-1])},
    ),
    "batch normalisation": (
        [node("BatchNormalization", "x", "s", "b", "m", "v", epsilon=1e-3)], IMAGE, 17,
        {"s": normal(4), "b": normal(4), "m": normal(4), "v": np.abs(normal(4))},
    ),
    "convolution": (
        [node("Conv", "x", "w", "b", kernel_shape=[3, 3], pads=[1, 0, 2, 1], strides=[2, 1])], IMAGE, 17,
        {"w": normal(3, 4, 3, 3), "b": normal(3)},
    ),
    "convolution in groups, dilated": (
        [node("Conv", "x", "w", group=2, dilations=[2, 1])], IMAGE, 17, {"w": normal(6, 2, 2, 3)},
    ),
    "convolution same upper": (
        [node("Conv", "x", "w", auto_pad="SAME_UPPER", strides=[2, 2])], IMAGE, 17, {"w": normal(2, 4, 2, 2)},
    ),
    "convolution of a line": ([node("Conv", "x", "w")], (1, 2, 7), 17, {"w": normal(3, 2, 3)}),
    "max pool": ([node("MaxPool", "x", kernel_shape=[3, 2], strides=[2, 1], pads=[1, 0, 1, 1])], IMAGE, 17, None),
    "max pool, ceil that fits": (
        [node("MaxPool", "x", kernel_shape=[2, 3], strides=[2, 1], ceil_mode=1)], IMAGE, 17, None,
    ),
    "average pool": (
        [node("AveragePool", "x", kernel_shape=[3, 3], strides=[1, 2], pads=[1, 1, 1, 1])], IMAGE, 17, None,
    ),
    "average pool with padding": (
        [node("AveragePool", "x", kernel_shape=[2, 2], pads=[1, 1, 0, 0], count_include_pad=1)], IMAGE, 17, None,
    ),
    "global average pool": ([node("GlobalAveragePool", "x")], IMAGE, 17, None),
}  # fmt: skip


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    """What every case gives here, all compiled as one program, and what onnx says."""
    folder = tmp_path_factory.mktemp("onnx")
    loaded = {
        name: load_onnx(write(folder / f"{i}.onnx", nodes, shape, opset=opset, weights=weights))
        for i, (name, (nodes, shape, opset, weights)) in enumerate(CASES.items())
    }
    given = {name: normal(2, *network.input_shape) for name, network in loaded.items()}
    params = {name: network.params for name, network in loaded.items()}
    together = jax.jit(lambda p, x: {name: network.apply(p[name], x[name]) for name, network in loaded.items()})
    ours = together(params, given)
    theirs = {
        name: [ReferenceEvaluator(network.model).run(None, {"x": row[None]})[0] for row in given[name]]
        for name, network in loaded.items()
    }
    for i, image in enumerate(given["softmax before 13"]):  # here onnx's evaluator forgets what its standard says
        theirs["softmax before 13"][i] = scipy.special.softmax(image)[None]
    return loaded, ours, theirs


@pytest.mark.parametrize("name", CASES)
def test_every_operator_does_what_onnx_says(answers, name):
    loaded, ours, theirs = (part[name] for part in answers)
    assert ours.shape == (2, *loaded.output_shape)
    for y, expected in zip(ours, theirs, strict=True):
        assert expected.size == y.size
        assert loaded.output_shape == (expected.shape[1:] if expected.shape[:1] == (1,) else expected.shape)
        np.testing.assert_allclose(y, expected.reshape(y.shape), rtol=2e-5, atol=2e-6)


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    """y = relu(x W + b) V in numbers that can be checked by hand."""
    weights = {"w": np.float32([[1, -1], [2, 0]]), "b": np.float32([0, 3]), "v": np.float32([[1], [10]])}
    weights["unused"] = normal(9)
    nodes = [
        node("Gemm", "x", "w", "b", outputs=["a"]), node("Relu", "a", outputs=["h"]), node("MatMul", "h", "v"),
    ]  # fmt: skip
    return write(tmp_path_factory.mktemp("dense") / "net.onnx", nodes, ["batch", 2], weights=weights)


def test_a_network_by_hand_and_its_gradient(dense):
    network = load_onnx(dense)
    assert (network.input_shape, network.output_shape, network.input_name) == ((2,), (1,), "x")
    assert set(network.params) == {"w", "b", "v"}
    x = np.float32([[1, 2], [-4, 1]])  # hidden [5, 2] and [0, 7]
    np.testing.assert_array_equal(network.apply(network.params, x), [[25], [70]])
    np.testing.assert_array_equal(network.apply_one(network.params, x[1]), [70])
    gradient = jax.grad(lambda p: network.apply(p, x).sum())(network.params)
    np.testing.assert_array_equal(gradient["v"], [[5], [9]])
    with jax.enable_x64(True):
        assert network.apply(jax.tree.map(jnp.float64, network.params), np.float64(x)).dtype == jnp.float64


def test_a_compressed_file_and_one_without_batch_axis(dense, tmp_path):
    packed = tmp_path / "net.onnx.gz"
    packed.write_bytes(gzip.compress(dense.read_bytes()))
    assert load_onnx(packed).output_shape == (1,)
    plain = load_onnx(write(tmp_path / "line.onnx", [node("Add", "x", "w")], [3], weights={"w": np.float32([1, 2, 3])}))
    assert (plain.input_shape, plain.output_shape) == ((3,), (3,))
    np.testing.assert_array_equal(plain.apply(plain.params, np.zeros((2, 3))), [[1, 2, 3]] * 2)


BAD = {
    "operator is not supported": ([node("LSTM", "x", name="memory")], ROW),
    "LSTM node 'memory'": ([node("LSTM", "x", name="memory")], ROW),
    "attribute 'frobnicate'": ([node("Relu", "x", frobnicate=1)], ROW),
    "ceil_mode=1": ([node("MaxPool", "x", kernel_shape=[3, 3], strides=[2, 2], ceil_mode=1)], IMAGE),
    "auto_pad='DIAGONAL'": ([node("MaxPool", "x", kernel_shape=[2, 2], auto_pad="DIAGONAL")], IMAGE),
    "unknown size besides the first": ([node("Relu", "x")], [1, "n"]),
    "training": ([node("BatchNormalization", "x", "x", "x", "x", "x", training_mode=1)], IMAGE),
    "made by no node": ([node("Relu", "nowhere")], ROW),
    "only its first output": ([node("Dropout", "x", outputs=["z", "mask"]), node("Add", "z", "mask")], ROW),
    "does not fit its inputs": ([node("MatMul", "x", "x")], ROW),
    "depends on the network's input": ([node("Reshape", "x", "x")], ROW),
    "group=3": ([node("Conv", "x", "w", group=3)], IMAGE),
    "out of range": ([node("Gather", "x", "which", axis=1)], ROW),
}  # fmt: skip


@pytest.mark.parametrize("message", BAD)
def test_what_is_not_read_is_named(tmp_path, message):
    nodes, shape = BAD[message]
    path = write(tmp_path / "bad.onnx", nodes, shape, weights={"w": normal(4, 2, 3, 3), "which": np.array([6])})
    with pytest.raises(ValueError, match=message) as error:
        load_onnx(path)
    assert str(path) in str(error.value)


def test_without_onnx_the_extra_is_named(dense, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(ImportError, match=r'pip install "jaxalign\[onnx\]"'):
        load_onnx(dense)


def test_files_that_are_no_network(tmp_path):
    broken = tmp_path / "broken.onnx"
    for content in (b"not a network", b""):
        broken.write_bytes(content)
        with pytest.raises(ValueError, match=r"broken\.onnx: not a readable ONNX file"):
            load_onnx(broken)
    with pytest.raises(FileNotFoundError, match="absent"):
        load_onnx(tmp_path / "absent.onnx")
    two = write(tmp_path / "two.onnx", [node("Add", "x", "z")], ROW, inputs=("x", "z"))
    with pytest.raises(ValueError, match=r"inputs \['x', 'z'\]"):
        load_onnx(two)
