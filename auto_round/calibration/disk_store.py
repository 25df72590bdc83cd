"""Store activations in a temporary file instead of memory, with row-wise reads and writes.

The file is read and written at explicit offsets through small buffers, not memory-mapped: mapped pages count as
the process's own until something else needs memory, which breaks a limit on resident memory (docs/adr/0013).
"""

from __future__ import annotations

import os
import tempfile
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import torch

from auto_round.errors import OutputError
from auto_round.files import bytes_of
from auto_round.modeling.files.safetensors import empty_mmap

_CHUNK_BYTES = 1 << 26


class DiskStore:
    """A growing temporary file of activations, without a name once open. Raises OutputError if it cannot be written."""

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        self.size = 0
        self._lock = threading.Lock()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._file: IO[bytes] = tempfile.TemporaryFile(dir=self.folder, prefix="activations-", buffering=0)
        except OSError as error:
            raise OutputError(
                f"activations cannot be stored in {self.folder} ({error.strerror}); set AR_WORK_SPACE to a folder that "
                "can be written, or give a larger max_memory"
            ) from error

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> DiskTensor:
        made = DiskTensor(self, self.size, torch.Size(shape), dtype)
        self.size += made.nbytes
        return made

    def put(self, tensor: torch.Tensor) -> DiskTensor:
        made = self.empty(tensor.shape, tensor.dtype)
        self.write(made.start, bytes_of(tensor))
        return made

    def write(self, start: int, data: memoryview) -> None:
        done = 0
        try:
            with self._lock:
                self._file.seek(start)
                while done < len(data):
                    done += self._file.write(data[done : done + _CHUNK_BYTES])
        except OSError as error:
            raise OutputError(
                f"activations cannot be written to {self.folder} ({error.strerror}): {self.size / 1e9:.2f} GB are "
                "needed there; free some space, set AR_WORK_SPACE to a folder on another disk, or lower nsamples or "
                "seqlen"
            ) from error

    def read(self, start: int, into: memoryview) -> None:
        done = 0
        with self._lock:
            self._file.seek(start)
            while done < len(into):
                count = self._file.readinto(into[done : done + _CHUNK_BYTES])  # type: ignore[attr-defined]
                if not count:
                    raise OutputError(f"the file of activations in {self.folder} ended early; run again")
                done += count

    def __enter__(self) -> DiskStore:
        return self

    def __exit__(self, *_error: object) -> None:
        self._file.close()


class DiskTensor:
    """A tensor whose values are in a file. Indexing the first dimension reads or writes these rows."""

    device = torch.device("cpu")

    def __init__(self, file: DiskStore, start: int, shape: torch.Size, dtype: torch.dtype) -> None:
        self._file, self.start, self.shape, self.dtype = file, start, shape, dtype

    @property
    def nbytes(self) -> int:
        return self.shape.numel() * self.dtype.itemsize

    def dim(self) -> int:
        return len(self.shape)

    def read(self) -> torch.Tensor:
        made = torch.empty(self.shape, dtype=self.dtype)
        self._file.read(self.start, bytes_of(made))
        return made

    def to(self, *args: Any) -> torch.Tensor:
        """Read the whole tensor to a device and dtype, as `torch.Tensor.to`."""
        return self.read().to(*args)

    def __getitem__(self, index: int | slice | Sequence[int]) -> torch.Tensor:
        if isinstance(index, int):
            return self[[index]][0]
        rows = self._rows(index)
        made = torch.empty((len(rows), *self.shape[1:]), dtype=self.dtype)
        for offset, part in self._parts(rows, made):
            self._file.read(offset, part)
        return made

    def __setitem__(self, index: int | slice | Sequence[int], value: torch.Tensor) -> None:
        if isinstance(index, int):
            index, value = [index], value[None]
        for offset, part in self._parts(self._rows(index), value.detach().to("cpu", self.dtype)):
            self._file.write(offset, part)

    def new_empty(self, dtype: torch.dtype, shape: Sequence[int] | None = None) -> DiskTensor:
        """Allocate a tensor in the same file: of this shape, or of another one."""
        return self._file.empty(self.shape if shape is None else shape, dtype)

    def clone(self) -> DiskTensor:
        made = self.new_empty(self.dtype)
        for row in range(self.shape[0]):
            made[row] = self[row]
        return made

    def _rows(self, index: slice | Sequence[int]) -> list[int]:
        return list(range(self.shape[0])[index]) if isinstance(index, slice) else list(index)

    def _parts(self, rows: Sequence[int], values: torch.Tensor) -> Iterator[tuple[int, memoryview]]:
        """(file offset, part of the memory of `values`) for every run of consecutive rows."""
        view, size = bytes_of(values), self.nbytes // max(1, self.shape[0])
        start = 0
        for stop in range(1, len(rows) + 1):
            if stop == len(rows) or rows[stop] != rows[stop - 1] + 1:
                yield self.start + rows[start] * size, view[start * size : stop * size]
                start = stop


ActivationTensor = torch.Tensor | DiskTensor


def empty_beside(like: ActivationTensor, shape: tuple[int, ...], dtype: torch.dtype) -> ActivationTensor:
    """An uninitialised tensor where `like` is stored: in the same file, in memory, or on the device."""
    if isinstance(like, DiskTensor):
        return like.new_empty(dtype, shape)
    if like.device.type == "cpu":
        return empty_mmap(shape, dtype)
    return torch.empty(shape, dtype=dtype, device=like.device)
