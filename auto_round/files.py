"""Write files atomically, and what safetensors files are made of: dtype names, headers, the bytes of tensors."""

from __future__ import annotations

import hashlib
import json
import math
import os
import zlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from auto_round.errors import OutputError

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "I64": torch.int64, "I32": torch.int32,
    "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "U16": torch.uint16, "U32": torch.uint32,
    "U64": torch.uint64, "BOOL": torch.bool,
}  # fmt: skip
"""dtypes by their names in safetensors headers."""
if hasattr(torch, "float8_e8m0fnu"):  # newer than the oldest torch supported
    DTYPES["F8_E8M0"] = torch.float8_e8m0fnu
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
ALIGNMENT = 8
"""Bytes by which tensors in a safetensors file are aligned, since readers view them in place."""


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """The raw bytes of a tensor, without a copy when it is contiguous on the CPU."""
    return tensor.detach().to("cpu").contiguous().reshape(-1).view(torch.uint8).numpy().data


def safetensors_header(
    specs: Iterable[tuple[str, Sequence[int], torch.dtype]], metadata: Mapping[str, str], capacity: int = 0
) -> tuple[bytes, dict[str, int], int]:
    """Header of a safetensors file with these tensors (name, shape, dtype) in this order, without gaps, its JSON padded
    to `capacity` bytes. Returns (the bytes before the tensors, offset of each tensor in the file, size of the file)."""
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    starts: dict[str, int] = {}
    end = 0
    for name, shape, dtype in specs:
        starts[name], end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [starts[name], end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text = text.ljust(-(-max(len(text), capacity) // ALIGNMENT) * ALIGNMENT)
    front = len(text).to_bytes(8, "little") + text
    return front, {name: len(front) + start for name, start in starts.items()}, len(front) + end


def path_inside(folder: str | os.PathLike[str], name: str) -> Path:
    """`folder/name`, or OutputError when that would lie outside the folder."""
    root = Path(folder).resolve()
    target = (root / name).resolve()
    if target == root or root not in target.parents:
        raise OutputError(f"file name {name!r} leads outside the output folder {root}; give a name inside it")
    return target


def sync_folder(folder: Path) -> None:
    """Sync the directory entries of a folder to disk, where the system can. Raises OutputError when that fails."""
    if os.name != "posix":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        raise OutputError(f"names in {folder} cannot be written ({error.strerror}); free some space") from error
    finally:
        os.close(handle)


def file_sha256(path: str | os.PathLike[str]) -> str:
    """Hexadecimal SHA-256 of a file, read in chunks."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def write_text(path: str | os.PathLike[str], text: str) -> Path:
    """Write a small file atomically. Raises OutputError when it cannot be written."""
    target = Path(path)
    partial = target.with_name(f".{target.name}.partial")
    try:
        with open(partial, "w", encoding="utf-8", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, target)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise OutputError(f"cannot write {target} ({error.strerror or error})") from error
    return target


def write_json(path: str | os.PathLike[str], value: Any) -> Path:
    """`write_text` of `value` as indented JSON with sorted keys, so that equal values give equal files."""
    return write_text(path, json.dumps(value, indent=2, sort_keys=True) + "\n")


def add_checksum(text: str) -> str:
    """`text` with a line before it that holds its CRC-32."""
    return f"{zlib.crc32(text.encode()):08x}\n{text}\n"


def take_checksum(data: bytes) -> str:
    """The text that `add_checksum` wrote as `data`. Raises ValueError when the checksum does not match."""
    head, _, text = data.partition(b"\n")
    if not text.endswith(b"\n") or f"{zlib.crc32(text[:-1]):08x}".encode() != head:
        raise ValueError("its bytes are not those that were written")
    return text[:-1].decode()
