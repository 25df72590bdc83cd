"""Write one GGUF file: rows of its tensors in any order, positioned, checked complete, renamed at the end."""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any

import torch

from auto_round.codecs.ggml.types import GGML_TYPES
from auto_round.errors import ConfigError, OutputError
from auto_round.gguf.metadata import gguf_package
from auto_round.output.folders import path_inside
from auto_round.output.writer import AtomicOutput, file_sha256, sync_folder

ALIGNMENT = 32
_FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_MOST_DIMENSIONS = 4  # of a tensor in ggml
_MOST_NAME = 63  # bytes of a tensor's name in ggml


@dataclass(frozen=True)
class TypedValue:
    """A key's value with its GGUF type, where `GgufFile` would choose another: `TypedValue(3, "UINT64")`."""

    value: Any
    kind: str


class _TensorSlot:
    """Where one tensor lies, and which of its rows are there already."""

    def __init__(self, name: str, shape: tuple[int, ...], kind: str, offset: int) -> None:
        self.name, self.shape, self.kind, self.offset = name, shape, kind, offset
        columns = shape[-1]
        self.row_bytes = columns * _FLOATS[kind].itemsize if kind in _FLOATS else GGML_TYPES[kind].row_bytes(columns)
        self.slots, self.rows = math.prod(shape[:-2]), (shape[-2] if len(shape) > 1 else 1)
        self.nbytes = self.slots * self.rows * self.row_bytes
        self.there = torch.zeros(self.slots, self.rows, dtype=torch.bool)


class GgufFile(AtomicOutput):
    """Writes one `.gguf` under a temporary name; it gets its own when every byte was written exactly once.

    Use as a context manager: leaving it normally finishes, leaving it by an exception removes what was begun. The same
    pieces give the same bytes, in whatever order they come.

    Args:
        path: the file to make, in an existing folder. A file that is there already is replaced at the end.
        arch: llama.cpp's name of the architecture, `general.architecture`.
        metadata: keys and values, in the order they are to be stored. A Python bool, int (uint32, or int32 if
            negative), float (float32) or str, or a non-empty list of these (integers as int32); or `TypedValue`.
        tensors: (name, shape in torch's order, type) of every tensor, in the order they are to be stored.

    Raises:
        OutputError: the file cannot be made, or the disk is full.
        ConfigError: a shape, a type or a value that GGUF cannot hold; a key or a tensor that is given twice.
        UnsupportedError: the `gguf` package is not installed.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        arch: str,
        metadata: Mapping[str, Any],
        tensors: Sequence[tuple[str, Sequence[int], str]],
    ) -> None:
        self.path = Path(path)
        self.sha256 = ""  # of the finished file
        if not self.path.parent.is_dir():
            raise OutputError(f"output folder {self.path.parent} does not exist; make it first")
        path_inside(self.path.parent, self.path.name)
        self._partial = self.path.with_name(f".{self.path.name}.partial")
        self._places = _layout(tensors)
        self._file: FileIO | None = None
        writer = _header_writer(self._partial, arch, metadata, self._places)
        try:
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            writer.close()
            self._file = open(self._partial, "r+b", buffering=0)
            self._start = _padded(self._partial.stat().st_size)
            end = max((place.offset + _padded(place.nbytes) for place in self._places.values()), default=0)
            # Room for everything at once: padding and pieces still to come read as zeros.
            self._file.truncate(self._start + end)
        except OSError as error:
            self.abort()
            raise OutputError(f"cannot write {self.path} ({error.strerror})") from error
        except (struct.error, ValueError) as error:
            self.abort()
            raise ConfigError(f"{self.path}: a value of the metadata does not fit its type ({error})") from error

    @property
    def nbytes(self) -> int:
        """Size of the file when it is whole."""
        assert self._file is not None
        return os.fstat(self._file.fileno()).st_size

    def write(
        self,
        name: str,
        data: torch.Tensor,
        first_row: int = 0,
        slot: int | None = None,
        rows: torch.Tensor | None = None,
    ) -> None:
        """Put some rows of one tensor into their place.

        Args:
            name: of the tensor.
            data: [n, columns] (a vector: [columns]) of the tensor's own dtype, or uint8 [n, row bytes] for blocks.
                Without a slot it may span slots, as [slots, n, ...] for all of the rows.
            first_row: where in the tensor the first row of `data` belongs.
            slot: index of the first dimension of a stacked tensor, also of vectors stacked in a matrix; None when the
                tensor is not stacked, or `data` is all of it.
            rows: int64 [n], where each row of `data` belongs instead.

        Raises:
            OutputError: a tensor the file does not have, a row that was written already or does not exist, the wrong
                dtype or width, a file that is finished, or a full disk.
        """
        if self._finished or self._file is None:
            raise OutputError(f"tensor {name!r} came after {self.path} was finished")
        place = self._places.get(name)
        if place is None:
            raise OutputError(f"{self.path} has no tensor {name!r}")
        raw = self._raw(place, data)
        if slot is not None and data.dim() == 1 and len(place.shape) == 2:  # vectors that are stacked lie as rows
            targets = self._targets(place, raw.shape[0], slot, None, rows)
        else:
            targets = self._targets(place, raw.shape[0], first_row, slot, rows)
        there = place.there.view(-1)
        if isinstance(targets, slice):
            taken = bool(there[targets].any())
        else:
            taken = bool(there[targets].any()) or targets.unique().numel() != targets.numel()
        if taken:
            raise OutputError(f"{self.path}: rows of tensor {name!r} are written twice")
        try:
            if isinstance(targets, slice):
                self._put(place, targets.start, raw)
            else:
                # A rotary permutation stays within its heads: in order, all of a piece is one stretch.
                order = targets.argsort()
                raw = raw[order]
                for start, part in _contiguous_runs(targets[order]):
                    self._put(place, start, raw[part])
        except OSError as error:
            raise OutputError(
                f"cannot write tensor {name!r} to {self.path} ({error.strerror}); free some space"
            ) from error
        there[targets] = True

    def finish(self) -> str:
        """Give the file its name and return its SHA-256.

        Raises OutputError when rows are missing, or the file cannot be brought to the disk.
        """
        if self._finished or self._file is None:
            raise OutputError(f"{self.path} was finished already")
        for place in self._places.values():
            missing = place.there.numel() - int(place.there.sum())
            if missing:
                raise OutputError(f"{self.path}: {missing} rows of tensor {place.name!r} were not written")
        try:
            os.fsync(self._file.fileno())
            self._file.close()
            self.sha256 = file_sha256(self._partial)
            os.replace(self._partial, self.path)
            sync_folder(self.path.parent)
        except OSError as error:
            raise OutputError(f"cannot write {self.path} ({error.strerror or error}); free some space") from error
        self._finished = True
        return self.sha256

    def abort(self) -> None:
        """Remove what was begun and not finished."""
        if not self._finished:
            if self._file is not None:
                with suppress(OSError):
                    self._file.close()
            self._partial.unlink(missing_ok=True)
            self._finished = True

    def _raw(self, place: _TensorSlot, data: torch.Tensor) -> torch.Tensor:
        """uint8 [n, row bytes] of a piece, checked."""
        wanted = _FLOATS.get(place.kind, torch.uint8)
        width = place.row_bytes // wanted.itemsize
        if data.dtype != wanted or data.dim() < 1 or data.shape[-1] != width:
            raise OutputError(
                f"{self.path}: a piece of tensor {place.name!r} ({place.kind}) is {data.dtype} {list(data.shape)}, "
                f"not {wanted} [..., {width}]"
            )
        return data.detach().to("cpu").contiguous().view(torch.uint8).reshape(-1, place.row_bytes)

    def _targets(
        self, place: _TensorSlot, count: int, first_row: int, slot: int | None, rows: torch.Tensor | None
    ) -> slice | torch.Tensor:
        """Rows of the whole tensor, its slots one after another, that a piece of `count` rows goes to."""
        if slot is None:
            base, room = 0, place.slots * place.rows
            if place.slots != 1 and (count != room or rows is not None):
                raise OutputError(f"{self.path}: tensor {place.name!r} is stacked; say which slot a piece belongs to")
        else:
            base, room = slot * place.rows, place.rows
            if not 0 <= slot < place.slots:
                raise OutputError(
                    f"{self.path}: tensor {place.name!r} has {place.slots} slots, none with number {slot}"
                )
        if rows is None:
            if not 0 <= first_row <= first_row + count <= room:
                raise OutputError(
                    f"{self.path}: rows {first_row} to {first_row + count} are outside tensor {place.name!r} of {room}"
                )
            return slice(base + first_row, base + first_row + count)
        targets = rows.to("cpu", torch.int64)
        if targets.shape != (count,) or (count and (int(targets.min()) < 0 or int(targets.max()) >= room)):
            raise OutputError(f"{self.path}: the row index of a piece of tensor {place.name!r} does not fit it")
        return targets + base

    def _put(self, place: _TensorSlot, row: int, raw: torch.Tensor) -> None:
        if raw.numel():
            assert self._file is not None
            self._file.seek(self._start + place.offset + row * place.row_bytes)
            rest = raw.reshape(-1).numpy().data
            while rest:  # the system may take less than all of it
                rest = rest[self._file.write(rest) :]


def _padded(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def _layout(tensors: Sequence[tuple[str, Sequence[int], str]]) -> dict[str, _TensorSlot]:
    """A place for each tensor, one after another, as the tensor infos will have it."""
    places: dict[str, _TensorSlot] = {}
    offset = 0
    for name, shape, kind in tensors:
        if kind not in _FLOATS and kind not in GGML_TYPES:
            raise ConfigError(f"tensor {name!r}: {kind!r} is no type of a GGUF file that can be written here")
        if not 0 < len(shape) <= _MOST_DIMENSIONS or min(shape) < 1:
            raise ConfigError(f"tensor {name!r}: a GGUF file cannot hold the shape {list(shape)}")
        if kind in GGML_TYPES and shape[-1] % GGML_TYPES[kind].block:
            raise ConfigError(f"tensor {name!r}: rows of {shape[-1]} do not divide into blocks of {kind}")
        if not name or len(name.encode()) > _MOST_NAME:
            raise ConfigError(f"tensor {name!r}: a name in a GGUF file has 1 to {_MOST_NAME} bytes")
        if name in places:
            raise ConfigError(f"tensor {name!r} is given twice")
        places[name] = _TensorSlot(name, tuple(int(size) for size in shape), kind, offset)
        offset += _padded(places[name].nbytes)
    return places


def _header_writer(path: Path, arch: str, metadata: Mapping[str, Any], places: Mapping[str, _TensorSlot]) -> Any:
    """A `gguf.GGUFWriter` that holds everything but the tensors' bytes."""
    import numpy as np

    gguf = gguf_package()
    writer = gguf.GGUFWriter(path, arch)
    for key, value in metadata.items():
        if key == "general.architecture":
            raise ConfigError("general.architecture is written from `arch`; leave it out of the metadata")
        kind, inner = _value_type(key, value)
        plain = value.value if isinstance(value, TypedValue) else value
        types = gguf.GGUFValueType
        if (inner or kind) not in types.__members__:
            raise ConfigError(f"key {key!r}: GGUF has no type {inner or kind!r}")
        writer.add_key_value(key, plain, types[kind], None if inner is None else types[inner])
    for place in places.values():
        writer.add_tensor_info(
            place.name, place.shape, np.dtype(np.float32), place.nbytes, gguf.GGMLQuantizationType[place.kind]
        )
    return writer


def _value_type(key: str, value: Any) -> tuple[str, str | None]:
    """GGUF's names of the type of a value, and of the items of a list."""
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


def _contiguous_runs(targets: torch.Tensor) -> list[tuple[int, slice]]:
    """Stretches of consecutive numbers in `targets`, which rise: (the first, where they are in `targets`)."""
    if not targets.numel():
        return []
    cuts = (targets.diff() != 1).nonzero().flatten().add_(1).tolist()
    starts = [0, *cuts]
    return [
        (int(targets[start]), slice(start, end)) for start, end in zip(starts, [*cuts, targets.numel()], strict=True)
    ]
