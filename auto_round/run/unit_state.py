"""Serialize finished blocks for the journal: quantized layers as plain tensors and metadata, and back."""

from __future__ import annotations

import math
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch

from auto_round.algorithms.quantization.sign_round.config import SignRoundConfig
from auto_round.calibration.disk_store import DiskStore, DiskTensor
from auto_round.codecs.activation import ActivationQuantizer
from auto_round.codecs.quantized_layer import QuantizedLayer, codes_from_state
from auto_round.edits import TensorEdit, edit_from_state
from auto_round.errors import OutputError
from auto_round.modeling.partial_loading import expert_of
from auto_round.output.folders import free_bytes
from auto_round.report.run_report import BlockRecord
from auto_round.run.plan import LayerPlan
from auto_round.run.settings import Settings
from auto_round.schemes import QuantizationScheme

Tensors = dict[str, torch.Tensor]
_WIDTHS = (1, 2, 4)  # bits of packed codes
_CHUNK = 1 << 24  # codes that are packed at a time
_GB = 1e9


def layer_state(layer: QuantizedLayer) -> tuple[Tensors, dict[str, Any]]:
    """Split a layer into its tensors by field, and its other fields as plain values."""
    tensors: Tensors = {}
    metadata: dict[str, Any] = {}
    for item in fields(layer):
        value = getattr(layer, item.name)
        if isinstance(value, torch.Tensor):
            tensors[item.name] = value
        elif item.name == "codes":
            metadata["codes"] = layer.codes.state()
            tensors |= {f"codes.{name}": tensor for name, tensor in layer.codes.tensors().items()}
        elif isinstance(value, QuantizationScheme):
            metadata[item.name] = value.to_dict()
        else:
            metadata[item.name] = value
    moved = sorted(name for name, tensor in tensors.items() if tensor.device.type != "cpu")
    return tensors, metadata | ({"on_device": moved} if moved else {})


def layer_from_state(tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, Any], device: Any) -> QuantizedLayer:
    """Inverse of `layer_state`. Tensors that were on an accelerator are moved to `device`."""
    values = {key: value for key, value in metadata.items() if key not in ("on_device", "scheme")}
    moved = set(metadata.get("on_device", ()))
    placed = {name: tensor.to(device) if name in moved else tensor for name, tensor in tensors.items()}
    inner = {name.removeprefix("codes."): t for name, t in placed.items() if name.startswith("codes.")}
    values["codes"] = codes_from_state(inner, values["codes"])
    values |= {name: tensor for name, tensor in placed.items() if not name.startswith("codes.")}
    return QuantizedLayer(scheme=scheme_of(metadata), **values)


def activation_state(quantizer: ActivationQuantizer) -> tuple[Tensors, dict[str, Any]]:
    """Tensors and other fields of an input quantizer, without the scheme, which is the layer's."""
    values = {f.name: getattr(quantizer, f.name) for f in fields(quantizer) if f.name != "scheme"}
    tensors = {name: value for name, value in values.items() if isinstance(value, torch.Tensor)}
    return tensors, {name: value for name, value in values.items() if name not in tensors}


def activation_from_state(
    scheme: QuantizationScheme, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, Any]
) -> ActivationQuantizer:
    """Inverse of `activation_state`."""
    assert scheme.activations is not None
    return ActivationQuantizer(scheme.activations, **{**metadata, **tensors})


def scheme_of(metadata: Mapping[str, Any]) -> QuantizationScheme:
    """The scheme in a layer's metadata."""
    values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in metadata["scheme"].items()}
    return QuantizationScheme(**values)


def packed(tensors: Mapping[str, torch.Tensor]) -> tuple[Tensors, dict[str, list[Any]]]:
    """Pack uint8 tensors of small values into 1, 2 or 4 bits; also returns {name: [bits, shape]} of these."""
    result: Tensors = {}
    widths: dict[str, list[Any]] = {}
    for name, tensor in tensors.items():
        most = int(tensor.max()) if tensor.dtype == torch.uint8 and tensor.numel() else 256
        width = next((w for w in _WIDTHS if most < 1 << w), None)
        if width is None:
            result[name] = tensor
        else:
            result[name] = _pack(tensor.reshape(-1), width)
            widths[name] = [width, list(tensor.shape)]
    return result, widths


def unpacked(tensors: Mapping[str, torch.Tensor], widths: Mapping[str, Sequence[Any]]) -> Tensors:
    """Inverse of `packed`."""
    return {
        name: _unpack(tensor, *widths[name]) if name in widths else tensor.clone() for name, tensor in tensors.items()
    }


def _pack(codes: torch.Tensor, width: int) -> torch.Tensor:
    """uint8 [n] below 2**width as uint8 [n * width / 8], the first code in the lowest bits."""
    each = 8 // width
    parts = []
    for chunk in codes.split(_CHUNK):
        lanes = torch.nn.functional.pad(chunk, (0, -chunk.numel() % each)).view(-1, each)
        packed_lanes = lanes[:, 0].clone()
        for lane in range(1, each):
            packed_lanes |= lanes[:, lane] << (lane * width)
        parts.append(packed_lanes)
    return torch.cat(parts)


def _unpack(data: torch.Tensor, width: int, shape: Sequence[int]) -> torch.Tensor:
    each = 8 // width
    codes = torch.empty(data.numel(), each, dtype=torch.uint8)
    for lane in range(each):
        codes[:, lane] = (data >> (lane * width)) & ((1 << width) - 1)
    return codes.view(-1)[: math.prod(shape)].view(list(shape))


class LayersPerExpert(Sequence[QuantizedLayer], ABC):
    """Layers of a block whose experts are not all in memory: those of one expert are computed or read on access.

    Attributes:
        names: of all layers, in order.
        held: layers that are in memory, by name.
    """

    def __init__(self, names: Sequence[str], held: Mapping[str, QuantizedLayer]) -> None:
        self.names, self.held = list(names), held
        self._last: tuple[str, Mapping[str, QuantizedLayer]] = ("", {})

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(len(self))[index]]
        name = self.names[index]
        return self.held[name] if name in self.held else self._of(expert_of(name) or name)[name]

    def dense(self, expert: str) -> dict[str, torch.Tensor]:
        """Dequantized weights of one expert, float32 [out, in], by layer name."""
        return {name: layer.dequantize(torch.float32) for name, layer in self._of(expert).items()}

    def _of(self, expert: str) -> Mapping[str, QuantizedLayer]:
        if self._last[0] != expert:
            self._last = ("", {})
            self._last = expert, self._make(expert)
        return self._last[1]

    @abstractmethod
    def _make(self, expert: str) -> Mapping[str, QuantizedLayer]:
        """The layers of one expert, by name."""


@dataclass(frozen=True)
class StoredLayer:
    """A layer as the journal stores it: tensors with packed codes, their widths, and the other fields."""

    tensors: Mapping[str, torch.Tensor | DiskTensor]
    widths: Mapping[str, Sequence[Any]]
    metadata: Mapping[str, Any]

    @classmethod
    def of(cls, layer: QuantizedLayer, disk_store: DiskStore | None = None) -> StoredLayer:
        """Pack a layer; with `disk_store`, its tensors are written to that file."""
        own, metadata = layer_state(layer)
        tensors, widths = packed(own)
        if disk_store is None:
            return cls(tensors, widths, metadata)
        return cls({name: disk_store.put(t) if t.dim() else t for name, t in tensors.items()}, widths, metadata)

    @property
    def scheme(self) -> QuantizationScheme:
        return scheme_of(self.metadata)

    def layer(self, device: Any) -> QuantizedLayer:
        """Read and unpack the layer. Tensors that were on an accelerator are moved to `device`."""
        read = {name: t.read() if isinstance(t, DiskTensor) else t for name, t in self.tensors.items()}
        return layer_from_state(unpacked(read, self.widths), self.metadata, device)


class StoredLayers(LayersPerExpert):
    """Layers whose codes are in a file.

    Args:
        stored: layers that are not `held`, by name.
        device: of tensors that were on an accelerator.
    """

    def __init__(
        self, names: Sequence[str], held: Mapping[str, QuantizedLayer], stored: Mapping[str, StoredLayer], device: Any
    ) -> None:
        super().__init__(names, held)
        self._stored, self._device = stored, device

    def states(self) -> Iterator[StoredLayer]:
        """All layers in order, without reading them."""
        for name in self.names:
            yield StoredLayer.of(self.held[name]) if name in self.held else self._stored[name]

    def _make(self, expert: str) -> Mapping[str, QuantizedLayer]:
        own = [name for name in self.names if name not in self.held and (expert_of(name) or name) == expert]
        return {name: self._stored[name].layer(self._device) for name in own}


@dataclass
class Unit:
    """Results of a finished unit: a block, or all layers outside the blocks.

    Attributes:
        layers: the quantized layers.
        activations: input quantizer by layer.
        records: for the report.
        scales: static scales of attention, by tensor name.
        sums, tokens: sums of squares of the inputs by layer, and over how many tokens; empty unless an importance file
            is saved.
        unreached: layers that no calibration token reached.
        edits: edits of the transforms, by tensor name.
        nearest: layers that got the nearest codes instead of error feedback, with the reasons.
        numerics: `NumericsPolicy.state` after the unit.
    """

    layers: Sequence[QuantizedLayer] = field(default_factory=list)
    activations: Mapping[str, ActivationQuantizer] = field(default_factory=dict)
    records: list[BlockRecord] = field(default_factory=list)
    scales: Mapping[str, torch.Tensor] = field(default_factory=dict)
    sums: Mapping[str, torch.Tensor] = field(default_factory=dict)
    tokens: Mapping[str, int] = field(default_factory=dict)
    unreached: list[str] = field(default_factory=list)
    nearest: Mapping[str, str] = field(default_factory=dict)
    numerics: Mapping[str, Any] = field(default_factory=dict)
    edits: Mapping[str, TensorEdit] = field(default_factory=dict)


def unit_state(unit: Unit) -> tuple[dict[str, torch.Tensor | DiskTensor], dict[str, Any]]:
    """Tensors and metadata of a unit, with packed codes. Layers in a file are not read."""
    tensors: Tensors = {}
    layers, activations = [], {}
    stored: dict[str, torch.Tensor | DiskTensor] = {}
    widths: dict[str, Any] = {}
    states = unit.layers.states() if isinstance(unit.layers, StoredLayers) else map(StoredLayer.of, unit.layers)
    for number, layer in enumerate(states):
        layers.append(dict(layer.metadata))
        stored |= {f"layer.{number}.{name}": tensor for name, tensor in layer.tensors.items()}
        widths |= {f"layer.{number}.{name}": width for name, width in layer.widths.items()}
        name = layer.metadata["name"]
        if name in unit.activations:
            own, metadata = activation_state(unit.activations[name])
            activations[name] = metadata
            tensors |= {f"input.{number}.{leaf}": tensor for leaf, tensor in own.items()}
    tensors |= {f"scale.{name}": tensor for name, tensor in unit.scales.items()}
    tensors |= {f"sum.{name}": tensor for name, tensor in unit.sums.items()}
    for name, edit in unit.edits.items():
        tensors |= {f"edit.{kind}.{name}": tensor for kind, tensor in edit.state().items()}
    rest, more = packed(tensors)
    metadata = {
        "layers": layers, "activations": activations, "records": [asdict(record) for record in unit.records],
        "tokens": dict(unit.tokens), "unreached": unit.unreached, "nearest": dict(unit.nearest),
        "widths": widths | more, "numerics": dict(unit.numerics),
    }  # fmt: skip
    return stored | rest, metadata


def unit_from_state(given: Mapping[str, torch.Tensor | DiskTensor], metadata: Mapping[str, Any], device: Any) -> Unit:
    """Inverse of `unit_state`. Tensors that were on an accelerator are moved to `device`; layers in a file are read on
    access."""
    rest = {n: t.read() if isinstance(t, DiskTensor) else t for n, t in given.items() if not n.startswith("layer.")}
    tensors = unpacked(rest, metadata["widths"])

    def under(prefix: str) -> Tensors:
        return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}

    stored: dict[str, StoredLayer] = {}
    for number, own in enumerate(metadata["layers"]):
        prefix = f"layer.{number}."
        parts = {n.removeprefix(prefix): t for n, t in given.items() if n.startswith(prefix)}
        widths = {n.removeprefix(prefix): w for n, w in metadata["widths"].items() if n.startswith(prefix)}
        stored[own["name"]] = StoredLayer(parts, widths, own)
    in_file = any(isinstance(tensor, DiskTensor) for tensor in given.values())
    layers: Sequence[QuantizedLayer] = [] if in_file else [layer.layer(device) for layer in stored.values()]
    layers = StoredLayers(list(stored), {}, stored, device) if in_file else layers
    activations = {
        name: activation_from_state(stored[name].scheme, under(f"input.{n}."), metadata["activations"][name])
        for n, name in enumerate(stored)
        if name in metadata["activations"]
    }
    records = [BlockRecord(**record) for record in metadata["records"]]
    return Unit(
        layers, activations, records, under("scale."), under("sum."), dict(metadata["tokens"]),
        list(metadata["unreached"]), dict(metadata.get("nearest", {})), metadata.get("numerics", {}),
        {
            name: edit_from_state({kind: factors})
            for key, factors in under("edit.").items()
            for kind, _, name in (key.partition("."),)
        },
    )  # fmt: skip


def journal_bytes(layers: Mapping[str, LayerPlan], settings: Settings, width: int, itemsize: int) -> int:
    """Largest size of a run's journal: codes and scales of all layers, and the activations twice, since the new ones
    are written before the old ones are removed.

    Args:
        width: of the hidden states.
        itemsize: bytes per value of the hidden states.
    """
    codes = sum(stored_bytes(plan) for plan in layers.values() if plan.scheme.quantizes_weights)
    if not settings.needs_data:
        return codes
    algorithm = settings.algorithm
    streams = 2 if isinstance(algorithm, SignRoundConfig) and algorithm.enable_quanted_input else 1
    return codes + 2 * streams * settings.nsamples * settings.seqlen * width * itemsize


def stored_bytes(plan: LayerPlan) -> int:
    """Bytes of one layer's packed codes and of its scales in the journal."""
    bits, scales = plan.codec.stored_bytes(plan.out_features, plan.in_features)
    width = next((width for width in _WIDTHS if bits <= width), -(-bits // 8) * 8)
    return plan.out_features * plan.in_features * width // 8 + scales


def check_journal_disk(folder: Path, output: str | os.PathLike[str], needed: int, output_bytes: int) -> None:
    """Raise OutputError when the disk of the work space has less than `needed` bytes for the journal, plus
    `output_bytes` if the output folder is on the same disk."""
    free = free_bytes(folder)
    shared = _device(folder) == _device(Path(output))
    if free < needed + (output_bytes if shared else 0):
        besides = f" besides {output_bytes / _GB:.2f} GB for the output folder" if shared else ""
        raise OutputError(
            f"the journal in {folder.parent} needs {needed / _GB:.2f} GB{besides}, and its disk has "
            f"{free / _GB:.2f} GB free; set AR_WORK_SPACE to a folder on another disk, or do without a journal "
            "(--no_resume)"
        )


def _device(path: Path) -> int:
    path = path.expanduser().absolute()
    while not path.exists():
        path = path.parent
    return path.stat().st_dev
