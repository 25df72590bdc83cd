"""Write one GGUF file at planned offsets: rows in any order; the file is renamed when all of them are written."""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from auto_round.codecs.ggml.types import GGML_TYPES
from auto_round.errors import ConfigError, OutputError
from auto_round.files import bytes_of, path_inside, sync_folder
from auto_round.gguf.file_types import FLOAT_TYPES, tensor_bytes
from auto_round.gguf.metadata import KeyValue, gguf_package
from auto_round.output.writer import KEEP, NEW, AtomicOutput, PartialFile, Records

ALIGNMENT = 32
_MAX_DIMENSIONS = 4  # of a tensor in ggml
_MAX_NAME_BYTES = 63  # of a tensor's name in ggml


@dataclass
class _TensorSlot:
    """Offset of one tensor behind the header, and which of its rows are written."""

    name: str
    shape: tuple[int, ...]
    kind: str
    offset: int

    def __post_init__(self) -> None:
        self.row_bytes = tensor_bytes(self.kind, self.shape[-1:])
        self.slots, self.rows = math.prod(self.shape[:-2]), (self.shape[-2] if len(self.shape) > 1 else 1)
        self.nbytes = self.slots * self.rows * self.row_bytes
        self.written = torch.zeros(self.slots * self.rows, dtype=torch.bool)


class GgufFile(AtomicOutput):
    """Writes one `.gguf` under a temporary name and renames it when every row was written exactly once. The order of
    writes does not change the bytes. Raises ConfigError for a shape, a type or a value that GGUF cannot hold.

    Args:
        arch: llama.cpp's name of the architecture.
        metadata: keys and values in file order. general.architecture is left out.
        tensors: (name, shape in torch's order, type) of every tensor, in file order.
        records: continue after these writes of an earlier writer, all that it returned by `take_records`.
    """

    def __init__(
        self, path: str | os.PathLike[str], arch: str, metadata: Iterable[KeyValue],
        tensors: Sequence[tuple[str, Sequence[int], str]], records: Records | None = None,
    ) -> None:  # fmt: skip
        self.path = Path(path)
        super().__init__(self.path.parent)
        path_inside(self.folder, self.path.name)
        self._slots: dict[str, _TensorSlot] = {}
        offset = 0
        for name, shape, kind in tensors:
            self._check(name, shape, kind)
            self._slots[name] = _TensorSlot(name, tuple(int(size) for size in shape), kind, offset)
            offset += _padded(self._slots[name].nbytes)
        temporary = self.path.with_name(f".{self.path.name}.partial")
        if records is not None and self.path.exists():  # renamed before the interruption
            os.replace(self.path, temporary)
        self._file = PartialFile(temporary, self.path, NEW if records is None else KEEP)
        self.partial.append(self._file)
        header = self._header_bytes(temporary.with_suffix(".header"), arch, metadata)
        self._start = _padded(len(header))
        self.nbytes = self._start + offset  # of the finished file
        try:
            for name, row, count, crc in records or ():
                tensor = self._slots[name]
                self._file.check(self._start + tensor.offset + row * tensor.row_bytes, count * tensor.row_bytes, crc)
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
            data: [n, columns] (a vector: [columns]) of the tensor's own dtype, or uint8 [n, row bytes] for ggml types.
                Without a slot it may span slots, as [slots, n, ...] with all rows.
            first_row: row of the tensor at which `data` starts.
            slot: index in the first dimension of a stacked tensor, also of vectors stacked in a matrix.
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
        base, limit = 0, tensor.slots * tensor.rows
        if slot is not None:
            base, limit = slot * tensor.rows, tensor.rows
            if not 0 <= slot < tensor.slots:
                raise OutputError(f"{self.path}: tensor {name!r} has {tensor.slots} slots, no slot {slot}")
        elif tensor.slots != 1 and count != limit:
            raise OutputError(f"{self.path}: tensor {name!r} is stacked; say which slot a part belongs to")
        if not 0 <= first_row <= first_row + count <= limit:
            raise OutputError(f"{self.path}: rows {first_row} to {first_row + count} exceed tensor {name!r} of {limit}")
        row = base + first_row
        if bool(tensor.written[row : row + count].any()):
            raise OutputError(f"{self.path}: rows of tensor {name!r} are written twice")
        crc = self._file.write(self._start + tensor.offset + row * tensor.row_bytes, bytes_of(data), f"tensor {name!r}")
        tensor.written[row : row + count] = True
        self._records.append([name, row, count, crc])

    def finish(self) -> str:
        """Sync the file, rename it and return its SHA-256. Raises OutputError when rows are missing."""
        if self._finished:
            raise OutputError(f"{self.path} was finished already")
        for tensor in self._slots.values():
            if missing := tensor.written.numel() - int(tensor.written.sum()):
                raise OutputError(f"{self.path}: {missing} rows of tensor {tensor.name!r} were not written")
        self.sha256[self.path.name] = self._file.seal(self.path)
        sync_folder(self.folder)
        self._finished = True
        return self.sha256[self.path.name]

    def _check(self, name: str, shape: Sequence[int], kind: str) -> None:
        if kind not in FLOAT_TYPES and kind not in GGML_TYPES:
            raise ConfigError(f"tensor {name!r}: {kind!r} is no type of a GGUF file that can be written here")
        if not 0 < len(shape) <= _MAX_DIMENSIONS or min(shape) < 1:
            raise ConfigError(f"tensor {name!r}: a GGUF file cannot hold the shape {list(shape)}")
        if kind in GGML_TYPES and shape[-1] % GGML_TYPES[kind].block:
            raise ConfigError(f"tensor {name!r}: rows of {shape[-1]} do not divide into blocks of {kind}")
        if not name or len(name.encode()) > _MAX_NAME_BYTES:
            raise ConfigError(f"tensor {name!r}: a name in a GGUF file has 1 to {_MAX_NAME_BYTES} bytes")
        if name in self._slots:
            raise ConfigError(f"tensor {name!r} is given twice")

    def _header_bytes(self, temporary: Path, arch: str, metadata: Iterable[KeyValue]) -> bytes:
        """The bytes before the tensors, made by the `gguf` package in the file `temporary`, which is removed."""
        import numpy as np

        gguf = gguf_package()
        writer = gguf.GGUFWriter(temporary, arch)
        try:
            for pair in metadata:
                if pair.key != "general.architecture":  # the package writes it
                    writer.add_key_value(*pair)
            for tensor in self._slots.values():
                quantized = gguf.GGMLQuantizationType[tensor.kind]
                writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), tensor.nbytes, quantized)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            writer.close()
            return temporary.read_bytes()
        except OSError as error:
            raise OutputError(f"cannot write {self.path} ({error.strerror})") from error
        except (struct.error, ValueError) as error:
            raise ConfigError(f"{self.path}: a value of the metadata does not fit its type ({error})") from error
        finally:
            temporary.unlink(missing_ok=True)


def _padded(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT
