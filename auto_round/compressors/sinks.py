"""Where finished layers go: into memory, or packed into the folder of one format."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import torch

from auto_round.compressors.cache import stored_scale
from auto_round.compressors.dense_experts import ExpertJoiner
from auto_round.compressors.digest import dense_digest, layer_digest
from auto_round.export.formats import OutputFormat
from auto_round.export.shard_writer import ShardWriter
from auto_round.modeling.finite import check_finite
from auto_round.modeling.source import ModelSource
from auto_round.quantized_layer import QuantizedLayer


class Sink(Protocol):
    """Takes what the walk gives, in the model's order."""

    def layer(self, layer: QuantizedLayer) -> None:
        """A quantized layer."""

    def tensors(self, names: Iterable[str], source: ModelSource) -> None:
        """Tensors that stay as they are, by their state-dict names."""

    def scales(self, made: Mapping[str, torch.Tensor]) -> None:
        """Static scales of attention, by tensor name: scalars or [heads]."""

    def keep(self, names: Sequence[str], reason: str) -> None:
        """These layers will come as they are, though they were planned to be quantized. Raises NumericsError or
        UnsupportedError when that cannot be any more."""


class MemorySink:
    """Keeps the layers."""

    def __init__(self) -> None:
        self.layers: dict[str, QuantizedLayer] = {}

    def layer(self, layer: QuantizedLayer) -> None:
        self.layers[layer.name] = layer

    def tensors(self, names: Iterable[str], source: ModelSource) -> None:
        """Nothing to keep: the source still has them."""

    def scales(self, made: Mapping[str, torch.Tensor]) -> None:
        """Nothing to keep: the walk has them."""

    def keep(self, names: Sequence[str], reason: str) -> None:
        """Nothing to do: a layer that does not come stays in the source."""


class FolderSink:
    """Packs layers by one format and writes them with the other tensors into a folder.

    Attributes:
        expected: by layer, what a reader of the file must find (`digest.layer_digest`).
        dense: by tensor that is part of no quantized layer, the digest of its bytes.
        written: names of all tensors, in order.
    """

    def __init__(
        self, fmt: OutputFormat, folder: Path, model_dtype: torch.dtype, max_shard_size: int | str,
        experts: ExpertJoiner | None = None, rejoin: Callable[[Sequence[str], str], ExpertJoiner] | None = None,
        header: int | None = None,
    ) -> None:  # fmt: skip
        """`rejoin`: the experts' joiner when more layers stay dense. `header`: see `ShardWriter`."""
        self.format, self.folder, self.model_dtype, self._rejoin = fmt, folder, model_dtype, rejoin
        self.experts = experts or ExpertJoiner({})
        self.writer = ShardWriter(folder, max_shard_size, header=header)
        self.expected: dict[str, str] = {}
        self.dense: dict[str, str] = {}
        self.written: list[str] = []

    def layer(self, layer: QuantizedLayer) -> None:
        layer = self.format.restate(layer)
        dense = self.format.name == "fake"
        self.expected[layer.name] = layer_digest(layer, dense, self.model_dtype)
        for name, tensor in self.format.pack(layer, model_dtype=self.model_dtype).items():
            self._add(name, tensor)

    def tensors(self, names: Iterable[str], source: ModelSource) -> None:
        for name in names:
            tensor = source.read(name)
            if source.checks_finite:
                check_finite(name, tensor)
            self._add_dense(name, tensor)

    def keep(self, names: Sequence[str], reason: str) -> None:
        if self._rejoin is not None:
            self.experts.targets |= self._rejoin(names, reason).targets

    def scales(self, made: Mapping[str, torch.Tensor]) -> None:
        for name, scale in made.items():
            self._add_dense(name, stored_scale(self.format, scale))

    def digests(self) -> dict[str, str]:
        """SHA-256 of the files by name, when they are finished."""
        return self.writer.sha256

    def _add_dense(self, name: str, tensor: torch.Tensor) -> None:
        written = self._add(name, tensor)
        if written is not None:
            self.dense[written[0]] = dense_digest(written[1])

    def _add(self, name: str, tensor: torch.Tensor) -> tuple[str, torch.Tensor] | None:
        whole = self.experts.add(name, tensor)
        if whole is not None:
            self.writer.add(*whole)
            self.written.append(whole[0])
        return whole
