"""Serialize finished blocks for the journal: quantized layers as plain tensors and metadata, and back."""

from __future__ import annotations

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
from auto_round.codecs.ggml.types import GGML_TYPES, GgmlBlocks
from auto_round.codecs.quantized_layer import QuantizedLayer, group_count
from auto_round.edits import TensorEdit, edit_from_state
from auto_round.errors import OutputError
from auto_round.modeling.partial_loading import expert_of
from auto_round.output.folders import free_bytes
from auto_round.report.run_report import BlockRecord
from auto_round.run.plan import LayerPlan
from auto_round.run.settings import Settings
from auto_round.schemes import QuantizationScheme

Tensors = dict[str, torch.Tensor]
_WIDTHS = (1, 2, 4)
_AT_ONCE = 1 << 24


def layer_state(layer: QuantizedLayer) -> tuple[Tensors, dict[str, Any]]:
    """Tensors by field, and the fields that are none."""
    tensors: Tensors = {}
    metadata: dict[str, Any] = {}
    for item in fields(layer):
        value = getattr(layer, item.name)
        if isinstance(value, torch.Tensor):
            tensors[item.name] = value
        elif isinstance(value, GgmlBlocks):
            metadata["blocks"] = value.kind.name
            inner = {f.name: getattr(value, f.name) for f in fields(value) if f.name != "kind"}
            tensors |= {f"blocks.{name}": t for name, t in inner.items() if t is not None}
        elif isinstance(value, QuantizationScheme):
            metadata[item.name] = value.to_dict()
        else:
            metadata[item.name] = value
    moved = sorted(name for name, tensor in tensors.items() if tensor.device.type != "cpu")
    return tensors, metadata | ({"on_device": moved} if moved else {})


def layer_from_state(tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, Any], device: Any) -> QuantizedLayer:
    """The layer. What lay on an accelerator goes to `device`."""
    values = {key: value for key, value in metadata.items() if key not in ("on_device", "scheme")}
    moved = set(metadata.get("on_device", ()))
    placed = {name: tensor.to(device) if name in moved else tensor for name, tensor in tensors.items()}
    kind = values.pop("blocks", None)
    if kind is not None:
        inner = {name.removeprefix("blocks."): t for name, t in placed.items() if name.startswith("blocks.")}
        values["blocks"] = GgmlBlocks(GGML_TYPES[kind], **inner)
    values |= {name: tensor for name, tensor in placed.items() if not name.startswith("blocks.")}
    return QuantizedLayer(scheme=scheme_of(metadata), **values)


def activation_state(quantizer: ActivationQuantizer) -> tuple[Tensors, dict[str, Any]]:
    """What calibration fixed of a layer's inputs. Their scheme is the layer's."""
    values = {f.name: getattr(quantizer, f.name) for f in fields(quantizer) if f.name != "scheme"}
    tensors = {name: value for name, value in values.items() if isinstance(value, torch.Tensor)}
    return tensors, {name: value for name, value in values.items() if name not in tensors}


def activation_from_state(
    scheme: QuantizationScheme, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, Any]
) -> ActivationQuantizer:
    """The step of a layer's inputs."""
    assert scheme.activations is not None
    return ActivationQuantizer(scheme.activations, **{**metadata, **tensors})


def scheme_of(metadata: Mapping[str, Any]) -> QuantizationScheme:
    """The scheme among a layer's facts."""
    values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in metadata["scheme"].items()}
    return QuantizationScheme(**values)


def packed(tensors: Mapping[str, torch.Tensor]) -> tuple[Tensors, dict[str, list[Any]]]:
    """Tensors for a file: those of bytes that need fewer bits in 1, 2 or 4 of them, and how those are to be read."""
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
    """What `packed` was given."""
    return {
        name: _unpack(tensor, *widths[name]) if name in widths else tensor.clone() for name, tensor in tensors.items()
    }


def _pack(codes: torch.Tensor, width: int) -> torch.Tensor:
    """uint8 [n] below 2**width as uint8 [n * width / 8], the first code in the lowest bits."""
    each = 8 // width
    parts = []
    for piece in codes.split(_AT_ONCE):
        if piece.numel() % each:
            piece = torch.cat([piece, piece.new_zeros(each - piece.numel() % each)])
        lanes = piece.view(-1, each)
        whole = lanes[:, 0].clone()
        for lane in range(1, each):
            whole |= lanes[:, lane] << (lane * width)
        parts.append(whole)
    return torch.cat(parts)


def _unpack(data: torch.Tensor, width: int, shape: Sequence[int]) -> torch.Tensor:
    each = 8 // width
    codes = torch.empty(data.numel(), each, dtype=torch.uint8)
    for lane in range(each):
        codes[:, lane] = (data >> (lane * width)) & ((1 << width) - 1)
    count = 1
    for size in shape:
        count *= size
    return codes.view(-1)[:count].view(list(shape))


# The layers of a block whose experts are not in memory: one expert's are made, or read, as they are reached.


class LayersPerExpert(Sequence[QuantizedLayer], ABC):
    """The layers in order; those of an expert are held until the next one's are reached.

    Attributes:
        names: of all layers.
        held: those that are in memory, by name.
    """

    def __init__(self, names: Sequence[str], held: Mapping[str, QuantizedLayer]) -> None:
        self.names, self.held = list(names), held
        self._last: tuple[str, Mapping[str, QuantizedLayer]] = ("", {})

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[place] for place in range(len(self))[index]]
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
    """A layer as the journal has it: tensors, codes packed, how those are to be read, and the fields that are no
    tensors."""

    tensors: Mapping[str, torch.Tensor | DiskTensor]
    widths: Mapping[str, Sequence[Any]]
    metadata: Mapping[str, Any]

    @classmethod
    def of(cls, layer: QuantizedLayer, disk_store: DiskStore | None = None) -> StoredLayer:
        """With `disk_store`, its tensors go to that file."""
        own, metadata = layer_state(layer)
        tensors, widths = packed(own)
        if disk_store is None:
            return cls(tensors, widths, metadata)
        return cls({name: disk_store.put(t) if t.dim() else t for name, t in tensors.items()}, widths, metadata)

    @property
    def scheme(self) -> QuantizationScheme:
        return scheme_of(self.metadata)

    def layer(self, device: Any) -> QuantizedLayer:
        """What lay on an accelerator goes to `device`."""
        read = {name: t.read() if isinstance(t, DiskTensor) else t for name, t in self.tensors.items()}
        return layer_from_state(unpacked(read, self.widths), self.metadata, device)


class StoredLayers(LayersPerExpert):
    """Layers whose codes lie in a file.

    Args:
        stored: by name, those that are not `held`.
        device: where to read what came from an accelerator.
    """

    def __init__(
        self, names: Sequence[str], held: Mapping[str, QuantizedLayer], stored: Mapping[str, StoredLayer], device: Any
    ) -> None:
        super().__init__(names, held)
        self._stored, self._device = stored, device

    def states(self) -> Iterator[StoredLayer]:
        """All of them in order, without reading any."""
        for name in self.names:
            yield StoredLayer.of(self.held[name]) if name in self.held else self._stored[name]

    def _make(self, expert: str) -> Mapping[str, QuantizedLayer]:
        own = [name for name in self.names if name not in self.held and (expert_of(name) or name) == expert]
        return {name: self._stored[name].layer(self._device) for name in own}


def as_stored_layers(layers: Sequence[QuantizedLayer]) -> Iterator[StoredLayer]:
    """Layers as the journal has them."""
    if isinstance(layers, StoredLayers):
        return layers.states()
    return (StoredLayer.of(layer) for layer in layers)


# What one finished unit left - a block, or what is outside the blocks - as tensors and facts for the journal.


@dataclass
class Unit:
    """A finished unit.

    Attributes:
        layers: as the sinks get them.
        activations: by layer, how its inputs are quantized.
        records: for the report.
        scales: static scales of attention, by tensor name.
        sums, tokens: by layer, the sums of squares of its inputs, and over how many tokens; empty unless they are
            saved at the end.
        unreached: layers that no calibration token reached.
        edits: by tensor name, what transforms did to it.
        nearest: layers that got the nearest codes where error feedback was asked for, with the reasons.
        numbers: what had come of NaN and Inf by then, as `NumericsPolicy.state` has it.
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
    """Tensors and facts of a unit, codes packed. What is in a file is not read."""
    tensors: Tensors = {}
    layers, activations = [], {}
    stored: dict[str, torch.Tensor | DiskTensor] = {}
    widths: dict[str, Any] = {}
    for number, layer in enumerate(as_stored_layers(unit.layers)):
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
    """The unit. Tensors that lay on an accelerator go to `device`. Layers in a file are read as they are reached."""
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
        layers,
        activations,
        records,
        under("scale."),
        under("sum."),
        dict(metadata["tokens"]),
        list(metadata["unreached"]),
        dict(metadata.get("nearest", {})),
        metadata.get("numerics", {}),
        {
            name: edit_from_state({kind: factors})
            for key, factors in under("edit.").items()
            for kind, _, name in (key.partition("."),)
        },
    )


# How large a journal becomes, before there is one.

_GB = 1e9


def journal_bytes(layers: Mapping[str, LayerPlan], settings: Settings, width: int, itemsize: int) -> int:
    """Most bytes that a run's journal takes: codes of all layers with their scales, and the activations twice, since
    the new ones are written before the old ones go.

    Args:
        width: of the hidden states.
        itemsize: bytes of one of their values.
    """
    codes = sum(stored_bytes(plan) for plan in layers.values() if plan.scheme.quantizes_weights)
    if not settings.needs_data:
        return codes
    algorithm = settings.algorithm
    streams = 2 if isinstance(algorithm, SignRoundConfig) and algorithm.enable_quanted_input else 1
    return codes + 2 * streams * settings.nsamples * settings.seqlen * width * itemsize


def stored_bytes(plan: LayerPlan) -> int:
    """Bytes of one layer's codes, packed, and of its scales."""
    weights = plan.out_features * plan.in_features
    if plan.ggml is not None:
        kind = GGML_TYPES[plan.ggml]
        parts = 2 * plan.in_features // kind.group  # integer scales and minima, a byte each
        return weights * _width(kind.bits) // 8 + plan.out_features * (parts + 4 * plan.in_features // kind.block)
    scheme = plan.scheme
    size = scheme.group_size if isinstance(scheme.group_size, int) else scheme.group_size[1]
    groups = plan.out_features * group_count(plan.in_features, size)
    return weights * _width(scheme.bits) // 8 + groups * (4 + (0 if scheme.sym else 1))


def _width(bits: int) -> int:
    """Bits that a code takes in the journal."""
    return next(width for width in (1, 2, 4, 8) if bits <= width or width == 8)


def check_journal_disk(folder: Path, output: str | os.PathLike[str], needed: int, output_bytes: int) -> None:
    """Raise OutputError when the disk of the work space has no room for `needed` bytes of journal, besides
    `output_bytes` where the output folder is on it too."""
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
