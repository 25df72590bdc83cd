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
    """Takes what the walk gives, in the model's order."""

    def layer(self, layer: QuantizedLayer) -> None:
        """A quantized layer."""

    def tensors(self, names: Iterable[str], source: ModelSource) -> None:
        """Tensors that stay as they are, by their state-dict names."""

    def spare(self) -> None:
        """The checkpoint's tensors that no module reads."""

    def scales(self, made: Mapping[str, torch.Tensor]) -> None:
        """Static scales of attention, by tensor name: scalars or [heads]."""

    def leave_unquantized(self, names: Sequence[str], reason: str) -> None:
        """These layers will come as they are, though they were planned to be quantized. Raises NumericsError or
        UnsupportedError when that cannot be any more."""


class MemoryWriter:
    """Keeps the layers."""

    def __init__(self) -> None:
        self.layers: dict[str, QuantizedLayer] = {}

    def layer(self, layer: QuantizedLayer) -> None:
        self.layers[layer.name] = layer

    def tensors(self, names: Iterable[str], source: ModelSource) -> None:
        """Nothing to keep: the source still has them."""

    def spare(self) -> None:
        """Nothing to keep: the source still has them."""

    def scales(self, made: Mapping[str, torch.Tensor]) -> None:
        """Nothing to keep: the walk has them."""

    def leave_unquantized(self, names: Sequence[str], reason: str) -> None:
        """Nothing to do: a layer that does not come stays in the source."""


class FolderWriter:
    """Packs layers by one format and writes them with the other tensors into a folder.

    Attributes:
        layout: of the files.
        expected: by layer, what a reader of the file must find (`digest.layer_digest`).
        dense: by stored tensor that is part of no quantized layer, the digest of its bytes.
        written: names of all tensors, in order.
    """

    def __init__(
        self, fmt: OutputFormat, folder: Path, source: ModelSource, max_shard_size: int | str, layout: FileLayout,
        replan: Callable[[Sequence[str], str], FileLayout] | None = None, header: int | None = None,
    ) -> None:  # fmt: skip
        """`replan`: the layout when more layers stay dense. `header`: see `ShardWriter`."""
        self.format, self.folder, self.source, self._replan = fmt, folder, source, replan
        self._joiner = TensorAssembler(layout, source.model)
        self.writer = ShardWriter(folder, max_shard_size, header=header)
        self.expected: dict[str, str] = {}
        self.dense: dict[str, str] = {}
        self.written: list[str] = []
        self._copied: set[str] = set()

    @property
    def layout(self) -> FileLayout:
        return self._joiner.layout

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
            self._joiner.layout = self._replan(names, reason)

    def scales(self, made: Mapping[str, torch.Tensor]) -> None:
        for name, scale in made.items():
            self._add_dense(name, stored_scale(self.format, scale))

    def digests(self) -> dict[str, str]:
        """SHA-256 of the files by name, when they are finished."""
        return self.writer.sha256

    def _copy(self, keys: Iterable[str]) -> None:
        """Write tensors of the checkpoint as they are stored there, each once."""
        for key in keys:
            if key in self._copied:
                continue
            self._copied.add(key)
            tensor = self.source.read_stored(key)
            if self.source.checks_finite:
                check_finite(key, tensor)
            self.writer.add(key, tensor)
            self.written.append(key)
            self.dense[key] = dense_digest(tensor)

    def _add_dense(self, name: str, tensor: torch.Tensor) -> None:
        for stored, whole in self._add(name, tensor):
            self.dense[stored] = dense_digest(whole)

    def _add(self, name: str, tensor: torch.Tensor) -> list[tuple[str, torch.Tensor]]:
        made = list(self._joiner.add(name, tensor))
        for stored, whole in made:
            self.writer.add(stored, whole)
            self.written.append(stored)
        return made
