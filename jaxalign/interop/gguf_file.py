"""The GGUF container: header, metadata and dequantised tensors.

The header is parsed here rather than by `gguf.GGUFReader`, which makes a NumPy view of every vocabulary entry and merge
and so takes seconds where this takes a tenth; the block formats, which are many and intricate, are left to `gguf`.
"""

import mmap
import struct
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxalign.interop.extras import lm_extra

VERSIONS = (2, 3)
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9


class GGUFTensor(NamedTuple):
    """shape: outermost axis first, as NumPy has it; kind: the ggml type number; start: byte offset in the file."""

    shape: tuple[int, ...]
    kind: int
    start: int


class _Cursor:
    """Reads little-endian values from a mapped file, front to back."""

    def __init__(self, data: Any, file: Path) -> None:
        self.data, self.file, self.at = data, file, 0

    def take(self, layout: str) -> tuple[Any, ...]:
        layout = "<" + layout
        size = struct.calcsize(layout)
        if self.at + size > len(self.data):
            raise ValueError(f"{self.file}: cut short: the header runs past the end at byte {self.at:,}")
        values = struct.unpack_from(layout, self.data, self.at)
        self.at += size
        return values

    def text(self) -> str:
        (length,) = self.take("Q")
        stop = self.at + length
        if stop > len(self.data):
            raise ValueError(f"{self.file}: cut short: a string of {length:,} bytes at byte {self.at:,}")
        value = self.data[self.at : stop]
        self.at = stop
        try:
            return value.decode("utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{self.file}: a string before byte {stop:,} is not UTF-8: {error}") from error

    def value(self, kind: int) -> Any:
        if kind == STRING:
            return self.text()
        if kind == ARRAY:
            item, count = self.take("IQ")
            if item in SCALARS:
                if count * struct.calcsize(SCALARS[item]) > len(self.data) - self.at:
                    raise ValueError(f"{self.file}: cut short: an array of {count:,} values at byte {self.at:,}")
                return list(self.take(f"{count}{SCALARS[item]}"))
            return [self.value(item) for _ in range(count)]
        if kind not in SCALARS:
            raise ValueError(f"{self.file}: metadata of unknown type {kind} at byte {self.at:,}")
        return self.take(SCALARS[kind])[0]


class GGUFFile:
    """An open GGUF file.

    metadata: key -> number, bool, str, or list of them
    tensors: name -> GGUFTensor
    """

    def __init__(self, path: str | Path) -> None:
        """Read the header. Raises ValueError naming the file if it is not GGUF, of another version, or cut short."""
        self.path = Path(path)
        with open(self.path, "rb") as stream:
            if stream.read(4) != b"GGUF":
                raise ValueError(f"{self.path}: not a GGUF file")
            mapped = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
        cursor = _Cursor(mapped, self.path)
        cursor.at = 4
        (version,) = cursor.take("I")
        if version not in VERSIONS:
            raise ValueError(f"{self.path}: GGUF version {version}; read are {VERSIONS} in little-endian order")
        tensor_count, pair_count = cursor.take("QQ")
        self.metadata: dict[str, Any] = {}
        for _ in range(pair_count):
            key = cursor.text()
            (kind,) = cursor.take("I")
            self.metadata[key] = cursor.value(kind)
        infos = []
        for _ in range(tensor_count):
            name = cursor.text()
            (axes,) = cursor.take("I")
            shape = cursor.take(f"{axes}Q")[::-1]
            infos.append((name, shape, *cursor.take("IQ")))
        alignment = self.metadata.get("general.alignment", 32)
        data_start = -(-cursor.at // alignment) * alignment
        self.tensors = {name: GGUFTensor(shape, kind, data_start + at) for name, shape, kind, at in infos}
        self._bytes = np.frombuffer(mapped, np.uint8)

    def read(self, name: str) -> np.ndarray:
        """One tensor, dequantised to float32 (float64 stays), in its NumPy shape.

        Raises ValueError naming file and tensor for a block format that `gguf` cannot dequantise, or missing bytes.
        """
        gguf = lm_extra("gguf")
        shape, number, start = self.tensors[name]
        try:
            kind = gguf.GGMLQuantizationType(number)
        except ValueError as error:
            raise ValueError(f"{self.path}: tensor {name!r} has the unknown type {number}") from error
        block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
        if shape[-1] % block:
            raise ValueError(f"{self.path}: tensor {name!r}: rows of {shape[-1]} do not fill blocks of {block}")
        row_bytes = shape[-1] // block * block_bytes
        rows = int(np.prod(shape[:-1], dtype=np.int64))
        raw = self._bytes[start : start + rows * row_bytes]
        if len(raw) < rows * row_bytes:
            raise ValueError(f"{self.path}: cut short: tensor {name!r} has {len(raw):,} of {rows * row_bytes:,} bytes")
        plain = {"F32": np.float32, "F16": np.float16, "F64": np.float64}
        if kind.name in plain:
            return raw.view(plain[kind.name]).reshape(shape)
        # Blocks know nothing of rows, and gguf loops over 16 rows at a time: rows of some 64 KiB keep that loop short.
        joined = next(n for n in range(max(1, min(rows, 65536 // row_bytes)), 0, -1) if rows % n == 0)
        try:
            return gguf.dequantize(raw.reshape(-1, joined * row_bytes), kind).reshape(shape)
        except NotImplementedError as error:
            raise ValueError(f"{self.path}: tensor {name!r} is {kind.name}, which gguf cannot dequantise") from error
