"""Files of the journal: tensors and facts, written whole or not at all, and checked before they are used.

A file is an ordinary safetensors file; facts are JSON in its metadata. Who writes it notes its size and CRC-32.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from auto_round.calibration.spill import SpilledTensor
from auto_round.errors import OutputError
from auto_round.modeling.tensor_files import DTYPES, empty_pages

_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_ALIGN = 8
_AT_ONCE = 16 << 20
_PIECE = 1 << 20


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor | SpilledTensor], facts: Any = None) -> list[int]:
    """Write a file under a temporary name, bring it to the disk and give it its name. Returns its size and CRC-32.

    Raises OutputError when the disk is full or cannot be written.
    """
    # Falling item sizes keep every tensor where its dtype may start, without holes.
    order = sorted(tensors, key=lambda name: -tensors[name].element_size())
    header: dict[str, Any] = {"__metadata__": {"facts": json.dumps(facts)}}
    at = 0
    for name in order:
        tensor = tensors[name]
        header[name] = {
            "dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [at, at + tensor.nbytes],
        }  # fmt: skip
        at += tensor.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text = text.ljust(-(-len(text) // _ALIGN) * _ALIGN)
    head = len(text).to_bytes(8, "little") + text
    crc = zlib.crc32(head)
    partial = path.with_name(f"{path.name}.partial")
    try:
        with open(partial, "wb") as file:
            file.write(head)
            for name in order:
                for part in _parts(tensors[name]):
                    piece = raw_bytes(part)  # not more than that of what lies on an accelerator
                    file.write(piece)
                    crc = zlib.crc32(piece, crc)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise unwritable(path, error) from error
    return [len(head) + at, crc]


def _parts(tensor: torch.Tensor | SpilledTensor) -> Iterator[torch.Tensor]:
    """A tensor piece by piece, so that little of it is in memory twice, or at all."""
    if isinstance(tensor, SpilledTensor):
        rows = max(1, _PIECE * tensor.shape[0] // max(1, tensor.nbytes))
        yield from (tensor[at : at + rows] for at in range(0, tensor.shape[0], rows))
    else:
        yield from tensor.detach().contiguous().reshape(-1).split(_AT_ONCE)


def read_rows(path: Path, mark: list[int], name: str, into: SpilledTensor) -> None:
    """The tensor `name` of a file, row by row. Raises OutputError when it is not what was written."""
    check_file(path, mark)
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        start = 8 + length + json.loads(file.read(length))[name]["data_offsets"][0]
        file.seek(start)
        for row in range(into.shape[0]):
            data = bytearray(into.nbytes // into.shape[0])
            file.readinto(data)
            into[row] = torch.frombuffer(data, dtype=into.dtype).view(into.shape[1:])


def read_tensors(path: Path, mark: list[int]) -> tuple[dict[str, torch.Tensor], Any]:
    """Tensors and facts of a file that `write_tensors` noted as `mark`.

    Raises OutputError when it is not what was written.
    """
    data = empty_pages((mark[0],), torch.uint8)
    view = data.numpy().data
    _read(path, mark, lambda at, size: view[at : at + size])
    length = int.from_bytes(bytes(view[:8]), "little")
    header = json.loads(bytes(view[8 : 8 + length]))
    facts = json.loads(header.pop("__metadata__")["facts"])
    tensors = {}
    for name, entry in header.items():
        first, last = (8 + length + offset for offset in entry["data_offsets"])
        tensors[name] = data[first:last].view(DTYPES[entry["dtype"]]).view(entry["shape"])
    return tensors, facts


class _Written:
    """A file that is only read, at explicit places."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self, start: int, into: memoryview) -> None:
        done = 0
        try:
            with open(self.path, "rb", buffering=0) as file:
                file.seek(start)
                while done < len(into):
                    count = file.readinto(into[done : done + _AT_ONCE])
                    if not count:
                        raise damaged(self.path, "it ends early")
                    done += count
        except FileNotFoundError as error:
            raise damaged(self.path, "it is missing") from error

    def write(self, start: int, data: memoryview) -> None:
        raise OSError(f"{self.path} is only read")

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> SpilledTensor:
        raise OSError(f"{self.path} is only read")


def tensors_in_file(path: Path, mark: list[int]) -> tuple[dict[str, torch.Tensor | SpilledTensor], Any]:
    """What `read_tensors` gives, but tensors are read from the file when they are asked for.

    Raises OutputError when it is not what was written.
    """
    check_file(path, mark)
    with open(path, "rb") as handle:
        length = int.from_bytes(handle.read(8), "little")
        header = json.loads(handle.read(length))
    facts = json.loads(header.pop("__metadata__")["facts"])
    written = _Written(path)
    return {
        name: SpilledTensor(written, 8 + length + e["data_offsets"][0], torch.Size(e["shape"]), DTYPES[e["dtype"]])
        for name, e in header.items()
    }, facts


def check_file(path: Path, mark: list[int]) -> None:
    """Raise OutputError when a file is not what was written. Little of it is in memory at a time."""
    room = memoryview(bytearray(min(mark[0], _AT_ONCE)))
    _read(path, mark, lambda _, size: room[:size])


def _read(path: Path, mark: list[int], room: Callable[[int, int], memoryview]) -> None:
    """Read a file piece by piece into `room(offset, size)`, and compare size and CRC-32."""
    size, crc = mark
    try:
        if path.stat().st_size != size:
            raise damaged(path, f"it has {path.stat().st_size} bytes, not {size}")
        done = found = 0
        with open(path, "rb", buffering=0) as file:
            while done < size:
                piece = room(done, min(_AT_ONCE, size - done))
                count = file.readinto(piece)
                if not count:
                    raise damaged(path, "it ends early")
                found = zlib.crc32(piece[:count], found)
                done += count
    except FileNotFoundError as error:
        raise damaged(path, "it is missing") from error
    except OSError as error:
        if isinstance(error, OutputError):
            raise
        raise damaged(path, f"it cannot be read: {error.strerror}") from error
    if found != crc:
        raise damaged(path, "its bytes are not those that were written")


def raw_bytes(tensor: torch.Tensor) -> memoryview:
    """The bytes of a tensor, from the CPU, without a copy where they lie there in a row."""
    return tensor.detach().to("cpu").contiguous().reshape(-1).view(torch.uint8).numpy().data


def unwritable(path: Path, error: OSError) -> OutputError:
    """What to say when a part of the journal cannot be written."""
    return OutputError(
        f"cannot write the journal file {path} ({error.strerror or error}); free some space, set AR_WORK_SPACE to "
        "another disk, or do without a journal (--no_resume)"
    )


def damaged(path: Path, why: str) -> OutputError:
    """What to say of a journal that cannot be trusted."""
    return OutputError(
        f"the journal of the interrupted run is damaged: {path}: {why}; start anew with --overwrite or --no_resume "
        "(overwrite=True or resume=False)"
    )
