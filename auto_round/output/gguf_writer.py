"""Write one GGUF file at planned offsets: rows in any order; the file is renamed when all of them are written."""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from auto_round.codecs.ggml.types import GGML_TYPES
from auto_round.errors import ConfigError, OutputError
from auto_round.files import bytes_of, path_inside, sync_folder
from auto_round.gguf.file_types import FLOAT_TYPES
from auto_round.gguf.metadata import gguf_package
from auto_round.output.writer import AtomicOutput, PartialFile, Records

ALIGNMENT = 32
_MAX_DIMENSIONS = 4  # of a tensor in ggml
_MAX_NAME_BYTES = 63  # of a tensor's name in ggml


@dataclass(frozen=True)
class TypedValue:
    """A key's value with an explicit GGUF type: `TypedValue(3, "UINT64")`."""

    value: Any
    kind: str


class _TensorSlot:
    """Offset of one tensor behind the header, and which of its rows are written."""

    def __init__(self, name: str, shape: tuple[int, ...], kind: str, offset: int) -> None:
        self.name, self.shape, self.kind, self.offset = name, shape, kind, offset
        columns = shape[-1]
        is_float = kind in FLOAT_TYPES
        self.row_bytes = columns * FLOAT_TYPES[kind].itemsize if is_float else GGML_TYPES[kind].row_bytes(columns)
        self.slots, self.rows = math.prod(shape[:-2]), (shape[-2] if len(shape) > 1 else 1)
        self.nbytes = self.slots * self.rows * self.row_bytes
        self.written = torch.zeros(self.slots * self.rows, dtype=torch.bool)


class GgufFile(AtomicOutput):
    """Writes one `.gguf` under a temporary name and renames it when every row was written exactly once.

    Use as a context manager: a normal exit finishes the file, an exception removes it. The order of writes does not
    change the bytes.

    Args:
        path: the file to create, in an existing folder. An existing file is replaced at the end.
        arch: llama.cpp's name of the architecture, `general.architecture`.
        metadata: keys and values in file order. A Python bool, int (uint32, or int32 if negative), float (float32) or
            str, or a non-empty list of these (integers as int32); or `TypedValue`.
        tensors: (name, shape in torch's order, type) of every tensor, in file order.
        records: continue after these writes of an earlier writer, all that it returned by `take_records`.

    Raises:
        OutputError: the file cannot be created, the disk is full, or the file does not hold the `records`.
        ConfigError: a shape, a type or a value that GGUF cannot hold; a duplicate key or tensor.
        UnsupportedError: the `gguf` package is not installed.
    """

    def __init__(
        self, path: str | os.PathLike[str], arch: str, metadata: Mapping[str, Any],
        tensors: Sequence[tuple[str, Sequence[int], str]], records: Records | None = None,
    ) -> None:  # fmt: skip
        self.path = Path(path)
        super().__init__(self.path.parent)
        path_inside(self.folder, self.path.name)
        self._slots = _plan_slots(tensors)
        temporary = self.path.with_name(f".{self.path.name}.partial")
        if records is not None and self.path.exists():  # renamed before the interruption
            os.replace(self.path, temporary)
        self._file = PartialFile(temporary, self.path, resume=records is not None)
        self.partial.append(self._file)
        header = _header_bytes(temporary.with_suffix(".header"), self.path, arch, metadata, self._slots)
        self._start = _padded(len(header))
        end = max((tensor.offset + _padded(tensor.nbytes) for tensor in self._slots.values()), default=0)
        self.nbytes = self._start + end
        """Size of the finished file."""
        try:
            for name, row, count, crc in records or ():
                tensor = self._slots[name]
                offset = self._start + tensor.offset + row * tensor.row_bytes
                self._file.check(offset, count * tensor.row_bytes, crc)
                tensor.written[row : row + count] = True
            self._file.write(0, header, "the header")
            self._file.truncate(self.nbytes)  # padding reads as zeros
        except OutputError:
            if records is None:
                self.abort()
            raise

    def write(self, name: str, data: torch.Tensor, first_row: int = 0, slot: int | None = None) -> None:
        """Write some rows of one tensor.

        Args:
            name: of the tensor.
            data: [n, columns] (a vector: [columns]) of the tensor's own dtype, or uint8 [n, row bytes] for ggml types.
                Without a slot it may span slots, as [slots, n, ...] with all rows.
            first_row: row of the tensor at which `data` starts.
            slot: index in the first dimension of a stacked tensor, also of vectors stacked in a matrix; None when the
                tensor is not stacked, or `data` is all of it.

        Raises:
            OutputError: an unknown tensor, a row that does not exist or is written twice, a wrong dtype or width, a
                finished file, or a full disk.
        """
        if self._finished:
            raise OutputError(f"tensor {name!r} came after {self.path} was finished")
        tensor = self._slots.get(name)
        if tensor is None:
            raise OutputError(f"{self.path} has no tensor {name!r}")
        wanted = FLOAT_TYPES.get(tensor.kind, torch.uint8)
        width = tensor.row_bytes // wanted.itemsize
        if data.dtype != wanted or data.dim() < 1 or data.shape[-1] != width:
            raise OutputError(
                f"{self.path}: a part of tensor {name!r} ({tensor.kind}) is {data.dtype} {list(data.shape)}, "
                f"not {wanted} [..., {width}]"
            )
        count = data.numel() // width
        if slot is not None and data.dim() == 1 and len(tensor.shape) == 2:  # stacked vectors are rows of a matrix
            first_row, slot = slot, None
        row = self._first_row(tensor, count, first_row, slot)
        if bool(tensor.written[row : row + count].any()):
            raise OutputError(f"{self.path}: rows of tensor {name!r} are written twice")
        offset = self._start + tensor.offset + row * tensor.row_bytes
        crc = self._file.write(offset, bytes_of(data), f"tensor {name!r}")
        tensor.written[row : row + count] = True
        self._records.append([name, row, count, crc])

    def finish(self) -> str:
        """Sync the file, rename it and return its SHA-256.

        Raises OutputError when rows are missing, or the file cannot be written to disk.
        """
        if self._finished:
            raise OutputError(f"{self.path} was finished already")
        for tensor in self._slots.values():
            missing = tensor.written.numel() - int(tensor.written.sum())
            if missing:
                raise OutputError(f"{self.path}: {missing} rows of tensor {tensor.name!r} were not written")
        self.sha256[self.path.name] = self._file.seal(self.path)
        sync_folder(self.folder)
        self._finished = True
        return self.sha256[self.path.name]

    def _first_row(self, tensor: _TensorSlot, count: int, first_row: int, slot: int | None) -> int:
        """Index in the whole tensor, its slots concatenated, of the first of `count` rows."""
        base, limit = 0, tensor.slots * tensor.rows
        if slot is not None:
            base, limit = slot * tensor.rows, tensor.rows
            if not 0 <= slot < tensor.slots:
                raise OutputError(f"{self.path}: tensor {tensor.name!r} has {tensor.slots} slots, no slot {slot}")
        elif tensor.slots != 1 and count != limit:
            raise OutputError(f"{self.path}: tensor {tensor.name!r} is stacked; say which slot a part belongs to")
        if not 0 <= first_row <= first_row + count <= limit:
            raise OutputError(
                f"{self.path}: rows {first_row} to {first_row + count} exceed tensor {tensor.name!r} of {limit}"
            )
        return base + first_row


def _padded(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def _plan_slots(tensors: Sequence[tuple[str, Sequence[int], str]]) -> dict[str, _TensorSlot]:
    """Aligned offsets of all tensors, in file order."""
    slots: dict[str, _TensorSlot] = {}
    offset = 0
    for name, shape, kind in tensors:
        if kind not in FLOAT_TYPES and kind not in GGML_TYPES:
            raise ConfigError(f"tensor {name!r}: {kind!r} is no type of a GGUF file that can be written here")
        if not 0 < len(shape) <= _MAX_DIMENSIONS or min(shape) < 1:
            raise ConfigError(f"tensor {name!r}: a GGUF file cannot hold the shape {list(shape)}")
        if kind in GGML_TYPES and shape[-1] % GGML_TYPES[kind].block:
            raise ConfigError(f"tensor {name!r}: rows of {shape[-1]} do not divide into blocks of {kind}")
        if not name or len(name.encode()) > _MAX_NAME_BYTES:
            raise ConfigError(f"tensor {name!r}: a name in a GGUF file has 1 to {_MAX_NAME_BYTES} bytes")
        if name in slots:
            raise ConfigError(f"tensor {name!r} is given twice")
        slots[name] = _TensorSlot(name, tuple(int(size) for size in shape), kind, offset)
        offset += _padded(slots[name].nbytes)
    return slots


def _header_bytes(
    temporary: Path, path: Path, arch: str, metadata: Mapping[str, Any], slots: Mapping[str, _TensorSlot]
) -> bytes:
    """The bytes before the tensors, made by the `gguf` package in the file `temporary`, which is removed."""
    import numpy as np

    gguf = gguf_package()
    writer = gguf.GGUFWriter(temporary, arch)
    for key, value in metadata.items():
        if key == "general.architecture":
            raise ConfigError("general.architecture is written from `arch`; leave it out of the metadata")
        kind, inner = _value_type(key, value)
        plain = value.value if isinstance(value, TypedValue) else value
        types = gguf.GGUFValueType
        if (inner or kind) not in types.__members__:
            raise ConfigError(f"key {key!r}: GGUF has no type {inner or kind!r}")
        writer.add_key_value(key, plain, types[kind], None if inner is None else types[inner])
    for tensor in slots.values():
        quantized = gguf.GGMLQuantizationType[tensor.kind]
        writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), tensor.nbytes, quantized)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        writer.close()
        return temporary.read_bytes()
    except OSError as error:
        raise OutputError(f"cannot write {path} ({error.strerror})") from error
    except (struct.error, ValueError) as error:
        raise ConfigError(f"{path}: a value of the metadata does not fit its type ({error})") from error
    finally:
        temporary.unlink(missing_ok=True)


def _value_type(key: str, value: Any) -> tuple[str, str | None]:
    """GGUF's type name of a value, and of the items of a list."""
    if isinstance(value, TypedValue):
        return ("ARRAY", value.kind) if isinstance(value.value, list) else (value.kind, None)
    if isinstance(value, list):
        kinds = {type(item) for item in value}
        found = {bool: "BOOL", int: "INT32", float: "FLOAT32", str: "STRING", bytes: "STRING"}
        if len(kinds) == 1 and (kind := kinds.pop()) in found:
            return "ARRAY", found[kind]
    elif isinstance(value, bool):
        return "BOOL", None
    elif isinstance(value, int) and -(1 << 31) <= value < 1 << 32:
        return ("INT32" if value < 0 else "UINT32"), None
    elif isinstance(value, float):
        return "FLOAT32", None
    elif isinstance(value, str):
        return "STRING", None
    raise ConfigError(f"key {key!r}: a GGUF file cannot hold the value {value!r}")
