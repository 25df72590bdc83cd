"""Read tensors of a local checkpoint one at a time: safetensors with strict header checks, and pickles on request.

The files are read with plain reads instead of a memory map: mapped pages count as resident memory for as long as a
tensor or the file lives, and copying out of a map holds every byte twice.
"""

from __future__ import annotations

import hashlib
import mmap
import os
import struct
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from math import prod
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

import torch

from auto_round.errors import ModelError, first_line
from auto_round.files import DTYPES
from auto_round.modeling.files.folder import check_inside, parse_object, read_object

_MAX_HEADER = 100_000_000  # as in the safetensors library
_READ_AT_ONCE = 1 << 30  # Linux reads at most 2 GiB in one call
_COMPARE_AT_ONCE = 1 << 24
_READ_AHEAD = 256 << 20
_OWN_PAGES = 1 << 18
_PICKLE = "pytorch_model.bin"
_PICKLE_INDEX = f"{_PICKLE}.index.json"
Stored = TypeVar("Stored")


@dataclass(frozen=True)
class StoredTensor:
    """Location of one tensor: file, dtype, shape and byte range [start, end) in the file."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    end: int


class TensorFiles:
    """All tensors of one checkpoint folder. Headers are checked on opening; data is read on demand."""

    def __init__(self, folder: Path, tensors: dict[str, StoredTensor]) -> None:
        self.folder, self.tensors = folder, tensors
        self.notes: tuple[str, ...] = ()  # for the user
        # Gives the uint8 memory that a tensor is read into; who replaces it defines how long it is valid.
        self.allocate: Callable[[int], torch.Tensor] = _empty_bytes

    @classmethod
    def open(cls, folder: str | os.PathLike[str]) -> TensorFiles:
        """Read the headers of `model.safetensors` or of the shards in `model.safetensors.index.json`.

        Raises ModelError for no safetensors file, a damaged one, an index that does not match its shards, a tensor in
        two shards, or a link that leaves the folder.
        """
        path = Path(folder)
        single, index = path / "model.safetensors", path / "model.safetensors.index.json"
        if single.is_file():
            return cls(path, read_header(check_inside(path, single)))
        if not index.is_file():
            found = sorted(p.name for p in path.iterdir()) if path.is_dir() else []
            pickles = [n for n in found if n.endswith((".bin", ".pt", ".pth", ".ckpt"))]
            loose = [n for n in found if n.endswith(".safetensors")]
            reason = "no weights: model.safetensors or model.safetensors.index.json is needed"
            if pickles:
                reason = (
                    f"weights as pickle ({pickles[0]}), which can run code when opened, and not as safetensors. "
                    "Convert it once, if you trust it: "
                    "AutoModelForCausalLM.from_pretrained(...).save_pretrained(new_folder); or read only its tensors "
                    "with allow_pickle=True (--allow_pickle)"
                )
            elif loose:
                reason = f"{loose[0]} but neither model.safetensors nor its index model.safetensors.index.json"
            raise ModelError(f"{path} holds {reason}")
        tensors, shards = read_index(index, ".safetensors", read_header)
        files = cls(path, tensors)
        owner: dict[str, str] = {}
        for shard, header in shards.items():
            for name in header:
                if owner.setdefault(name, shard) != shard:
                    raise ModelError(
                        f"tensor {name!r} is in both {path / owner[name]} and {path / shard}; one of the files is a "
                        "copy of the other: fetch the model again"
                    )
            extra = [name for name in header if name not in tensors]
            if extra:
                note = f"{shard} holds {len(extra)} tensors that the index does not name, such as {extra[0]}"
                files.notes = (*files.notes, note)
        return files

    @property
    def stored(self) -> TensorFiles:
        """The stored files; of a quantized checkpoint, with codes and scales."""
        return self

    def identity(self, file: Path) -> list[Any]:
        """Size, modification time and header digest of a weight file, to recognize it without reading it."""
        stat = file.stat()
        with open(file, "rb") as handle:
            length = int.from_bytes(handle.read(8), "little")
            head = handle.read(min(length, stat.st_size))
        return [stat.st_size, stat.st_mtime_ns, hashlib.sha256(head).hexdigest()]

    def inputs(self, key: str) -> tuple[str, ...]:
        """Names in the files of what is read for a tensor: itself, or its codes and scale."""
        return (key,)

    def __contains__(self, key: str) -> bool:
        return key in self.tensors

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def read(self, key: str, row: int | None = None) -> torch.Tensor:
        """Read the tensor `key` to the CPU in its stored dtype; with `row`, only that index of its first dimension."""
        stored = self.tensors[key]
        start, size, shape = 0, stored.end - stored.start, stored.shape
        if row is not None:
            size //= shape[0]
            start, shape = row * size, shape[1:]
        return self.read_bytes(key, start, size).view(stored.dtype).view(shape)

    def read_bytes(self, key: str, start: int, size: int) -> torch.Tensor:
        """uint8 [size]: stored bytes of the tensor `key` starting at byte `start`."""
        raw, file = self.allocate(size), self.tensors[key].file
        view = raw.numpy().data
        try:
            with open(file, "rb", buffering=0) as handle:
                handle.seek(self.tensors[key].start + start)
                done = 0
                while done < size:
                    count = handle.readinto(view[done : done + _READ_AT_ONCE])
                    if not count:
                        raise ModelError(f"{file.name} ended while tensor {key!r} was read; fetch the file again")
                    done += count
        except OSError as error:
            raise ModelError(f"cannot read tensor {key!r} from {file}: {error}") from error
        return raw

    def prefetch(self, key: str, start: int = 0, size: int | None = None) -> None:
        """Ask the system to read ahead `size` bytes of the tensor `key` from byte `start`, at most 256 MB."""
        stored = self.tensors[key]
        left = max(0, stored.end - stored.start - start)
        wanted = min(left, _READ_AHEAD, left if size is None else size)
        if wanted and hasattr(os, "posix_fadvise"):
            with suppress(OSError), open(stored.file, "rb", buffering=0) as handle:
                os.posix_fadvise(handle.fileno(), stored.start + start, wanted, os.POSIX_FADV_WILLNEED)

    def equal(self, first: str, second: str) -> bool:
        """Whether two tensors have the same bytes, compared in chunks."""
        a, b = self.tensors[first], self.tensors[second]
        if (a.dtype, a.shape) != (b.dtype, b.shape):
            return False
        for offset in range(0, a.end - a.start, _COMPARE_AT_ONCE):
            size = min(_COMPARE_AT_ONCE, a.end - a.start - offset)
            if not torch.equal(self.read_bytes(first, offset, size), self.read_bytes(second, offset, size)):
                return False
        return True


def _empty_bytes(size: int) -> torch.Tensor:
    """Uninitialised uint8 [size]. Large ones are private pages, which, unlike blocks of malloc, are freed at once."""
    if size < _OWN_PAGES or not hasattr(mmap, "MAP_PRIVATE"):  # Windows has no private anonymous maps
        return torch.empty(size, dtype=torch.uint8)
    return torch.frombuffer(mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS), dtype=torch.uint8)


def empty_mmap(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """An uninitialised tensor whose memory returns to the system when it is freed, whatever its size."""
    return _empty_bytes(prod(shape) * dtype.itemsize).view(dtype).view(shape)


def read_header(file: Path) -> dict[str, StoredTensor]:
    """Read the tensors that one safetensors file declares. Raises ModelError naming the file and the tensor."""
    try:
        size = file.stat().st_size
        with open(file, "rb") as handle:
            length = struct.unpack("<Q", handle.read(8).ljust(8, b"\0"))[0]
            if size < 8 or not 2 <= length <= min(_MAX_HEADER, size - 8):
                raise ModelError(
                    f"{file} is not a safetensors file (or was cut short): it has {size} bytes and no valid header"
                )
            header = parse_object(handle.read(length), f"the header of {file}")
    except OSError as error:
        raise ModelError(f"cannot read {file}: {error}") from error
    header.pop("__metadata__", None)
    at = data = 8 + length
    found: dict[str, StoredTensor] = {}
    for key, info in header.items():
        try:
            name, shape = info["dtype"], tuple(info["shape"])
            first, last = info["data_offsets"]
            for number in (*shape, first, last):
                if type(number) is not int:  # True is none
                    raise TypeError(f"{number!r} is not an integer")
        except (KeyError, TypeError, ValueError) as error:
            raise ModelError(f"{file}: the header entry of tensor {key!r} is malformed ({error!r})") from error
        dtype = DTYPES.get(name) if isinstance(name, str) else None
        if dtype is None:
            raise ModelError(f"{file}: tensor {key!r} has dtype {name!r}; known ones: {', '.join(sorted(DTYPES))}")
        if min(shape, default=0) < 0 or first < 0 or last - first != prod(shape) * dtype.itemsize:
            raise ModelError(
                f"{file}: tensor {key!r} of shape {list(shape)} {name} does not fit its {last - first} bytes"
            )
        if data + last > size:
            raise ModelError(
                f"{file} is cut short: tensor {key!r} ends at byte {data + last} of {size}; fetch the file again"
            )
        found[key] = StoredTensor(file, dtype, shape, data + first, data + last)
    # As the format requires, the tensors cover all bytes from the header to the end: a shifted offset is detected
    # although each tensor alone would fit.
    for name, stored in sorted(found.items(), key=lambda item: (item[1].start, item[1].end)):
        if stored.start != at:
            what = "overlaps the one before it" if stored.start < at else "leaves a gap before it"
            raise ModelError(f"{file}: tensor {name!r} {what} (byte {stored.start}); fetch the file again")
        at = stored.end
    if at != size:
        raise ModelError(f"{file} has {size - at} bytes after its last tensor; fetch the file again")
    return found


def read_index(
    index: Path, suffix: str, load: Callable[[Path], Mapping[str, Stored]]
) -> tuple[dict[str, Stored], dict[str, Mapping[str, Stored]]]:
    """Tensors by name from the files that an index names, and everything in these files by file name.

    `index` is a JSON file whose `weight_map` gives file names with `suffix` by tensor name, all inside its folder.
    Raises ModelError when it is malformed or does not match the files.
    """
    folder = index.parent
    weight_map = read_object(check_inside(folder, index)).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(value, str) for value in weight_map.values()):
        raise ModelError(f"{index} has no weight_map of file names; fetch the file again")
    if not weight_map:
        raise ModelError(f"the weight_map of {index} is empty; fetch the file again")
    tensors: dict[str, Stored] = {}
    parts: dict[str, Mapping[str, Stored]] = {}
    for key, name in weight_map.items():
        if name not in parts:
            path = PurePosixPath(name.replace("\\", "/"))
            if path.is_absolute() or ".." in path.parts or ":" in name or not name.endswith(suffix):
                raise ModelError(
                    f"{index} maps tensor {key!r} to {name!r}; only {suffix} files inside the folder are allowed"
                )
            file = folder / path
            if not file.is_file():
                raise ModelError(
                    f"{file} is missing; {index.name} needs it for tensor {key!r} and others. Fetch the model again"
                )
            parts[name] = load(check_inside(folder, file))
        if key not in parts[name]:
            raise ModelError(f"tensor {key!r} is missing from {folder / name}, where {index.name} says it is")
        tensors[key] = parts[name][key]
    return tensors, parts


class PickleFiles(TensorFiles):
    """The tensors of `pytorch_model.bin`, or of the files that its index names, memory-mapped.

    A pickle is a program. PyTorch's `weights_only` reader runs only what makes tensors, but it is large and may have
    faults, so pickles are read only on request.
    """

    def __init__(self, folder: Path, held: dict[str, torch.Tensor], where: dict[str, Path]) -> None:
        stored = {n: StoredTensor(where[n], t.dtype, tuple(t.shape), 0, t.nbytes) for n, t in held.items()}
        super().__init__(folder, stored)
        self._held = held

    @classmethod
    def open_pickles(cls, folder: Path) -> PickleFiles:
        """Map the files of a folder. Raises ModelError when they contain anything but tensors by name."""
        single, index = folder / _PICKLE, folder / _PICKLE_INDEX
        if single.is_file():
            held = _load_pickle(check_inside(folder, single))
            return cls(folder, held, dict.fromkeys(held, single))
        held, parts = read_index(index, ".bin", _load_pickle)
        return cls(folder, held, {key: folder / name for name, part in parts.items() for key in part if key in held})

    def read_bytes(self, key: str, start: int, size: int) -> torch.Tensor:
        return self._held[key].contiguous().reshape(-1).view(torch.uint8)[start : start + size].clone()


def only_pickles(folder: Path) -> bool:
    """Whether a folder has pickled weights under the usual names, and no safetensors file."""
    return any((folder / n).is_file() for n in (_PICKLE, _PICKLE_INDEX)) and not any(folder.glob("*.safetensors"))


def _load_pickle(file: Path) -> dict[str, torch.Tensor]:
    try:
        with open(file, "rb") as handle:
            archived = handle.read(4) == b"PK\x03\x04"  # as PyTorch writes since 1.6
        if archived:  # PyTorch does not check the checksums; made under `set_crc32_options(False)`, they are zero
            with zipfile.ZipFile(file) as archive:
                damaged = archive.testzip() if any(record.CRC for record in archive.infolist()) else None
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
        end = 0
        for stride, size in sorted((s, n) for s, n in zip(value.stride(), value.shape, strict=True) if n > 1):
            if stride <= end:
                raise ModelError(
                    f"{file}: elements of {name!r} overlap in memory (shape {tuple(value.shape)}, strides "
                    f"{value.stride()}), as in a damaged file. If this is intended, save it as safetensors"
                )
            end += stride * (size - 1)
    return {name: value.detach() for name, value in found.items()}
