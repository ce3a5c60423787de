"""Safetensors files, one or sharded: read by mapping them, so that 16-bit types need no support from elsewhere."""

import json
import math
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from jaxalign.interop.tensor_layout import TensorSource

FLOATS = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


class _Tensor(NamedTuple):
    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


def _header(file: Path) -> dict[str, _Tensor]:
    """The tensors of one file: an 8-byte little-endian length, that much JSON, then the data it points into."""
    size = os.path.getsize(file)
    with open(file, "rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > size - 8:
            raise ValueError(f"{file}: not a safetensors file, or cut short: its header would be {length:,} bytes")
        text = stream.read(length)
    tensors = {}
    try:
        for name, entry in json.loads(text).items():
            if name != "__metadata__":
                start, stop = (8 + length + offset for offset in entry["data_offsets"])
                tensors[name] = _Tensor(file, entry["dtype"], tuple(entry["shape"]), start, stop)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{file}: not a safetensors file: its header is not what the format says: {error}") from error
    for name, (_, dtype, shape, start, stop) in tensors.items():
        if stop > size:
            raise ValueError(f"{file}: cut short: tensor {name!r} ends at byte {stop:,} of {size:,}")
        if dtype in FLOATS and stop - start != math.prod(shape) * FLOATS[dtype].itemsize:
            raise ValueError(f"{file}: tensor {name!r}, {dtype} of shape {shape}, has {stop - start:,} bytes")
    return tensors


def open_safetensors(folder: Path) -> TensorSource:
    """The tensors of a Hugging Face folder, single file or sharded.

    Raises FileNotFoundError for a missing file, and ValueError naming file and tensor for a broken file, an index that
    disagrees with its shards, or (on reading) a tensor that is not of a float type.
    """
    index = folder / INDEX
    single = not index.is_file()
    if single and not (folder / SINGLE).is_file():
        raise FileNotFoundError(f"{folder}: neither {SINGLE} nor {INDEX}; weights in other formats are not read")
    tensors: dict[str, _Tensor] = {}
    if single:
        tensors = _header(folder / SINGLE)
    else:
        files = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        headers = {}
        for shard in sorted(set(files.values())):
            if not (folder / shard).is_file():
                raise FileNotFoundError(f"{index}: names the shard {shard}, which is not in the folder")
            headers[shard] = _header(folder / shard)
        for name, shard in files.items():
            if name not in headers[shard]:
                raise ValueError(f"{folder / shard}: no tensor {name!r}, though {INDEX} says so")
            tensors[name] = headers[shard][name]

    maps: dict[Path, np.ndarray] = {}

    def read(name: str) -> np.ndarray:
        tensor = tensors[name]
        if tensor.dtype not in FLOATS:
            raise ValueError(f"{tensor.file}: tensor {name!r} is {tensor.dtype}; read are {', '.join(FLOATS)}")
        if tensor.file not in maps:
            maps[tensor.file] = np.memmap(tensor.file, np.uint8, mode="r")
        data = maps[tensor.file][tensor.start : tensor.stop]
        if data.ctypes.data % FLOATS[tensor.dtype].itemsize:
            data = data.copy()
        return data.view(FLOATS[tensor.dtype]).reshape(tensor.shape)

    def where(name: str) -> str:
        return str(tensors[name].file if name in tensors else folder / SINGLE if single else index)

    return TensorSource({name: tensor.shape for name, tensor in tensors.items()}, read, where)


def write_safetensors(
    folder: Path,
    tensors: Iterable[tuple[str, tuple[int, ...], Callable[[], np.ndarray]]],
    *,
    dtype: Any,
    max_shard_bytes: int,
) -> None:
    """Write (name, shape, read) tensors into `folder` in `dtype`, starting a new file before `max_shard_bytes`.

    One shard is in memory at a time. A tensor larger than the limit gets a file of its own.
    """
    try:
        from safetensors.numpy import save_file
    except ImportError as error:
        raise ImportError('save_pretrained needs safetensors: pip install "jaxalign[lm]"') from error
    dtype = np.dtype(dtype)
    shards: list[list[tuple[str, Callable[[], np.ndarray]]]] = [[]]
    total = filled = 0
    for name, shape, read in tensors:
        size = math.prod(shape) * dtype.itemsize
        if shards[-1] and filled + size > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append((name, read))
        filled, total = filled + size, total + size
    weight_map = {}
    for number, shard in enumerate(shards, 1):
        file = SINGLE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        arrays = {name: np.ascontiguousarray(read(), dtype=dtype) for name, read in shard}
        save_file(arrays, folder / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(arrays, file))
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
