"""Where every tensor lies in the output, decided before any is made: so that workers may write in any order."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from auto_round.compressors.model_free.units import Unit
from auto_round.errors import ConfigError
from auto_round.export.formats import TensorSpecs
from auto_round.modeling.tensor_files import DTYPES

_ALIGN = 8
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Shard:
    """One output file.

    Attributes:
        name: final file name.
        header: everything before the tensors' bytes.
        offsets: of each tensor in the file.
        size: of the whole file.
        units: indices of the units that write to it.
    """

    name: str
    header: bytes
    offsets: Mapping[str, int]
    size: int
    units: tuple[int, ...]


@dataclass(frozen=True)
class Layout:
    """All output files, and which of them holds a tensor."""

    shards: tuple[Shard, ...]
    shard_of: Mapping[str, int] = field(default_factory=dict)

    @property
    def total(self) -> int:
        """Bytes of all files."""
        return sum(shard.size for shard in self.shards)


def plan_layout(units: Sequence[Unit], tensors: TensorSpecs, files: Sequence[Path], max_size: int) -> Layout:
    """One output file for each input file, cut where it would pass `max_size` bytes.

    A unit belongs to the last of the files that it reads, so that input files can come and go one after the other.
    Units that write parts of one tensor stay together.

    Args:
        files: of the input, in the order in which they are worked on.
    """
    rank = {file: i for i, file in enumerate(files)}
    owner = [max((rank[f] for f in unit.files), default=0) for unit in units]
    latest: dict[str, int] = {}
    for unit, own in zip(units, owner, strict=True):
        for name in unit.outputs:
            latest[name] = max(latest.get(name, 0), own)
    parts: list[list[int]] = []
    for index in range(len(files)):
        mine = [i for i, unit in enumerate(units) if max(latest[n] for n in unit.outputs) == index]
        parts += _cut(mine, units, tensors, max_size)
    count = len(parts)
    shards = []
    shard_of: dict[str, int] = {}
    for position, members in enumerate(parts):
        names = dict.fromkeys(name for i in members for name in units[i].outputs)
        shard_of |= dict.fromkeys(names, position)
        name = "model.safetensors" if count == 1 else f"model-{position + 1:05d}-of-{count:05d}.safetensors"
        shards.append(_shard(name, list(names), tensors, members))
    return Layout(tuple(shards), shard_of)


def _cut(members: Sequence[int], units: Sequence[Unit], tensors: TensorSpecs, max_size: int) -> list[list[int]]:
    """Runs of units whose tensors fit into `max_size`; units with a tensor in common are never parted."""
    together: dict[str, int] = {}
    for i in members:
        for name in units[i].outputs:
            together[name] = i  # the last unit that writes to it
    parts: list[list[int]] = []
    size, open_until = 0, -1
    seen: set[str] = set()
    for i in members:
        new = [name for name in units[i].outputs if name not in seen]
        own = sum(tensor_bytes(tensors[name]) for name in new)
        if not parts or (size + own > max_size and i > open_until and size):
            parts.append([])
            size = 0
        parts[-1].append(i)
        seen.update(new)
        size += own
        open_until = max([open_until, *(together[name] for name in units[i].outputs)])
    return parts


def tensor_bytes(spec: tuple[tuple[int, ...], torch.dtype]) -> int:
    """Bytes of a tensor of that shape and dtype."""
    count = spec[1].itemsize
    for size in spec[0]:
        count *= size
    return count


def _shard(name: str, names: Sequence[str], tensors: TensorSpecs, members: Sequence[int]) -> Shard:
    """Readers view the bytes in place, so every tensor starts where its dtype may: odd sizes come last."""
    even = [n for n in names if tensor_bytes(tensors[n]) % _ALIGN == 0]
    odd = sorted((n for n in names if tensor_bytes(tensors[n]) % _ALIGN), key=lambda n: -tensors[n][1].itemsize)
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    starts: dict[str, int] = {}
    at = 0
    for tensor in (*even, *odd):
        shape, dtype = tensors[tensor]
        if dtype not in _NAMES:
            raise ConfigError(f"tensor {tensor!r} has dtype {dtype}, which safetensors files cannot hold")
        end = at + tensor_bytes(tensors[tensor])
        header[tensor] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [at, end]}
        starts[tensor], at = at, end
    text = json.dumps(header, separators=(",", ":")).encode()
    text = text.ljust(-(-len(text) // _ALIGN) * _ALIGN)
    front = len(text).to_bytes(8, "little") + text
    return Shard(name, front, {t: len(front) + s for t, s in starts.items()}, len(front) + at, tuple(members))


def index_text(layout: Layout, tensors: TensorSpecs) -> str:
    """The text of model.safetensors.index.json."""
    weight_map = {name: layout.shards[layout.shard_of[name]].name for name in sorted(layout.shard_of)}
    total = sum(tensor_bytes(tensors[name]) for name in layout.shard_of)
    return json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2) + "\n"
