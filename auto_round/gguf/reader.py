"""Read GGUF files: a strict header parser for untrusted files, and memory-mapped tensors to verify a result.

It is independent of the `gguf` package, which wrote the header and whose own `GGUFReader` takes a minute for a
vocabulary of 262,144.
"""

from __future__ import annotations

import os
import struct
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import torch

from auto_round.codecs.ggml.types import GGML_TYPES
from auto_round.errors import DataError, VerifyError
from auto_round.gguf.file_types import FLOAT_TYPES, tensor_bytes

MAGIC = b"GGUF"
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_TYPE_NAMES = {
    0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 6: "Q5_0", 7: "Q5_1", 8: "Q8_0", 10: "Q2_K", 11: "Q3_K", 12: "Q4_K",
    13: "Q5_K", 14: "Q6_K", 30: "BF16",
}  # fmt: skip
_MOST_DIMENSIONS = 4


class TensorInfo(NamedTuple):
    """Shape in torch's order, type (`Q4_K`, `F32`), first byte in the file and number of bytes of a tensor."""

    shape: tuple[int, ...]
    kind: str
    start: int
    nbytes: int


class GgufHeader(NamedTuple):
    """Key values (lists for arrays) and tensor infos by name, in the file's order."""

    values: dict[str, Any]
    tensors: dict[str, TensorInfo]


def read_header(path: str | os.PathLike[str]) -> GgufHeader:
    """The header of a GGUF file of version 2 or 3. Raises DataError, with the file and problem, if it is unsound."""
    try:
        with open(path, "rb") as file:
            return _Reader(file, Path(path)).header()
    except OSError as error:
        raise DataError(f"cannot read {path} ({error.strerror})") from error


class _Reader:
    """Reads item by item, so a false count reaches the end of the file before it takes memory."""

    def __init__(self, file: BinaryIO, path: Path) -> None:
        self.file, self.path = file, path
        self.left = self.size = os.fstat(file.fileno()).st_size

    def header(self) -> GgufHeader:
        if self.bytes(4) != MAGIC:
            raise self.error("it does not begin with 'GGUF'")
        if (version := self.scalar("I")) not in (2, 3):
            raise self.error(f"its version is {version}; 2 and 3 are known")
        tensor_count, value_count = self.scalar("Q"), self.scalar("Q")
        values: dict[str, Any] = {}
        for _ in range(value_count):
            key = self.text()
            if key in values:
                raise self.error(f"key {key!r} is there twice")
            values[key] = self.value(self.scalar("I"))
        infos = [self.info() for _ in range(tensor_count)]
        align = values.get("general.alignment", 32)
        if not isinstance(align, int) or align < 1 or align & (align - 1):
            raise self.error(f"general.alignment is {align!r}")
        data = -(-(self.size - self.left) // align) * align
        tensors: dict[str, TensorInfo] = {}
        expected = end = 0
        for name, shape, kind, offset in infos:
            if kind in GGML_TYPES and shape[-1] % GGML_TYPES[kind].block:
                raise self.error(f"rows of tensor {name!r} do not divide into blocks")
            nbytes = tensor_bytes(kind, shape)
            if name in tensors:
                raise self.error(f"tensor {name!r} is there twice")
            if offset != expected:  # ggml's reader requires contiguous tensors
                raise self.error(f"tensor {name!r} is at byte {offset} of the data instead of {expected}")
            end = data + offset + nbytes
            if end > self.size:
                raise self.error(f"tensor {name!r} lies outside the file")
            expected += -(-nbytes // align) * align
            tensors[name] = TensorInfo(shape, kind, data + offset, nbytes)
        if tensors and self.size > max(end, data + expected):
            raise self.error(f"{self.size - data - expected} bytes follow its last tensor")
        return GgufHeader(values, tensors)

    def error(self, problem: str) -> DataError:
        return DataError(f"{self.path} is no sound GGUF file: {problem}")

    def bytes(self, count: int) -> bytes:
        if count > self.left:
            raise self.error("it ends too early")
        self.left -= count
        return self.file.read(count)

    def scalar(self, code: str) -> Any:
        return struct.unpack("<" + code, self.bytes(struct.calcsize("<" + code)))[0]

    def text(self) -> str:
        try:
            return self.bytes(self.scalar("Q")).decode("utf-8")
        except UnicodeDecodeError as error:
            raise self.error("a text is no UTF-8") from error

    def value(self, kind: int) -> Any:
        if kind in _SCALARS:
            return self.scalar(_SCALARS[kind])
        if kind == _STRING:
            return self.text()
        if kind != _ARRAY:
            raise self.error(f"a value has the unknown type {kind}")
        inner, count = self.scalar("I"), self.scalar("Q")
        if inner in _SCALARS:
            code = _SCALARS[inner]
            return list(struct.unpack(f"<{count}{code}", self.bytes(count * struct.calcsize(f"<{code}"))))
        if inner == _STRING:
            return [self.text() for _ in range(count)]
        raise self.error(f"an array has items of the unknown type {inner}")

    def info(self) -> tuple[str, tuple[int, ...], str, int]:
        name, dimensions = self.text(), self.scalar("I")
        if not 1 <= dimensions <= _MOST_DIMENSIONS:
            raise self.error(f"tensor {name!r} has {dimensions} dimensions")
        shape = tuple(self.scalar("Q") for _ in range(dimensions))[::-1]
        kind, offset = self.scalar("I"), self.scalar("Q")
        if kind not in _TYPE_NAMES:
            raise self.error(f"tensor {name!r} has type {kind}, which is unknown here")
        return name, shape, _TYPE_NAMES[kind], offset


class GgufTensors:
    """The header and the memory-mapped tensors of one file. Raises VerifyError for a damaged file."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        try:
            header = read_header(self.path)
        except DataError as error:
            raise VerifyError(f"{self.path} cannot be read back ({error})") from error
        self.values, self.tensors = header.values, header.tensors
        self._bytes = np.memmap(self.path, dtype=np.uint8, mode="r")

    def stored(self, name: str, slot: int | None = None) -> torch.Tensor:
        """A copy of a tensor, or of one `slot` of it: uint8 [..., row bytes] for blocks, else in its own dtype."""
        if name not in self.tensors:
            raise VerifyError(f"{self.path} does not hold tensor {name!r}")
        info = self.tensors[name]
        start, nbytes, shape = info.start, info.nbytes, info.shape
        if slot is not None:
            nbytes //= shape[0]
            start, shape = start + slot * nbytes, shape[1:]
        raw = torch.from_numpy(np.array(self._bytes[start : start + nbytes]))
        if info.kind in FLOAT_TYPES:
            return raw.view(FLOAT_TYPES[info.kind]).reshape(shape)
        return raw.reshape(*shape[:-1], GGML_TYPES[info.kind].row_bytes(shape[-1]))
