"""A feed-forward ONNX network as a JAX function and its parameters."""

import gzip
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign.interop.extras import from_extra
from jaxalign.interop.onnx_operators import OPERATORS, Node
from jaxalign.types import Array, ArrayLike, Params

DOMAINS = ("", "ai.onnx")


class OnnxNetwork(NamedTuple):
    """A network from a file. `apply` is pure: it can be jitted, mapped, differentiated and certified.

    apply(params, x [B, *input_shape]) -> [B, *output_shape]; apply_one is the same for one example, without B. Each
    example goes through the graph by itself, so that a file that fixes its batch at one takes any number here.
    params: the weights by their names in the file, float arrays as wide as JAX's default allows.
    input_shape, output_shape: of one example, without the leading axis of size one or of unknown size that holds the
        batch; a file without such an axis has none to take away.
    input_name, output_name, opset: as in the file. model: the file as onnx reads it, for other runtimes.
    """

    params: Params
    apply: Callable[[Params, ArrayLike], Array]
    apply_one: Callable[[Params, ArrayLike], Array]
    input_shape: tuple[int, ...]
    output_shape: tuple[int, ...]
    input_name: str
    output_name: str
    opset: int
    model: Any


class _Step(NamedTuple):
    """One node to run: `inputs` and `outputs` are names of values, "" an input left out."""

    compute: Callable[..., Any]
    node: Node
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    proto: Any


def load_onnx(path: str | os.PathLike[str]) -> OnnxNetwork:
    """Read a network of one input and one output [...]: the operators of `onnx_operators`, inference only.

    What the file computes from constants and shapes alone (the targets of a Reshape, say) is computed here, once.

    Raises FileNotFoundError, ImportError naming the extra `onnx`, and ValueError naming the file, the operator and the
    node for a file that cannot be read, an operator or attribute that is not supported, several inputs or outputs, or
    an axis of unknown size other than the first.
    """
    path = Path(path)
    model = _read(path)
    graph = model.graph
    opset = max((entry.version for entry in model.opset_import if entry.domain in DOMAINS), default=1)
    onnx = from_extra("onnx", "onnx")
    constants = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
    inputs = [value for value in graph.input if value.name not in constants]
    if len(inputs) != 1 or len(graph.output) != 1:
        names = f"inputs {[value.name for value in inputs]} and outputs {[value.name for value in graph.output]}"
        raise ValueError(f"{path}: one input and one output are read; the file has {names}")
    shape, batched = _input_shape(path, inputs[0])
    steps = _steps(path, graph, opset, {inputs[0].name, *constants}, constants)
    steps, static, out = _fold(path, steps, constants, inputs[0].name, graph.output[0].name, shape)
    used = {name for step in steps for name in step.inputs}
    params = {name: jnp.asarray(value) for name, value in constants.items() if _is_float(value) and name in used}
    whole = _runner(steps, static, inputs[0].name, graph.output[0].name)
    batch_out = batched and out[:1] == (1,)

    def apply_one(params: Params, x: ArrayLike) -> Array:
        y = whole(params, jnp.asarray(x).reshape(shape))
        return y.reshape(out[1:]) if batch_out else y

    def apply(params: Params, x: ArrayLike) -> Array:
        return jax.vmap(apply_one, (None, 0))(params, jnp.asarray(x))

    example, answer = shape[1:] if batched else shape, out[1:] if batch_out else out
    return OnnxNetwork(params, apply, apply_one, example, answer, inputs[0].name, graph.output[0].name, opset, model)


def _read(path: Path) -> Any:
    onnx = from_extra("onnx", "onnx")
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        if path.suffix == ".gz":
            model = onnx.load_model_from_string(gzip.decompress(path.read_bytes()))
        else:
            model = onnx.load(path)
    except Exception as error:  # protobuf, gzip and missing files of weights each raise their own
        raise ValueError(f"{path}: not a readable ONNX file: {error}") from error
    if not model.graph.node:
        raise ValueError(f"{path}: not a readable ONNX file: its graph has no node")
    return model


def _input_shape(path: Path, value: Any) -> tuple[tuple[int, ...], bool]:
    """The shape with a batch of one, and whether its first axis is the batch."""
    sizes = [axis.dim_value if axis.HasField("dim_value") else None for axis in value.type.tensor_type.shape.dim]
    sizes = [size if size and size > 0 else None for size in sizes]  # some writers say 0 or -1 for unknown
    if None in sizes[1:]:
        raise ValueError(f"{path}: input {value.name!r} has an axis of unknown size besides the first: {sizes}")
    batched = len(sizes) > 1 and sizes[0] in (None, 1)
    if not batched and None in sizes:
        raise ValueError(f"{path}: input {value.name!r} has no axis of known size: {sizes}")
    return tuple(size or 1 for size in sizes), batched


def _steps(path: Path, graph: Any, opset: int, known: set[str], constants: dict[str, np.ndarray]) -> list[_Step]:
    """The nodes as steps, checked; values of Constant nodes join `constants`."""
    onnx = from_extra("onnx", "onnx")
    steps: list[_Step] = []
    for proto in graph.node:
        where = f"{path}: {proto.op_type} node {proto.name or proto.output[0]!r}"
        attributes = {entry.name: onnx.helper.get_attribute_value(entry) for entry in proto.attribute}
        if proto.op_type == "Constant":
            constants[proto.output[0]] = _constant(where, attributes, onnx)
            known.add(proto.output[0])
            continue
        if proto.domain not in DOMAINS:
            raise ValueError(f"{where}: the operator set {proto.domain!r} is not supported")
        if missing := [name for name in proto.input if name and name not in known]:
            raise ValueError(f"{where}: its input {missing[0]!r} is made by no node before it")
        used = [name for name in proto.output[1:] if any(name in other.input for other in graph.node)]
        entry = OPERATORS.get(proto.op_type)
        if entry is not None and used:
            raise ValueError(f"{where}: only its first output is read, but {used[0]!r} is used")
        if entry is not None and (odd := sorted(set(attributes) - entry.attributes)):
            raise ValueError(f"{where}: the attribute {odd[0]!r} is not supported (opset {opset})")
        compute = _unsupported if entry is None else entry.compute
        steps.append(_Step(compute, Node(where, attributes, opset), tuple(proto.input), tuple(proto.output), proto))
        known.update(proto.output)
    if graph.output[0].name not in known:
        raise ValueError(f"{path}: the output {graph.output[0].name!r} is made by no node")
    return steps


def _constant(where: str, attributes: Mapping[str, Any], onnx: Any) -> np.ndarray:
    kind, value = next(iter(attributes.items()), ("nothing", None))
    if kind == "value":
        return onnx.numpy_helper.to_array(value)
    dtypes = {"value_float": np.float32, "value_floats": np.float32, "value_int": np.int64, "value_ints": np.int64}
    if kind not in dtypes:
        raise ValueError(f"{where}: a constant given by {kind} is not supported")
    return np.asarray(value, dtypes[kind])


def _unsupported(node: Node, *inputs: Any) -> Any:
    raise node.refuse("the operator is not supported; supported are " + ", ".join(sorted(OPERATORS)))


def _is_float(value: Any) -> bool:
    return np.issubdtype(value.dtype, np.floating)


def _fold(
    path: Path, steps: list[_Step], constants: dict[str, np.ndarray], input_name: str, output: str,
    shape: tuple[int, ...],
) -> tuple[list[_Step], dict[str, np.ndarray], tuple[int, ...]]:  # fmt: skip
    """The steps that depend on the input's values, the values of the others, and the shape of the output.

    Steps whose inputs are all whole numbers from the file, and Shape, are computed by onnx itself.
    """
    reference = from_extra("onnx.reference", "onnx").ReferenceEvaluator
    static = {name: value for name, value in constants.items() if not _is_float(value)}
    shapes = {name: jax.ShapeDtypeStruct(value.shape, jnp.asarray(value).dtype) for name, value in constants.items()}
    shapes[input_name] = jax.ShapeDtypeStruct(shape, jnp.float32)
    left = []
    for step in steps:
        if step.proto.op_type == "Cast" and all(name in shapes and name not in static for name in step.inputs):
            step = step._replace(compute=_cast)
        given = [static.get(name, shapes.get(name)) if name else None for name in step.inputs]
        if step.proto.op_type == "Shape":
            given = [np.empty(shapes[name].shape, np.float32) for name in step.inputs if name]
        if all(isinstance(value, np.ndarray) for value in given):
            feeds = dict(zip(step.inputs, given, strict=True))
            values = reference(step.proto, opsets={"": step.node.opset}).run(None, feeds)
            made = {n: np.asarray(v) for n, v in zip(step.outputs, values, strict=False)}
            static.update({n: v for n, v in made.items() if not _is_float(v)})
            constants.update({n: v for n, v in made.items() if _is_float(v)})
            shapes.update({n: jax.ShapeDtypeStruct(v.shape, jnp.asarray(v).dtype) for n, v in made.items()})
            continue
        shapes[step.outputs[0]] = _shape_of(step, given)
        left.append(step)
    if output not in shapes or not jnp.issubdtype(shapes[output].dtype, jnp.floating):
        raise ValueError(f"{path}: the output {output!r} is not a float array that depends on the input")
    return left, static, shapes[output].shape


def _cast(node: Node, x: Array) -> Array:
    if node.get("to") not in (1, 11):
        raise node.refuse("only casts of the network's values to float or double, which change nothing, are read")
    return x


def _shape_of(step: _Step, given: list[Any]) -> Any:
    """Shape and type of a step's output; `given` holds arrays that are known and the shapes of the others."""
    traced = {i: value for i, value in enumerate(given) if isinstance(value, jax.ShapeDtypeStruct)}

    def compute(values: dict[int, Array]) -> Any:
        return step.compute(step.node, *(values.get(i, value) for i, value in enumerate(given)))

    try:
        return jax.eval_shape(compute, traced)
    except (TypeError, IndexError, ValueError, AttributeError) as error:
        if str(error).startswith(step.node.where):
            raise
        shapes = ", ".join("-" if value is None else str(list(value.shape)) for value in given)
        raise ValueError(f"{step.node.where}: does not fit its inputs {shapes}: {error}") from error


def _runner(
    steps: list[_Step], static: dict[str, np.ndarray], input_name: str, output: str
) -> Callable[[Params, Array], Array]:
    """run(params, x): the steps in order, on one example with the file's own shape."""

    def run(params: Params, x: Array) -> Array:
        values = {"": None, **static, **params, input_name: x}
        for step in steps:
            values[step.outputs[0]] = step.compute(step.node, *(values[name] for name in step.inputs))
        return values[output]

    return run
