"""What each ONNX operator computes, on JAX arrays in ONNX's layout: channels second, [N, C, *spatial]."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxalign.types import Array


class Node(NamedTuple):
    """One node of a graph. `where` names file, operator and node; `opset` is the version of the operator set."""

    where: str
    attributes: dict[str, Any]
    opset: int

    def get(self, name: str, default: Any = None) -> Any:
        """An attribute, or what it is when absent."""
        return self.attributes.get(name, default)

    def refuse(self, what: str) -> ValueError:
        """The error that says what of this node is not read."""
        return ValueError(f"{self.where}: {what}")

    def integers(self, value: Any, what: str) -> list[int]:
        """Numbers that shape the graph: they must be in the file, not computed from the network's input."""
        if isinstance(value, jax.core.Tracer):
            raise self.refuse(f"{what} depends on the network's input; it must be a constant")
        return [int(v) for v in np.asarray(value).reshape(-1)]


class Operator(NamedTuple):
    """compute(node, *inputs) -> output; `attributes` are the names it understands."""

    compute: Callable[..., Any]
    attributes: frozenset[str]


OPERATORS: dict[str, Operator] = {}


def operator(name: str, attributes: str = "") -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Enter a function of (node, *inputs) under the operator's ONNX name."""

    def enter(compute: Callable[..., Any]) -> Callable[..., Any]:
        OPERATORS[name] = Operator(compute, frozenset(attributes.split()))
        return compute

    return enter


def _elementwise(function: Callable[..., Any]) -> Operator:
    return Operator(lambda node, *inputs: function(*inputs), frozenset())


def _same_rank(function: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    """ONNX adds leading axes of size one to the operand of lower rank, as NumPy does; JAX may be told not to."""

    def apply(a: Any, b: Any) -> Any:
        rank = max(jnp.ndim(a), jnp.ndim(b))
        return function(*(jnp.reshape(v, (1,) * (rank - jnp.ndim(v)) + jnp.shape(v)) for v in (a, b)))

    return apply


ARITHMETIC: dict[str, Callable[[Any, Any], Any]] = {
    "Add": jnp.add, "Sub": jnp.subtract, "Mul": jnp.multiply, "Div": jnp.divide, "Pow": jnp.power,
}  # fmt: skip
FUNCTIONS: dict[str, Callable[[Any], Any]] = {
    "Relu": jax.nn.relu, "Sigmoid": jax.nn.sigmoid, "Tanh": jnp.tanh, "Softplus": jax.nn.softplus, "Neg": jnp.negative,
    "Abs": jnp.abs, "Exp": jnp.exp, "Log": jnp.log, "Sqrt": jnp.sqrt, "Sin": jnp.sin, "Cos": jnp.cos, "Erf": lax.erf,
    "Identity": lambda x: x,
}  # fmt: skip
OPERATORS |= {name: _elementwise(_same_rank(function)) for name, function in ARITHMETIC.items()}
OPERATORS |= {name: _elementwise(function) for name, function in FUNCTIONS.items()}
OPERATORS["MatMul"] = _elementwise(jnp.matmul)


@operator("LeakyRelu", "alpha")
def _leaky_relu(node: Node, x: Array) -> Array:
    return jax.nn.leaky_relu(x, node.get("alpha", 0.01))


@operator("Gemm", "alpha beta transA transB")
def _gemm(node: Node, a: Array, b: Array, c: Array | None = None) -> Array:
    product = (a.T if node.get("transA", 0) else a) @ (b.T if node.get("transB", 0) else b)
    product = product if node.get("alpha", 1.0) == 1 else node.get("alpha") * product
    if c is None:
        return product
    return _same_rank(jnp.add)(product, c if node.get("beta", 1.0) == 1 else node.get("beta") * c)


@operator("Softmax", "axis")
def _softmax(node: Node, x: Array) -> Array:
    if node.opset >= 13:
        return jax.nn.softmax(x, node.get("axis", -1))
    axis = node.get("axis", 1) % x.ndim  # before opset 13: over this axis and all after it together
    return jax.nn.softmax(x.reshape((*x.shape[:axis], -1)), -1).reshape(x.shape)


@operator("Clip", "min max")
def _clip(node: Node, x: Array, low: Any = None, high: Any = None) -> Array:
    low, high = (node.get("min"), node.get("max")) if node.opset < 11 else (low, high)
    return jnp.clip(x, low, high)


@operator("Dropout", "ratio seed")
def _dropout(node: Node, x: Array, ratio: Any = None, training: Any = None) -> Array:
    if training is not None and any(node.integers(training, "training_mode")):
        raise node.refuse("is in training mode; only inference is read")
    return x


@operator("BatchNormalization", "epsilon momentum training_mode spatial")
def _batch_normalization(node: Node, x: Array, scale: Array, bias: Array, mean: Array, variance: Array) -> Array:
    if node.get("training_mode", 0) or not node.get("spatial", 1):
        raise node.refuse("training_mode=1 and spatial=0 are not read")
    factor = scale / jnp.sqrt(variance + node.get("epsilon", 1e-5))
    shape = (1, -1) + (1,) * (x.ndim - 2)
    return x * factor.reshape(shape) + (bias - mean * factor).reshape(shape)


@operator("Conv", "auto_pad dilations group kernel_shape pads strides")
def _convolution(node: Node, x: Array, weight: Array, bias: Array | None = None) -> Array:
    space = "".join("DHW"[-(x.ndim - 2) :])
    strides, padding, dilations = _window(node, x.shape[2:], weight.shape[2:])
    groups = node.get("group", 1)
    if weight.shape[1] * groups != x.shape[1] or weight.shape[0] % groups:
        raise node.refuse(f"group={groups} does not fit input {list(x.shape)} and weight {list(weight.shape)}")
    names = (f"NC{space}", f"OI{space}", f"NC{space}")
    y = lax.conv_general_dilated(
        x, weight, strides, padding, rhs_dilation=dilations, dimension_numbers=names, feature_group_count=groups
    )
    return y if bias is None else y + bias.reshape((1, -1) + (1,) * (x.ndim - 2))


@operator("MaxPool", "auto_pad ceil_mode dilations kernel_shape pads storage_order strides")
def _max_pool(node: Node, x: Array) -> Array:
    kernel = node.get("kernel_shape")
    strides, padding, dilations = _window(node, x.shape[2:], kernel)
    return lax.reduce_window(x, -jnp.inf, lax.max, (1, 1, *kernel), (1, 1, *strides), _outer(padding), None,
                             (1, 1, *dilations))  # fmt: skip


@operator("AveragePool", "auto_pad ceil_mode count_include_pad dilations kernel_shape pads strides")
def _average_pool(node: Node, x: Array) -> Array:
    kernel = node.get("kernel_shape")
    strides, padding, dilations = _window(node, x.shape[2:], kernel)

    def total(v: Array) -> Array:
        return lax.reduce_window(v, 0.0, lax.add, (1, 1, *kernel), (1, 1, *strides), _outer(padding), None,
                                 (1, 1, *dilations))  # fmt: skip

    if node.get("count_include_pad", 0):
        return total(x) / math.prod(kernel)
    return total(x) / total(jnp.ones((1, 1, *x.shape[2:]), x.dtype))


@operator("GlobalAveragePool")
def _global_average_pool(node: Node, x: Array) -> Array:
    return x.mean(tuple(range(2, x.ndim)), keepdims=True)


def _outer(padding: list[tuple[int, int]]) -> list[tuple[int, int]]:
    return [(0, 0), (0, 0), *padding]


def _window(node: Node, size: Any, kernel: Any) -> tuple[list[int], list[tuple[int, int]], list[int]]:
    """Strides, padding before and after, and dilations, along each spatial axis."""
    rank = len(size)
    if len(kernel) != rank or list(node.get("kernel_shape", kernel)) != list(kernel):
        raise node.refuse(f"kernel_shape {node.get('kernel_shape')} does not fit {list(kernel)} and {rank} axes")
    strides, dilations = (list(node.get(name, [1] * rank)) for name in ("strides", "dilations"))
    reach = [(k - 1) * d + 1 for k, d in zip(kernel, dilations, strict=True)]
    auto = node.get("auto_pad", b"NOTSET").decode()
    if auto in ("SAME_UPPER", "SAME_LOWER"):
        totals = [max(0, (-(-n // s) - 1) * s + r - n) for n, s, r in zip(size, strides, reach, strict=True)]
        small, large = [t // 2 for t in totals], [t - t // 2 for t in totals]
        padding = list(zip(*((small, large) if auto == "SAME_UPPER" else (large, small)), strict=True))
    elif auto in ("NOTSET", "VALID"):
        pads = list(node.get("pads", [0] * 2 * rank)) if auto == "NOTSET" else [0] * 2 * rank
        padding = list(zip(pads[:rank], pads[rank:], strict=True))
    else:
        raise node.refuse(f"auto_pad={auto!r} is not read")
    over = [(n + sum(p) - r) % s for n, p, r, s in zip(size, padding, reach, strides, strict=True)]
    if node.get("ceil_mode", 0) and any(over):
        raise node.refuse(f"ceil_mode=1 is not read where the windows do not fit exactly (input {list(size)})")
    return strides, padding, dilations


@operator("Flatten", "axis")
def _flatten(node: Node, x: Array) -> Array:
    axis = node.get("axis", 1)
    return x.reshape((math.prod(x.shape[:axis]), -1))


@operator("Reshape", "allowzero shape")
def _reshape(node: Node, x: Array, shape: Any = None) -> Array:
    sizes = node.integers(node.get("shape") if shape is None else shape, "shape")
    if not node.get("allowzero", 0):
        sizes = [x.shape[i] if size == 0 else size for i, size in enumerate(sizes)]
    return x.reshape(sizes)


@operator("Transpose", "perm")
def _transpose(node: Node, x: Array) -> Array:
    return jnp.transpose(x, node.get("perm"))


@operator("Concat", "axis")
def _concat(node: Node, *inputs: Array) -> Array:
    return jnp.concatenate(inputs, node.get("axis", 1))


@operator("Squeeze", "axes")
def _squeeze(node: Node, x: Array, axes: Any = None) -> Array:
    return jnp.squeeze(x, _axes(node, axes))


@operator("Unsqueeze", "axes")
def _unsqueeze(node: Node, x: Array, axes: Any = None) -> Array:
    return jnp.expand_dims(x, _axes(node, axes) or ())


@operator("ReduceMean", "axes keepdims noop_with_empty_axes")
def _reduce_mean(node: Node, x: Array, axes: Any = None) -> Array:
    return _reduced(node, jnp.mean, x, axes)


@operator("ReduceSum", "axes keepdims noop_with_empty_axes")
def _reduce_sum(node: Node, x: Array, axes: Any = None) -> Array:
    return _reduced(node, jnp.sum, x, axes)


def _reduced(node: Node, function: Callable[..., Any], x: Array, axes: Any) -> Array:
    over = _axes(node, axes)
    if not over and node.get("noop_with_empty_axes", 0):
        return x
    return function(x, over or None, keepdims=bool(node.get("keepdims", 1)))


def _axes(node: Node, axes: Any) -> tuple[int, ...] | None:
    """The axes: an attribute in older opsets, an input in newer ones."""
    axes = node.get("axes") if axes is None else axes
    return None if axes is None else tuple(node.integers(axes, "axes"))


@operator("Gather", "axis")
def _gather(node: Node, x: Array, indices: Any) -> Array:
    if isinstance(indices, jax.core.Tracer):
        raise node.refuse("indices depend on the network's input; they must be constants")
    axis, indices = node.get("axis", 0), np.asarray(indices)
    size = x.shape[axis]
    if (indices < -size).any() or (indices >= size).any():
        raise node.refuse(f"indices {indices.tolist()} are out of range for {size} entries")
    return jnp.take(x, indices % size, axis)


@operator("Slice", "axes starts ends")
def _slice(node: Node, x: Array, starts: Any = None, ends: Any = None, axes: Any = None, steps: Any = None) -> Array:
    starts, ends = (node.integers(node.get(n) if v is None else v, n) for n, v in (("starts", starts), ("ends", ends)))
    over = _axes(node, axes) or tuple(range(len(starts)))
    strides = [1] * len(starts) if steps is None else node.integers(steps, "steps")
    window = [slice(None)] * x.ndim
    for axis, start, end, stride in zip(over, starts, ends, strides, strict=True):
        if stride < 0 and end < -x.shape[axis]:
            end = None  # past the first element: Python would count a negative end from the back
        window[axis] = slice(start, end, stride)
    return x[tuple(window)]
