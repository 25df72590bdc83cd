"""Read and write llama.cpp importance matrix (imatrix) files: mean squared inputs per matrix.

Matrices are named as in the GGUF file. There are two formats. The current one is a GGUF file with two float32 tensors
per matrix: `NAME.in_sum2` [experts, in], sums of squares over tokens, and `NAME.counts` [experts, 1], the number of
tokens; the keys `imatrix.datasets`, `imatrix.chunk_count` and `imatrix.chunk_size` describe the data. The legacy one is
a list of (name, number of calls, mean squares times that number) without a magic number. Source: llama.cpp's
`tools/imatrix/imatrix.cpp` and `common/imatrix-loader.cpp`.
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
from auto_round.gguf.reader import MAGIC, GgufHeader, read_header
from auto_round.output.gguf_writer import GgufFile, TypedValue

_SUMS, _COUNTS = ".in_sum2", ".counts"
_LONGEST_NAME = 1024


@dataclass(frozen=True)
class ImatrixFile:
    """Mean squares by name, float32 [in], or [experts, in] for stacked experts, with ones for an expert without tokens.

    In the legacy format the experts of a tensor are one row, see `of`.
    """

    importance: dict[str, torch.Tensor]

    def of(self, name: str, shape: Sequence[int]) -> torch.Tensor | None:
        """Importance of the tensor `name` of `shape` [out, in] or [experts, out, in]: [in] or [experts, in].

        None when the file has none. Raises DataError when the sizes differ.
        """
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
    """Read an importance matrix of either format.

    Raises DataError for a file that cannot be read, is truncated or malformed, or has NaN, Inf or negative values.
    """
    path = Path(path)
    try:
        with open(path, "rb") as file:
            start = file.read(len(MAGIC))
            file.seek(0)
            if start != MAGIC:
                return _LegacyReader(file, path).read()
    except OSError as error:
        raise DataError(f"cannot read importance matrix {path} ({error.strerror})") from error
    return _from_gguf(path, read_header(path))


def write_imatrix(
    path: str | os.PathLike[str], sums: Mapping[str, torch.Tensor], tokens: Mapping[str, int | torch.Tensor],
    chunk_size: int,
) -> None:  # fmt: skip
    """Write an importance matrix in the current format, which llama.cpp's `--imatrix` takes.

    Args:
        path: the file.
        sums: sums of squares by the tensor's name in the GGUF file, [in] or [experts, in], as in
            `SecondMomentObserver`.
        tokens: number of tokens of each: an integer, or one per expert.
        chunk_size: tokens of one sample.

    Raises:
        OutputError: the file cannot be written.
        DataError: there are no sums, or they have NaN or Inf.
    """
    if not sums:
        raise DataError(f"no importance was collected; there is nothing to write to {path}")
    counts = {name: torch.as_tensor(tokens[name], dtype=torch.float32).reshape(-1, 1) for name in sums}
    rows = {name: value.detach().to("cpu", torch.float32) for name, value in sums.items()}
    infos: list[tuple[str, Sequence[int], str]] = []
    for name in sorted(rows):
        rows[name] = rows[name].reshape(len(counts[name]), -1)
        _check(name, rows[name], path)
        infos += [(name + _SUMS, rows[name].shape, "F32"), (name + _COUNTS, counts[name].shape, "F32")]
    chunks = -(-int(max(float(count.max()) for count in counts.values())) // chunk_size)
    metadata = {
        "general.type": "imatrix",
        # llama-quantize requires the list, and GGUF has no item type for an empty one.
        "imatrix.datasets": TypedValue(["unknown"], "STRING"),
        "imatrix.chunk_count": chunks,
        "imatrix.chunk_size": chunk_size,
    }
    with GgufFile(path, "imatrix", metadata, infos) as file:
        for name in sorted(rows):
            file.write(name + _SUMS, rows[name])
            file.write(name + _COUNTS, counts[name])


def _check(name: str, values: torch.Tensor, path: str | os.PathLike[str]) -> None:
    if not bool(torch.isfinite(values).all()) or bool((values < 0).any()):
        raise DataError(f"importance matrix {path}: the values of {name!r} are not all finite and positive")


def _from_gguf(path: Path, header: GgufHeader) -> ImatrixFile:
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
        count = _floats(path, counts.start, counts.nbytes)
        total = _floats(path, sums.start, sums.nbytes).reshape(len(count), -1)
        _check(name, total, path)
        _check(name, count, path)
        unseen = count.round().unsqueeze(1) == 0
        mean = torch.where(unseen, torch.ones(()), total / count.round().clamp(min=1).unsqueeze(1))
        importance[name] = mean[0] if len(count) == 1 else mean
    return ImatrixFile(importance)


def _floats(path: Path, start: int, nbytes: int) -> torch.Tensor:
    return torch.from_numpy(np.fromfile(path, "<f4", nbytes // 4, offset=start).astype(np.float32))


class _LegacyReader:
    """Reads the legacy format; every length is checked against the rest of the file before memory is allocated."""

    def __init__(self, file: BinaryIO, path: Path) -> None:
        self.file, self.path = file, path
        self.left = os.fstat(file.fileno()).st_size

    def read(self) -> ImatrixFile:
        entries = self.number()
        if entries < 1:
            raise self.error("it has no entries")
        importance: dict[str, torch.Tensor] = {}
        for _ in range(entries):
            name = self.text()
            calls, count = self.number(), self.number()
            if count < 1:
                raise self.error(f"{name!r} has {count} values")
            values = torch.from_numpy(np.frombuffer(self.bytes(4 * count), "<f4").astype(np.float32))
            importance[name] = values / calls if calls > 0 else values
            _check(name, importance[name], self.path)
        if self.left:  # the number of text chunks and the name of the dataset
            self.number()
            self.text()
        return ImatrixFile(importance)

    def error(self, problem: str) -> DataError:
        return DataError(f"{self.path} is not an importance matrix of llama.cpp: {problem}")

    def bytes(self, count: int) -> bytes:
        if count > self.left:
            raise self.error("it ends too early")
        self.left -= count
        return self.file.read(count)

    def number(self) -> int:
        return int(struct.unpack("<i", self.bytes(4))[0])

    def text(self) -> str:
        length = self.number()
        if not 0 <= length <= _LONGEST_NAME:
            raise self.error(f"a name has {length} bytes")
        try:
            return self.bytes(length).decode("utf-8")
        except UnicodeDecodeError as error:
            raise self.error("a name is not UTF-8") from error
