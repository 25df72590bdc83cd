"""Files of a journal: tensors and plain values in checksummed safetensors files, and the results of a finished unit."""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from auto_round.calibration.disk_store import DiskTensor
from auto_round.edits import TensorEdit, edit_from_state
from auto_round.errors import ConfigError, OutputError
from auto_round.files import add_checksum, bytes_of, safetensors_header, take_checksum, write_text
from auto_round.modeling.files.safetensors import TensorFiles, read_header
from auto_round.output.writer import damaged_error
from auto_round.report.run_report import BlockRecord

Tensors = Mapping[str, torch.Tensor | DiskTensor]
_CHUNK_BYTES = 16 << 20  # of a tensor in memory that is written at a time, or of a file that is checked
_ROWS_BYTES = 1 << 20  # of a tensor in a file that is copied at a time
_VALUES = "values"


def write_tensors(path: Path, tensors: Tensors, values: Any = None) -> list[int]:
    """Write a safetensors file atomically, with plain `values` as JSON in one more tensor. Returns size and CRC-32."""
    text = torch.frombuffer(bytearray(json.dumps(values).encode()), dtype=torch.uint8)
    tensors = {**tensors, _VALUES: text}
    # Decreasing item sizes keep every tensor aligned to its dtype without gaps.
    order = sorted(tensors, key=lambda name: -tensors[name].dtype.itemsize)
    head, _, size = safetensors_header([(name, tensors[name].shape, tensors[name].dtype) for name in order], {})
    crc = zlib.crc32(head)
    partial = path.with_name(f"{path.name}.partial")
    try:
        with open(partial, "wb") as file:
            file.write(head)
            for part in (part for name in order for part in _parts(tensors[name])):
                chunk = bytes_of(part)  # the only part of a device tensor that is copied to the CPU at a time
                file.write(chunk)
                crc = zlib.crc32(chunk, crc)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise unwritable_error(path, error) from error
    return [size, crc]


def _parts(tensor: torch.Tensor | DiskTensor) -> Iterable[torch.Tensor]:
    """Split a tensor, so that little of it is in memory at a time."""
    if isinstance(tensor, DiskTensor):
        rows = max(1, _ROWS_BYTES * tensor.shape[0] // max(1, tensor.nbytes))
        return (tensor[at : at + rows] for at in range(0, tensor.shape[0], rows))
    return tensor.detach().contiguous().reshape(-1).split(_CHUNK_BYTES)


def open_tensors(path: Path, mark: list[int]) -> TensorFiles:
    """The tensors of a file, if it matches the size and CRC-32 `mark` that `write_tensors` returned."""
    check_file(path, mark)
    return TensorFiles(path.parent, read_header(path))


def read_tensors(path: Path, mark: list[int]) -> tuple[dict[str, torch.Tensor], Any]:
    """Tensors and values of such a file."""
    files = open_tensors(path, mark)
    tensors = {name: files.read(name) for name in files}
    return tensors, json.loads(bytes(bytes_of(tensors.pop(_VALUES))))


def check_file(path: Path, mark: list[int]) -> None:
    """Raise OutputError when a file does not match its size and CRC-32."""
    size, crc = mark
    found = 0
    try:
        stored = path.stat().st_size
        with open(path, "rb") as file:
            while stored == size and (chunk := file.read(_CHUNK_BYTES)):
                found = zlib.crc32(chunk, found)
    except FileNotFoundError as error:
        raise damaged_error(path, "it is missing") from error
    except OSError as error:
        raise damaged_error(path, f"it cannot be read: {error.strerror}") from error
    if stored != size:
        raise damaged_error(path, f"it has {stored} bytes, not {size}")
    if found != crc:
        raise damaged_error(path, "its bytes are not those that were written")


def write_checked(path: Path, value: Any) -> None:
    """Write a value as JSON with a checksum, atomically."""
    write_text(path, add_checksum(json.dumps(value)))


def read_checked(path: Path) -> Any:
    """The value that `write_checked` wrote; None without the file. Raises OutputError when it is damaged."""
    try:
        return json.loads(take_checksum(path.read_bytes()))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        raise damaged_error(path, str(error)) from error


def raise_if_different(output: Path, found: list[str]) -> None:
    """Raise ConfigError when the interrupted run in an output folder differs from this one: `differences`."""
    if found:
        more = f"; and {len(found) - 8} more" if len(found) > 8 else ""
        raise ConfigError(
            f"output folder {output} holds an interrupted run that differs: {'; '.join(found[:8])}{more}; give the "
            "same settings to resume it, choose another folder, or start anew with --overwrite or --no_resume "
            "(overwrite=True or resume=False)"
        )


def unwritable_error(path: Path, error: OSError) -> OutputError:
    """The error for a journal file that cannot be written."""
    return OutputError(
        f"cannot write the journal file {path} ({error.strerror or error}); free some space, set AR_WORK_SPACE to "
        "another disk, or do without a journal (--no_resume)"
    )


@dataclass
class Unit:
    """Results of a finished unit, a block or all layers outside the blocks, apart from its layers.

    Attributes:
        marks: by format, what its output has written for this unit: plain values, and tensors.
        scales: static scales of attention by tensor name, scalars or [heads].
        sums, tokens: for an importance file, sums of squares of the inputs by layer, and over how many tokens.
        unreached: quantized layers that no calibration token reached (experts).
        nearest: layers that got the nearest codes instead of error feedback, with the reasons.
        edits: of the transforms, by tensor name.
    """

    marks: Mapping[str, tuple[dict[str, Any], Mapping[str, torch.Tensor]]] = field(default_factory=dict)
    records: list[BlockRecord] = field(default_factory=list)
    scales: Mapping[str, torch.Tensor] = field(default_factory=dict)
    sums: Mapping[str, torch.Tensor] = field(default_factory=dict)
    tokens: Mapping[str, int] = field(default_factory=dict)
    unreached: list[str] = field(default_factory=list)
    nearest: Mapping[str, str] = field(default_factory=dict)
    numerics: Mapping[str, Any] = field(default_factory=dict)
    edits: Mapping[str, TensorEdit] = field(default_factory=dict)
    loss: float | None = None

    def state(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """Tensors and plain values, of which `from_state` makes the unit again."""
        edits = {f"{kind}.{name}": part for name, edit in self.edits.items() for kind, part in edit.state().items()}
        groups = {"scale": self.scales, "sum": self.sums, "edit": edits}
        groups |= {f"mark{number}": tensors for number, (_, tensors) in enumerate(self.marks.values())}
        values = {name: getattr(self, name) for name in ("tokens", "unreached", "nearest", "numerics", "loss")}
        values["marks"] = {fmt: mark for fmt, (mark, _) in self.marks.items()}
        values["records"] = [asdict(record) for record in self.records]
        return {f"{group}.{name}": tensor for group, part in groups.items() for name, tensor in part.items()}, values

    @classmethod
    def from_state(cls, tensors: Mapping[str, torch.Tensor], values: dict[str, Any]) -> Unit:
        """Inverse of `state`."""
        groups: dict[str, dict[str, torch.Tensor]] = {}
        for key, tensor in tensors.items():
            group, _, name = key.partition(".")
            groups.setdefault(group, {})[name] = tensor
        edits = {}
        for key, tensor in groups.get("edit", {}).items():
            kind, _, name = key.partition(".")
            edits[name] = edit_from_state({kind: tensor})
        marks = {fmt: (mark, groups.get(f"mark{n}", {})) for n, (fmt, mark) in enumerate(values["marks"].items())}
        values |= {"marks": marks, "records": [BlockRecord(**record) for record in values["records"]]}
        return cls(**values, scales=groups.get("scale", {}), sums=groups.get("sum", {}), edits=edits)
