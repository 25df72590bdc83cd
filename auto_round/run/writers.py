"""Outputs of a run: what receives its results, in memory or in files that another run can continue."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch

from auto_round.codecs.quantized_layer import QuantizedLayer
from auto_round.formats.base import OutputFormat
from auto_round.modeling.source import ModelSource
from auto_round.output.staging import Staging
from auto_round.output.writer import AtomicOutput, Records
from auto_round.run.plan import Job
from auto_round.run.settings import Settings

if TYPE_CHECKING:
    from auto_round.run.blocks import RunState


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


@dataclass
class RunResult:
    """Results of a run besides its layers."""

    state: RunState
    loss: float | None
    smoke_sample: list[dict[str, torch.Tensor]] | None
    data: str | None
    seconds: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class OutputContext:
    """What the output folders of a finished run have in common."""

    source: ModelSource
    settings: Settings
    tokenizer: Any
    job: Job
    finished: RunResult
    made_from: Mapping[str, str] | None = None
    shard: int | str = "5GB"


Mark = tuple[dict[str, Any], Mapping[str, torch.Tensor]]
"""What an output has written since its mark before, so that another one can continue after it.

Plain values (`records` of the writes to its files, new entries of `expected` and `dense`, the `missing` parts of open
tensors), and tensors that are not in the files yet."""


class FileOutput(OutputWriter, ABC):
    """An output of files in a staging `folder`, which another run can continue. `expected`: `layer_digest` by quantized
    layer; `dense`: what is needed to verify each tensor that is not part of one. `shard`: largest weight file."""

    writer: AtomicOutput
    expected: dict[str, str]
    dense: dict[str, Any]

    def __init__(self, job: Job, fmt: OutputFormat, stage: Staging, source: ModelSource, shard: int | str) -> None:
        self.job, self.format, self.stage, self.source, self.shard = job, fmt, stage, source, shard
        self.folder = stage.path

    def begin(self, marks: Sequence[Mark] = ()) -> None:
        """Begin in an empty folder, or continue after the marks of an interrupted run, if the files still hold that."""
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
        if hasattr(self, "writer"):
            self.writer.close()

    @abstractmethod
    def _start(self) -> None:
        """Begin in an empty folder."""

    @abstractmethod
    def _restore(self, records: Records, marks: Sequence[Mark]) -> None:
        """Continue after all `records` of the marks."""

    def write_beside(self, made: OutputContext) -> None:
        """Write the files that the weights need beside them. A file that holds everything needs none."""

    @abstractmethod
    def verify(self, made: OutputContext) -> dict[str, Any]:
        """Read the files again, and compare them with the plan and with what was quantized. Returns plain values for
        the report."""
