"""Output writers of a run: keep quantized layers in memory, or pack them into one format's folder."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import torch

from auto_round.codecs.quantized_layer import QuantizedLayer
from auto_round.formats.base import OutputFormat
from auto_round.modeling.source import ModelSource, check_finite
from auto_round.output.verify import dense_digest, layer_digest
from auto_round.output.writer import ShardWriter
from auto_round.run.file_layout import FileLayout, TensorAssembler
from auto_round.run.plan import stored_scale


class OutputWriter(Protocol):
    """Receives the results of a run in the model's order."""

    def layer(self, layer: QuantizedLayer) -> None:
        """A quantized layer."""

    def tensors(self, names: Iterable[str], source: ModelSource) -> None:
        """Unquantized tensors, by state-dict name."""

    def spare(self) -> None:
        """Checkpoint tensors that no module reads."""

    def scales(self, made: Mapping[str, torch.Tensor]) -> None:
        """Static scales of attention, by tensor name: scalars or [heads]."""

    def leave_unquantized(self, names: Sequence[str], reason: str) -> None:
        """These planned layers will be written unquantized. Raises NumericsError or UnsupportedError when that is no
        longer possible."""


class MemoryWriter:
    """Stores the quantized layers in memory; everything else is still in the source or the run state."""

    def __init__(self) -> None:
        self.layers: dict[str, QuantizedLayer] = {}

    def layer(self, layer: QuantizedLayer) -> None:
        self.layers[layer.name] = layer

    def tensors(self, names: Iterable[str], source: ModelSource) -> None:
        pass

    def spare(self) -> None:
        pass

    def scales(self, made: Mapping[str, torch.Tensor]) -> None:
        pass

    def leave_unquantized(self, names: Sequence[str], reason: str) -> None:
        pass


class FolderWriter:
    """Packs layers in one format and writes them with the other tensors into a folder.

    Attributes:
        layout: of the files.
        expected: `layer_digest` by quantized layer, for verification.
        dense: `dense_digest` by stored tensor that is not part of a quantized layer.
    """

    def __init__(
        self, fmt: OutputFormat, folder: Path, source: ModelSource, max_shard_size: int | str, layout: FileLayout,
        replan: Callable[[Sequence[str], str], FileLayout] | None = None, header: int | None = None,
    ) -> None:  # fmt: skip
        """`replan`: the layout when more layers are left unquantized. `header`: see `ShardWriter`."""
        self.format, self.folder, self.source, self._replan = fmt, folder, source, replan
        self._assembler = TensorAssembler(layout, source.model)
        self.writer = ShardWriter(folder, max_shard_size, header=header)
        self.expected: dict[str, str] = {}
        self.dense: dict[str, str] = {}
        self._copied: set[str] = set()

    @property
    def layout(self) -> FileLayout:
        return self._assembler.layout

    def layer(self, layer: QuantizedLayer) -> None:
        layer = self.format.normalize_for_format(layer)
        dtype = self.source.dtype
        self.expected[layer.name] = layer_digest(layer, self.format.casts_to_model_dtype, dtype)
        for name, tensor in self.format.pack(replace(layer, bias=None), model_dtype=dtype).items():
            self._add(name, tensor)
        if layer.bias is not None:
            self.tensors([f"{layer.name}.bias"], self.source)

    def tensors(self, names: Iterable[str], source: ModelSource) -> None:
        for name in names:
            if name in self.layout.copies:
                self._copy(self.layout.copies[name])
                continue
            tensor = source.read_unquantized(name)
            if source.checks_finite:
                check_finite(name, tensor)
            self._add_dense(name, tensor)

    def spare(self) -> None:
        self._copy(self.layout.spare)

    def leave_unquantized(self, names: Sequence[str], reason: str) -> None:
        if self._replan is not None:
            self._assembler.layout = self._replan(names, reason)

    def scales(self, made: Mapping[str, torch.Tensor]) -> None:
        for name, scale in made.items():
            self._add_dense(name, stored_scale(self.format, scale))

    def digests(self) -> dict[str, str]:
        """SHA-256 of the finished files by name."""
        return self.writer.sha256

    def _copy(self, keys: Iterable[str]) -> None:
        """Copy checkpoint tensors unchanged, each once."""
        for key in keys:
            if key in self._copied:
                continue
            self._copied.add(key)
            tensor = self.source.read_stored(key)
            if self.source.checks_finite:
                check_finite(key, tensor)
            self.writer.add(key, tensor)
            self.dense[key] = dense_digest(tensor)

    def _add_dense(self, name: str, tensor: torch.Tensor) -> None:
        for stored, whole in self._add(name, tensor):
            self.dense[stored] = dense_digest(whole)

    def _add(self, name: str, tensor: torch.Tensor) -> list[tuple[str, torch.Tensor]]:
        complete = list(self._assembler.add(name, tensor))
        for stored, whole in complete:
            self.writer.add(stored, whole)
        return complete
