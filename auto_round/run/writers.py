"""Output writers of a run: keep quantized layers in memory, or pack them into one format's folder."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any

import torch

from auto_round.codecs.quantized_layer import QuantizedLayer
from auto_round.formats.base import OutputFormat
from auto_round.modeling.source import ModelSource, check_finite
from auto_round.output.staging import Staging
from auto_round.output.verify import dense_digest, layer_digest
from auto_round.output.writer import AtomicOutput, Records, ShardWriter
from auto_round.run.file_layout import FileLayout, TensorAssembler


class OutputWriter:
    """Receives the results of a run in the model's order. This one ignores them."""

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


class MemoryWriter(OutputWriter):
    """Stores the quantized layers in memory; everything else is still in the source or the run state."""

    def __init__(self) -> None:
        self.layers: dict[str, QuantizedLayer] = {}

    def layer(self, layer: QuantizedLayer) -> None:
        self.layers[layer.name] = layer


Mark = tuple[dict[str, Any], Mapping[str, torch.Tensor]]
"""What an output has written since its mark before, so that another one can continue after it.

Plain values (`records` of the writes to its files, new entries of `expected` and `dense`, the `missing` parts of open
tensors), and tensors that are not in the files yet."""


class FileOutput(OutputWriter, ABC):
    """An output of files in a staging folder, which another run can continue.

    Attributes:
        folder: the staging folder.
        writer: of its weight files, once it has begun.
        expected: `layer_digest` by quantized layer, for verification.
        dense: what is needed to verify each tensor that is not part of a quantized layer.
    """

    writer: AtomicOutput
    expected: dict[str, str]
    dense: dict[str, Any]

    def __init__(self, fmt: OutputFormat, stage: Staging, source: ModelSource) -> None:
        self.format, self.stage, self.source = fmt, stage, source
        self.folder = stage.path

    def begin(self, marks: Sequence[Mark] = ()) -> None:
        """Begin in an empty folder, or continue after the marks of an interrupted run.

        Raises OutputError when the files do not hold any more what was marked.
        """
        self.expected, self.dense = {}, {}
        for values, _ in marks:
            self.expected |= values["expected"]
            self.dense |= values["dense"]
        self._marked = len(self.expected), len(self.dense)
        if marks:
            self._restore([record for values, _ in marks for record in values["records"]], marks)
            self.stage.clear(keep=[file.path.name for file in self.writer.partial])
        else:
            self.stage.clear()
            self._start()

    def mark(self) -> Mark:
        """What was done since the last mark. It is on disk once `writer.sync` has returned."""
        expected, dense = (
            dict(islice(found.items(), start, None))
            for found, start in zip((self.expected, self.dense), self._marked, strict=True)
        )
        self._marked = len(self.expected), len(self.dense)
        return {"records": self.writer.take_records(), "expected": expected, "dense": dense}, {}

    def close(self) -> None:
        """Close unfinished files and keep them."""
        if hasattr(self, "writer"):
            self.writer.close()

    @abstractmethod
    def _start(self) -> None:
        """Begin in an empty folder."""

    @abstractmethod
    def _restore(self, records: Records, marks: Sequence[Mark]) -> None:
        """Continue after all `records` of the marks."""


class FolderWriter(FileOutput):
    """Packs layers in one format and writes them with the other tensors into a folder.

    Attributes:
        layout: of the files.
        dense: `dense_digest` by stored tensor that is not part of a quantized layer.
    """

    writer: ShardWriter

    def __init__(
        self, fmt: OutputFormat, stage: Staging, source: ModelSource, max_shard_size: int | str, layout: FileLayout,
        replan: Callable[[Sequence[str], str], FileLayout] | None = None, header: int | None = None,
    ) -> None:  # fmt: skip
        """`replan`: the layout when more layers are left unquantized. `header`: see `ShardWriter`."""
        super().__init__(fmt, stage, source)
        self._replan, self._max_shard_size, self._header = replan, max_shard_size, header
        self._assembler = TensorAssembler(layout, source.model)

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
            tail = self.format.cache_scale_tail or ()
            self._add_dense(name, scale.reshape(1) if scale.dim() == 0 else scale.reshape(-1, *tail))

    def mark(self) -> Mark:
        missing, open_tensors = self._assembler.state()
        late = {f"late.{name}": tensor for name, tensor in self.writer.take_late().items()}
        return {**super().mark()[0], "missing": missing}, late | open_tensors

    def _start(self) -> None:
        self.writer = ShardWriter(self.folder, self._max_shard_size, header=self._header)
        self._assembler = TensorAssembler(self.layout, self.source.model)

    def _restore(self, records: Records, marks: Sequence[Mark]) -> None:
        self._start()
        tensors = {name.removeprefix("late."): tensor for _, part in marks for name, tensor in part.items()}
        self.writer.restore(records, tensors)
        values, open_tensors = marks[-1]
        self._assembler.restore(values["missing"], open_tensors)

    def _copy(self, keys: Iterable[str]) -> None:
        """Copy checkpoint tensors unchanged, each once."""
        for key in keys:
            if key in self.dense:
                continue
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
