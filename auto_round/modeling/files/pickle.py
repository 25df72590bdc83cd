"""Read weights from `pytorch_model.bin` on request, with PyTorch's `weights_only` reader, tensor by tensor.

A pickle is a program; `weights_only` runs only what makes tensors. It is still read only on request, because that
reader is large and may have faults. Files are memory-mapped, so only used tensors are in memory. PyTorch does not check
the checksums of its archives, so they are checked here first.
"""

from __future__ import annotations

import zipfile
from pathlib import Path

import torch

from auto_round.errors import ModelError, first_line
from auto_round.modeling.files.folder import check_inside
from auto_round.modeling.files.safetensors import StoredTensor, TensorFiles, read_index

SINGLE = "pytorch_model.bin"
INDEX = f"{SINGLE}.index.json"


class PickleFiles(TensorFiles):
    """The tensors of `pytorch_model.bin`, or of the files that its index names."""

    def __init__(self, folder: Path, held: dict[str, torch.Tensor], where: dict[str, Path]) -> None:
        stored = {n: StoredTensor(where[n], t.dtype, tuple(t.shape), 0, t.nbytes) for n, t in held.items()}
        super().__init__(folder, stored)
        self._held = held

    @classmethod
    def open_pickles(cls, folder: Path) -> PickleFiles:
        """Map the files of a folder.

        Raises ModelError when there are none, or they contain anything but tensors by name.
        """
        single, index = folder / SINGLE, folder / INDEX
        if single.is_file():
            held = _load(check_inside(folder, single))
            return cls(folder, held, dict.fromkeys(held, single))
        held, parts = read_index(index, ".bin", _load)
        return cls(folder, held, {key: folder / name for name, part in parts.items() for key in part if key in held})

    def read(self, key: str, row: int | None = None) -> torch.Tensor:
        tensor = self._held[key] if row is None else self._held[key][row]
        return tensor.contiguous().clone()

    def read_bytes(self, key: str, start: int, size: int) -> torch.Tensor:
        flat = self._held[key].contiguous().reshape(-1).view(torch.uint8)
        return flat[start : start + size].clone()

    def equal(self, first: str, second: str) -> bool:
        a, b = self._held[first], self._held[second]
        return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)


def has_pickles(folder: Path) -> bool:
    """Whether a folder has pickled weights under the usual names."""
    return (folder / SINGLE).is_file() or (folder / INDEX).is_file()


def _load(file: Path) -> dict[str, torch.Tensor]:
    try:
        with open(file, "rb") as handle:
            archived = handle.read(4) == b"PK\x03\x04"  # as PyTorch writes since 1.6
        if archived:  # made under `set_crc32_options(False)`, it has zero checksums
            with zipfile.ZipFile(file) as archive:
                if any(record.CRC for record in archive.infolist()):
                    damaged = archive.testzip()
                    if damaged is not None:
                        raise zipfile.BadZipFile(f"its record {damaged} is damaged (CRC-32)")
        found = torch.load(file, map_location="cpu", weights_only=True, mmap=archived)
    except Exception as error:  # a damaged pickle can raise anything
        raise ModelError(
            f"{file} cannot be read as plain tensors: {first_line(error)}; convert it to safetensors if you trust it"
        ) from error
    if not isinstance(found, dict) or not found:
        raise ModelError(f"{file} holds a {type(found).__name__}, not tensors by name")
    for name, value in found.items():
        if not isinstance(name, str) or not isinstance(value, torch.Tensor) or value.is_sparse or value.is_meta:
            raise ModelError(f"{file}: {name!r} is not a plain tensor but a {type(value).__name__}")
        if _overlaps(value):
            raise ModelError(
                f"{file}: elements of {name!r} overlap in memory (shape {tuple(value.shape)}, strides "
                f"{value.stride()}), as in a damaged file. If this is intended, save it as safetensors"
            )
    return {name: value.detach() for name, value in found.items()}


def _overlaps(tensor: torch.Tensor) -> bool:
    """Whether elements with different indices may share memory."""
    end = 0
    for stride, size in sorted((s, n) for s, n in zip(tensor.stride(), tensor.shape, strict=True) if n > 1):
        if stride <= end:
            return True
        end += stride * (size - 1)
    return False
