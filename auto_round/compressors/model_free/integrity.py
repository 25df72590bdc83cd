"""Damage in the input that headers and the index show, found before any work."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from auto_round.errors import ModelError
from auto_round.modeling.tensor_files import StoredTensor, TensorFiles, read_header

_INDEX = "model.safetensors.index.json"


def check_inputs(files: TensorFiles) -> list[str]:
    """Hold the files of a checkpoint against each other. Returns notes on tensors that the index does not name.

    Raises:
        ModelError: tensors overlap, a file holds bytes that belong to none, the index names a tensor twice, or two
            files hold the same tensor.
    """
    notes: list[str] = []
    index = files.folder / _INDEX
    if index.is_file() and not (files.folder / "model.safetensors").is_file():
        _check_keys(index)
    owner: dict[str, Path] = {}
    for file in dict.fromkeys(stored.file for stored in files.tensors.values()):
        header = read_header(file)
        _check_ranges(file, header)
        for name in header:
            if name in owner:
                raise ModelError(
                    f"tensor {name!r} is in {owner[name]} and in {file} too; one of the files is a copy of another: "
                    "fetch the model again"
                )
            owner[name] = file
        extra = [name for name in header if name not in files.tensors]
        if extra:
            notes.append(f"{file.name} holds {len(extra)} tensors that the index does not name, such as {extra[0]}")
    return notes


def _check_keys(index: Path) -> None:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        seen: dict[str, Any] = {}
        for key, value in pairs:
            if key in seen:
                raise ModelError(f"{index} names {key!r} twice; fetch it again")
            seen[key] = value
        return seen

    json.loads(index.read_text(encoding="utf-8"), object_pairs_hook=unique)


def _check_ranges(file: Path, header: dict[str, StoredTensor]) -> None:
    """The bytes of the tensors follow each other without gap or overlap up to the end, as the format demands."""
    at = None
    for name, stored in sorted(header.items(), key=lambda item: (item[1].start, item[1].end)):
        if at is not None and stored.start != at:
            what = "overlaps the one before it" if stored.start < at else "leaves a gap before it"
            raise ModelError(f"{file}: tensor {name!r} {what} (byte {stored.start}); fetch the file again")
        at = stored.end
    size = file.stat().st_size
    if at is not None and at != size:
        raise ModelError(f"{file} has {size - at} bytes after its last tensor; fetch the file again")
