"""Job: the resolved plan of a run (scheme of each layer, sizes, notes), including static KV-cache scales."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from auto_round import envs
from auto_round.calibration.observers import KVCacheObserver
from auto_round.codecs.base import Codec
from auto_round.codecs.kinds import codec_of
from auto_round.codecs.quantized_layer import QuantizedLayer
from auto_round.errors import UnsupportedError
from auto_round.formats.base import FP8_MAXIMUM, CacheScheme, ExportPlan, OutputFormat, TensorSpecs
from auto_round.modeling.attention import find_attention, head_counts, library_error, unrecognised_attention
from auto_round.modeling.config import read_value, text_config
from auto_round.modeling.layer_rules import is_routed_expert
from auto_round.modeling.source import ModelSource
from auto_round.report.memory import format_bytes
from auto_round.run.settings import Settings
from auto_round.schemes import QuantizationScheme

if TYPE_CHECKING:
    from auto_round.gguf.conversion import GgufPlan

_TOWERS = ("vision_config", "audio_config")
_SHOWN = 40  # layers that differ from the default scheme


@dataclass(frozen=True)
class CachePlan:
    """Static scales of the key-value cache: their scheme, and (query heads, key-value heads) of each attention module
    that gets them."""

    scheme: CacheScheme | None = None
    heads: Mapping[str, tuple[int, int]] = field(default_factory=dict)

    @property
    def queries(self) -> bool:
        return self.scheme is not None and self.scheme.queries is not None

    @classmethod
    def of(cls, source: ModelSource, scheme: CacheScheme | None) -> CachePlan:
        """The plan for a model. Raises UnsupportedError or LibraryError when no key-value cache is found."""
        if scheme is None:
            return cls()
        config = text_config(source.config)
        blocks = {block: source.model.get_submodule(block) for block in source.blocks}
        heads = {
            f"{block}.{attention.name}": head_counts(attention, config)
            for block, module in blocks.items()
            for attention in find_attention(module)
        }
        if not heads and (unknown := unrecognised_attention(list(blocks.values()))):
            raise library_error(
                f"{type(source.model).__name__} has attention ({', '.join(unknown)}), but no argument of it was "
                "recognised as its key-value cache",
                "leave static_kv_dtype and static_attention_dtype out",
            )
        if not heads:
            raise UnsupportedError(
                f"{type(source.model).__name__} has no attention with a key-value cache: leave static_kv_dtype and "
                "static_attention_dtype out"
            )
        return cls(scheme, heads)

    def specs(self, fmt: OutputFormat) -> TensorSpecs:
        """Shapes and dtypes of all scales in a format's files, by tensor name."""
        if (scheme := self.scheme) is None:
            return {}
        heads = lambda name, leaf: (self._count(name, leaf), *(fmt.cache_scale_tail or ()))
        return {
            f"{name}.{leaf}": ((1,) if scheme.granularity(leaf) == "tensor" else heads(name, leaf), torch.float32)
            for name in self.heads
            for leaf in scheme.leaves
        }

    def scales(self, block: str, seen: KVCacheObserver) -> dict[str, torch.Tensor]:
        """The scales of one block: largest value / 448, float32, a scalar or [heads]. A head of zeros gets 1."""
        made: dict[str, torch.Tensor] = {}
        for name in (n for n in self.heads if n.startswith(f"{block}.")):
            assert self.scheme is not None
            for leaf in self.scheme.leaves:
                largest = seen.of(f"{name.removeprefix(f'{block}.')}.{leaf[0]}", self._count(name, leaf))
                if self.scheme.granularity(leaf) == "tensor":
                    largest = largest.amax()
                scale = largest.cpu() / FP8_MAXIMUM
                made[f"{name}.{leaf}"] = torch.where(scale > 0, scale, torch.ones_like(scale))
        return made

    def _count(self, name: str, leaf: str) -> int:
        return self.heads[name][0 if leaf == "q_scale" else 1]


@dataclass(frozen=True)
class LayerPlan:
    """One linear layer and its scheme. `transposed`: the weight is stored as [in, out] (Conv1D). `reason`: why it is
    left unquantized, with 16 bits. `ggml`: its type in a GGUF file."""

    name: str
    scheme: QuantizationScheme
    out_features: int
    in_features: int
    bias_dtype: torch.dtype | None
    transposed: bool
    reason: str | None = None
    ggml: str | None = None

    @property
    def description(self) -> str:
        """The ggml type, or a short description of the scheme."""
        return self.ggml or self.scheme.describe()

    @property
    def quantized(self) -> bool:
        return self.scheme.quantizes_weights

    @property
    def weights(self) -> int:
        return self.out_features * self.in_features

    @cached_property
    def codec(self) -> Codec:
        """How the weight becomes codes."""
        return codec_of(self.scheme, self.ggml, self.in_features)

    def unquantized(self, reason: str) -> LayerPlan:
        """The same layer, left unquantized."""
        full = self.scheme.with_overrides({"bits": 16, "act_bits": 16})
        return replace(self, scheme=full, reason=reason, ggml=None)


@dataclass(frozen=True)
class MemoryPlan:
    """Estimated memory of a run, in bytes: peak of the process, of tensors on the device, activations in files, and RAM
    by phase; where the hidden states are ("ram", "device", "file"), and whether the experts of a block are read one at
    a time."""

    ram: int = 0
    vram: int = 0
    spilled: int = 0
    phases: Mapping[str, int] = field(default_factory=dict)
    streams: str = "ram"
    streams_experts: bool = False

    @property
    def largest_phase(self) -> str:
        return max(self.phases, key=lambda name: self.phases[name], default="")


@dataclass(frozen=True)
class Job:
    """The resolved plan of a run: schemes of all layers, sizes and memory, before any work is done.

    Attributes:
        used, fallback: the settings of the run, and what else than asked for is done, and why; "" for nothing.
        bytes_on_disk: bytes of the weights, by format.
        stored_names: checkpoint name by module name, if they differ; `stored_blocks`: those of the blocks.
        spare: checkpoint tensors that no module reads, with the reason; they are copied.
        skipped: weights of two or more dimensions in the blocks that are in no linear layer, with the reason.
        damaged: layers left unquantized because of NaN or Inf in the model, with the reason.
        file_identity: what else an interrupted run must have in common with this one to continue its files.
        tensors_at_a_time: of a model-free run, how many and how large, in words.
    """

    model: str
    used: Settings
    blocks: tuple[str, ...]
    layers: Mapping[str, LayerPlan]
    formats: tuple[str, ...]
    settings: Mapping[str, Any]
    scheme_name: str
    scheme: QuantizationScheme
    steps: int
    bytes_on_disk: Mapping[str, int]
    peak_ram: int
    peak_vram: int
    compute: str
    fallback: str = ""
    output_dir: str | None = None
    notes: tuple[str, ...] = ()
    model_type: str = ""
    embeddings: tuple[str, ...] = ()
    other_matrices: tuple[str, ...] = ()
    stored_as: str = ""
    cache: CachePlan = CachePlan()
    gguf: GgufPlan | None = None
    embedding_types: Mapping[str, tuple[QuantizationScheme, str | None]] = field(default_factory=dict)
    resumable: bool = False
    journal_bytes: int = 0
    memory_plan: MemoryPlan = MemoryPlan()
    stored_names: Mapping[str, str] = field(default_factory=dict)
    stored_blocks: tuple[str, ...] = ()
    spare: Mapping[str, str] = field(default_factory=dict)
    skipped: Mapping[str, str] = field(default_factory=dict)
    damaged: Mapping[str, str] = field(default_factory=dict)
    patterns: tuple[str, ...] = ()
    file_identity: Mapping[str, str] = field(default_factory=dict)
    tensors_at_a_time: str = ""

    def quantized(self) -> dict[str, LayerPlan]:
        return {name: plan for name, plan in self.layers.items() if plan.quantized}

    def with_unquantized(self, unquantized: Mapping[str, str]) -> Job:
        """The same job with further layers left unquantized, by name, with the reasons."""
        return replace(
            self, layers={n: p.unquantized(unquantized[n]) if n in unquantized else p for n, p in self.layers.items()}
        )

    def export_plan(self, fmt: OutputFormat) -> ExportPlan:
        """The plan for a format, with the names of its files."""
        own = fmt.checkpoint_names
        stored = lambda name: self.stored_names.get(name, name) if own else name
        # A reader could take these for quantized, though no module of this model has their tensors.
        spare = tuple(name.removesuffix(".weight") for name in self.spare if name.endswith(".weight"))
        return ExportPlan(
            self.scheme, {stored(name): plan.scheme for name, plan in self.layers.items()},
            (own and self.stored_blocks) or self.blocks, self.settings, model_type=self.model_type,
            embeddings=tuple(map(stored, self.embeddings)), other_matrices=tuple(map(stored, self.other_matrices)),
            spare=spare, patterns=self.patterns if own else (), cache=self.cache.scheme,
        )  # fmt: skip

    def to_dict(self) -> dict[str, Any]:
        """Plain values for report.json."""
        return {
            "model": self.model, **({"stored_as": self.stored_as} if self.stored_as else {}),
            "scheme": self.scheme_name, "default": self.scheme.describe(), "formats": list(self.formats),
            "settings": dict(self.settings), **({"fallback": self.fallback} if self.fallback else {}),
            "blocks": len(self.blocks),
            "layers": {n: p.description + (f" ({p.reason})" if p.reason else "") for n, p in self.layers.items()},
            **({"copied": dict(self.spare)} if self.spare else {}), "left": dict(self.skipped), "steps": self.steps,
            "bytes_on_disk": dict(self.bytes_on_disk), "compute": self.compute,
            **({"model_free": True} if self.tensors_at_a_time else {}),
        }  # fmt: skip

    def render(self) -> str:
        """The plan as text, for `--dry_run`."""
        memory, quantized = self.memory_plan, self.quantized()
        weights = sum(p.weights for p in quantized.values())
        journal = f"up to {format_bytes(self.journal_bytes)} in {envs.resume_folder()} (none with --no_resume)"
        most = f", libraries included; most of it in: {memory.largest_phase}" if memory.phases else ""
        cache = self.cache.scheme
        rows = [
            ("model", self.model),
            ("stored as", self.stored_as and f"{self.stored_as}; dequantized while it is read"),
            ("scheme", f"{self.scheme_name} ({self.scheme.describe()})"),
            ("blocks", f"{len(self.blocks)} ({self.blocks[0]} .. {self.blocks[-1]})" if self.blocks else "none"),
            ("layers", f"{len(quantized)} quantized of {len(self.layers)}, {weights / 1e6:.1f} M weights"),
            ("algorithm", ", ".join(f"{k}={v}" for k, v in self.settings.items() if v is not None)),
            ("attention", cache and cache.describe()),
            ("compute", self.compute),
            ("steps", f"{self.steps} in total" if self.steps else "none (rounding only)"),
            *((f"format {n}", f"{format_bytes(b)} of weights") for n, b in self.bytes_on_disk.items()),
            ("journal", self.journal_bytes and journal),
            ("output", self.output_dir),
            ("model-free", self.tensors_at_a_time),
            ("memory", f"about {format_bytes(self.peak_ram)}{most}"),
            ("GPU memory", self.peak_vram and f"about {format_bytes(self.peak_vram)}"),
            ("temporary files", memory.spilled and f"{format_bytes(memory.spilled)} of activations in AR_WORK_SPACE"),
            ("experts", memory.streams_experts and "read one at a time, and again for every format"),
        ]
        lines = [f"{name:<18} {text}" for name, text in rows if text]
        groups = Counter(p.description + (f": {p.reason}" if p.reason else "") for p in self.layers.values())
        lines += ["", "layers by scheme:"] + [f"  {count:>5}  {text}" for text, count in groups.most_common()]
        for text, count in Counter(self.skipped.values()).most_common():
            lines.append(f"  {count:>5}  other weights in the blocks, unquantized: {text}")
        different = [p for p in self.layers.values() if p.scheme != self.scheme]
        if different:
            lines += ["", "layers that differ from the default:"]
            lines += [f"  {p.name}: {p.description}{f' ({p.reason})' if p.reason else ''}" for p in different[:_SHOWN]]
            if len(different) > _SHOWN:
                lines.append(f"  and {len(different) - _SHOWN} more")
        notes = [self.fallback, *self.notes] if self.fallback else self.notes
        return "\n".join(lines + [f"note: {note}" for note in notes])

    def for_quantized(self, memory: Job, done: Mapping[str, QuantizedLayer]) -> Job:
        """The job that writes the layers `done`, which were quantized with the job `memory`. Raises UnsupportedError
        when its formats cannot hold one of them."""
        formats = ", ".join(self.formats)
        refused = sorted(set(done) - set(self.quantized()))
        if refused:
            raise UnsupportedError(
                f"{formats} cannot hold {len(refused)} of the quantized layers, such as {refused[0]}: "
                f"{self.layers[refused[0]].reason}; use quantize_and_save, which leaves them in full precision, or "
                "format fake"
            )
        for name, layer in done.items():
            if layer.codes.ggml not in (None, self.layers[name].ggml):
                raise UnsupportedError(
                    f"{formats} stores {name} as {self.layers[name].ggml}, and it is quantized as {layer.codes.ggml}; "
                    "use quantize_and_save, or the format of the scheme that was used"
                )
        unquantized = {name: memory.layers[name] for name in self.quantized() if name not in done}
        return replace(self, layers={**self.layers, **unquantized})


class LayerRules:
    """What the files of a run decide about its layers: without a GGUF file (`GgufRules`) nothing. `layer_config`: the
    entries that apply to linear layers."""

    file: GgufPlan | None = None

    def __init__(self, settings: Settings, source: ModelSource) -> None:
        self.settings, self.source = settings, source
        self.layer_config, self.quant_lm_head = settings.layer_config, settings.quant_lm_head

    def defaults(self, names: Sequence[str]) -> dict[str, QuantizationScheme]:
        """Schemes instead of the settings': in a preset with several widths, of all layers but routed experts."""
        mixed = self.settings.mixed
        if mixed is None:
            return {}
        multimodal = any(read_value(self.source.config, tower) is not None for tower in _TOWERS)
        bits = mixed.multimodal_other_bits if multimodal else mixed.other_bits
        other = self.settings.scheme.with_overrides({"bits": bits})
        return {name: other for name in names if not is_routed_expert(name)}

    def fitted(
        self, schemes: Mapping[str, QuantizationScheme], widths: Mapping[str, int]
    ) -> tuple[dict[str, QuantizationScheme], list[str]]:
        """Schemes that the files can hold, for layers whose rows have these widths, and notes for the user."""
        settings, mixed = self.settings, self.settings.mixed
        if mixed is None or any(map(is_routed_expert, schemes)):
            return dict(schemes), []
        return dict(schemes), [
            f"{settings.scheme_name} gives routed experts {settings.scheme.bits} bits, and this model has none: every "
            f"layer gets {mixed.other_bits}"
        ]

    def unquantized_reason(self, name: str) -> str | None:
        """Why the files cannot hold a layer quantized, or None."""
        return None

    def settled(self, layers: Mapping[str, LayerPlan]) -> tuple[dict[str, LayerPlan], list[str]]:
        """The plans with the type that each layer has in the files, and notes for the user."""
        return (dict(layers) if self.settings.scheme.super_bits is None else with_types(layers)), []

    def embedding_types(self) -> dict[str, tuple[QuantizationScheme, str | None]]:
        """Scheme and ggml type of each embedding, if the files have types for them."""
        return {}

    def check_damaged(self, damaged: Mapping[str, str]) -> None:
        """Raise NumericsError when a tensor that holds NaN or Inf would be stored quantized, though it is no layer."""

    def nbytes(self, fmt: OutputFormat) -> int | None:
        """Bytes of a format's tensors, if they are not those of its layout."""
        return None

    def identity(self) -> dict[str, str]:
        """See `Job.file_identity`."""
        return {}


def with_types(layers: Mapping[str, LayerPlan]) -> dict[str, LayerPlan]:
    """The plans with the ggml type of each layer."""
    kinds = {name: codec_of(plan.scheme).ggml_type if plan.quantized else None for name, plan in layers.items()}
    return {name: replace(p, ggml=None if (k := kinds[name]) is None else k.name) for name, p in layers.items()}


def embedding_names(source: ModelSource) -> tuple[str, ...]:
    """The model's embeddings."""
    return tuple(name for name, m in source.model.named_modules() if isinstance(m, nn.Embedding))
