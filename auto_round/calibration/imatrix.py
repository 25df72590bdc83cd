"""Read and write llama.cpp importance matrix (imatrix) files: mean squared inputs per matrix, by its name in GGUF.

The current format is a GGUF file with two float32 tensors per matrix: `NAME.in_sum2` [experts, in], sums of squares
over tokens, and `NAME.counts` [experts, 1], the number of tokens. The legacy one is a list of (name, number of calls,
mean squares times that number). Source: llama.cpp's `tools/imatrix/imatrix.cpp` and `common/imatrix-loader.cpp`.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch

from auto_round.errors import DataError
from auto_round.gguf.metadata import key_value
from auto_round.gguf.reader import MAGIC, GgufHeader, read_header
from auto_round.output.gguf_writer import GgufFile

_SUMS, _COUNTS = ".in_sum2", ".counts"
_LONGEST_NAME = 1024


@dataclass(frozen=True)
class ImatrixFile:
    """Mean squares by name, float32 [in], or [experts, in] for stacked experts; ones for an expert without tokens."""

    importance: dict[str, torch.Tensor]

    def of(self, name: str, shape: Sequence[int]) -> torch.Tensor | None:
        """Importance, [in] or [experts, in], of a tensor [(experts,) out, in], or None. Raises DataError for other
        sizes."""
        found = self.importance.get(name)
        if found is None:
            return None
        wanted = (*shape[:-2], shape[-1])
        if found.numel() != torch.Size(wanted).numel():
            raise DataError(
                f"the importance of {name!r} is {list(found.shape)} but the model's tensor needs {list(wanted)}; "
                "the file was made for another model"
            )
        return found.reshape(wanted)


def read_imatrix(path: str | os.PathLike[str]) -> ImatrixFile:
    """Read an importance matrix of either format. Raises DataError for a damaged file or values not finite."""
    path = Path(path)
    try:
        with open(path, "rb") as file:
            if file.read(len(MAGIC)) != MAGIC:
                file.seek(0)
                return ImatrixFile(_read_legacy(path, file))
    except OSError as error:
        raise DataError(f"cannot read importance matrix {path} ({error.strerror})") from error
    return ImatrixFile(_read_gguf(path, read_header(path)))


def write_imatrix(
    path: str | os.PathLike[str], sums: Mapping[str, torch.Tensor], tokens: Mapping[str, int | torch.Tensor],
    chunk_size: int,
) -> None:  # fmt: skip
    """Write an importance matrix for llama.cpp's `--imatrix`: `sums` of squares by the tensor's name in the GGUF file,
    [in] or [experts, in], over `tokens`, a number or one per expert. Raises OutputError when the file cannot be
    written, DataError when there are no sums, or they have NaN or Inf."""
    if not sums:
        raise DataError(f"no importance was collected; there is nothing to write to {path}")
    counts = {name: torch.as_tensor(tokens[name], dtype=torch.float32).reshape(-1, 1) for name in sorted(sums)}
    tensors: dict[str, torch.Tensor] = {}
    for name, count in counts.items():
        rows = sums[name].detach().to("cpu", torch.float32).reshape(len(count), -1)
        _check(name, rows, path)
        tensors |= {name + _SUMS: rows, name + _COUNTS: count}
    chunks = -(-int(max(float(count.max()) for count in counts.values())) // chunk_size)
    metadata = [
        key_value("general.type", "imatrix", "string"),
        # llama-quantize requires the list, and GGUF has no item type for an empty one.
        key_value("imatrix.datasets", ["unknown"], "string"),
        key_value("imatrix.chunk_count", chunks, "uint32"),
        key_value("imatrix.chunk_size", chunk_size, "uint32"),
    ]
    with GgufFile(path, "imatrix", metadata, [(name, rows.shape, "F32") for name, rows in tensors.items()]) as file:
        for name, rows in tensors.items():
            file.write(name, rows)


def _check(name: str, values: torch.Tensor, path: str | os.PathLike[str]) -> None:
    if not bool(torch.isfinite(values).all()) or bool((values < 0).any()):
        raise DataError(f"importance matrix {path}: the values of {name!r} are not all finite and positive")


def _read_gguf(path: Path, header: GgufHeader) -> dict[str, torch.Tensor]:
    def bad(problem: str) -> DataError:
        return DataError(f"{path} is not an importance matrix: {problem}")

    names = [name.removesuffix(_SUMS) for name in header.tensors if name.endswith(_SUMS)]
    if not names:
        raise bad("no tensor is called NAME.in_sum2")
    if any(n.endswith(_COUNTS) and n.removesuffix(_COUNTS) + _SUMS not in header.tensors for n in header.tensors):
        raise bad("it has counts without sums")
    importance: dict[str, torch.Tensor] = {}
    for name in names:
        sums, counts = (header.tensors.get(name + end) for end in (_SUMS, _COUNTS))
        if sums is None or counts is None or (sums.kind, counts.kind) != ("F32", "F32"):
            raise bad(f"{name!r} needs float32 sums and counts")
        if not counts.nbytes or sums.nbytes % counts.nbytes:
            raise bad(f"the sums and counts of {name!r} do not match")
        count, total = (
            torch.from_numpy(np.fromfile(path, "<f4", tensor.nbytes // 4, offset=tensor.start).astype(np.float32))
            for tensor in (counts, sums)
        )
        _check(name, total, path)
        _check(name, count, path)
        count = count.round().unsqueeze(1)
        mean = torch.where(count == 0, torch.ones(()), total.reshape(len(count), -1) / count.clamp(min=1))
        importance[name] = mean[0] if len(count) == 1 else mean
    return importance


def _read_legacy(path: Path, file: BinaryIO) -> dict[str, torch.Tensor]:
    """Read the legacy format; every length is checked against the rest of the file before memory is allocated."""
    left = os.fstat(file.fileno()).st_size

    def bad(problem: str) -> DataError:
        return DataError(f"{path} is not an importance matrix of llama.cpp: {problem}")

    def take(count: int) -> bytes:
        nonlocal left
        if count > left:
            raise bad("it ends too early")
        left -= count
        return file.read(count)

    def number() -> int:
        return int(struct.unpack("<i", take(4))[0])

    def text() -> str:
        length = number()
        if not 0 <= length <= _LONGEST_NAME:
            raise bad(f"a name has {length} bytes")
        try:
            return take(length).decode("utf-8")
        except UnicodeDecodeError as error:
            raise bad("a name is not UTF-8") from error

    entries = number()
    if entries < 1:
        raise bad("it has no entries")
    importance: dict[str, torch.Tensor] = {}
    for _ in range(entries):
        name, calls, count = text(), number(), number()
        if count < 1:
            raise bad(f"{name!r} has {count} values")
        values = torch.from_numpy(np.frombuffer(take(4 * count), "<f4").astype(np.float32))
        importance[name] = values / calls if calls > 0 else values
        _check(name, importance[name], path)
    if left:  # the number of text chunks and the name of the dataset
        number()
        text()
    return importance
