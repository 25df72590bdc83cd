"""Job: the resolved plan of a run (scheme of each layer, sizes, notes), including static KV-cache scales."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
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
from auto_round.formats.base import ExportPlan, OutputFormat, TensorSpecs
from auto_round.formats.cache_scales import FP8_MAXIMUM, CacheScheme
from auto_round.modeling.attention import Attention, find_attention, head_counts, library_error, unrecognised_attention
from auto_round.modeling.config import text_config
from auto_round.modeling.source import ModelSource
from auto_round.report.memory import format_bytes
from auto_round.schemes import QuantizationScheme

if TYPE_CHECKING:
    from auto_round.formats.base import OutputFormat
    from auto_round.gguf.plan import GgufPlan


@dataclass(frozen=True)
class CachePlan:
    """Attention modules that get static scales of the key-value cache.

    Attributes:
        scheme: which scales.
        heads: (query heads, key-value heads) by the module's full name.
    """

    scheme: CacheScheme
    heads: Mapping[str, tuple[int, int]]

    @property
    def queries(self) -> bool:
        return self.scheme.queries is not None

    def attentions(self, block: nn.Module) -> list[Attention]:
        """Attention modules to observe while a block runs."""
        return find_attention(block)

    def specs(self, fmt: OutputFormat) -> TensorSpecs:
        """Shapes and dtypes of all scales in a format's files, by tensor name."""
        heads = lambda name, leaf: (self._count(name, leaf), *(fmt.cache_scale_tail or ()))
        return {
            f"{name}.{leaf}": ((1,) if self.scheme.granularity(leaf) == "tensor" else heads(name, leaf), torch.float32)
            for name in self.heads
            for leaf in self.scheme.leaves
        }

    def scales(self, block: str, seen: KVCacheObserver) -> dict[str, torch.Tensor]:
        """The scales of one block: largest value / 448, float32, a scalar or [heads]. A head of zeros gets 1.

        Raises:
            UnsupportedError: an attention module was not observed, or has an unexpected number of heads.
            LibraryError: it was not observed although its code takes a cache.
            NumericsError: NaN or Inf in its states.
        """
        made: dict[str, torch.Tensor] = {}
        for name in (n for n in self.heads if n.startswith(f"{block}.")):
            for leaf in self.scheme.leaves:
                largest = seen.of(f"{name.removeprefix(f'{block}.')}.{leaf[0]}", self._count(name, leaf))
                if self.scheme.granularity(leaf) == "tensor":
                    largest = largest.amax()
                scale = largest.cpu() / FP8_MAXIMUM
                made[f"{name}.{leaf}"] = torch.where(scale > 0, scale, torch.ones_like(scale))
        return made

    def _count(self, name: str, leaf: str) -> int:
        return self.heads[name][0 if leaf == "q_scale" else 1]


def stored_scale(fmt: OutputFormat, scale: torch.Tensor) -> torch.Tensor:
    """A scale with the shape that a format stores: [1], or one per head."""
    return scale.reshape(1) if scale.dim() == 0 else scale.reshape(-1, *(fmt.cache_scale_tail or ()))


def plan_cache(source: ModelSource, scheme: CacheScheme | None) -> CachePlan | None:
    """The plan for a model, None without a scheme.

    Raises:
        UnsupportedError: the model has no attention with a key-value cache.
        LibraryError: it has attention, but no argument of it was recognised as a cache.
    """
    if scheme is None:
        return None
    config = text_config(source.config)
    heads = {
        f"{block}.{attention.name}": head_counts(attention, config)
        for block in source.blocks
        for attention in find_attention(source.model.get_submodule(block))
    }
    blocks = [source.model.get_submodule(block) for block in source.blocks]
    if not heads and (unknown := unrecognised_attention(blocks)):
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
    return CachePlan(scheme, heads)


@dataclass(frozen=True)
class LayerPlan:
    """One linear layer and its scheme.

    Attributes:
        transposed: the weight is stored as [in, out] (Conv1D).
        reason: why the layer is left unquantized; its scheme then has 16 bits.
        ggml: its type in a GGUF file.
    """

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
    """Estimated memory of a run, in bytes.

    Attributes:
        ram: peak resident memory, libraries included.
        vram: peak memory of tensors on the device.
        spilled: activations in files.
        phases: peak RAM by phase.
        activations: one stream of hidden states.
        streams: storage of the hidden states: "ram", "device" or "file".
        streams_experts: whether the experts of a block are read one at a time.
        codes: codes of one block's experts in a file, if they are tuned one at a time.
    """

    ram: int = 0
    vram: int = 0
    spilled: int = 0
    phases: Mapping[str, int] = field(default_factory=dict)
    activations: int = 0
    streams: str = "ram"
    streams_experts: bool = False
    codes: int = 0


@dataclass(frozen=True)
class Job:
    """The resolved plan of a run: schemes of all layers, sizes and memory, before any work is done.

    Attributes:
        model: name or path of the source.
        blocks: block names in order.
        layers: every linear layer of the model, by name.
        formats: names of the output formats, in order.
        settings: the settings as plain values.
        scheme_name, scheme: the default scheme.
        steps: tuning steps over all blocks.
        bytes_on_disk: bytes of the weights, by format.
        peak_ram, peak_vram: estimated peak memory in bytes, libraries included.
        compute: device and dtype of the matrix products.
        model_type: of the model's config.
        embeddings: module names of the embeddings.
        other_matrices: names of modules outside `layers` with a matrix as weight, without embeddings.
        stored_as: description of the source's quantization; "" for an unquantized source.
        cache: plan of static scales of keys, values and queries.
        gguf: plan of the GGUF file, for a GGUF format.
        resumable: an interrupted run can be continued.
        journal_bytes: largest size of the journal in the work space; 0 without one.
        memory_plan: storage of the activations, and memory by phase.
        stored_names: checkpoint name by module name, if they differ.
        stored_blocks: the blocks' names in the checkpoint.
        spare: checkpoint tensors that no module reads, with the reason; they are copied.
        skipped: by tensor name, weights of two or more dimensions in the blocks that are in no linear layer, with the
            reason why they are left unquantized.
        patterns: regular expressions of the layer configuration, in order.
    """

    model: str
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
    output_dir: str | None = None
    notes: tuple[str, ...] = field(default_factory=tuple)
    model_type: str = ""
    embeddings: tuple[str, ...] = ()
    other_matrices: tuple[str, ...] = ()
    stored_as: str = ""
    cache: CachePlan | None = None
    gguf: GgufPlan | None = None
    resumable: bool = False
    journal_bytes: int = 0
    memory_plan: MemoryPlan = MemoryPlan()
    stored_names: Mapping[str, str] = field(default_factory=dict)
    stored_blocks: tuple[str, ...] = ()
    spare: Mapping[str, str] = field(default_factory=dict)
    skipped: Mapping[str, str] = field(default_factory=dict)
    patterns: tuple[str, ...] = ()

    def quantized(self) -> dict[str, LayerPlan]:
        return {name: plan for name, plan in self.layers.items() if plan.scheme.quantizes_weights}

    def with_unquantized(self, unquantized: Mapping[str, str]) -> Job:
        """The same job with further layers left unquantized, by name, with the reasons."""
        return replace(
            self, layers={n: p.unquantized(unquantized[n]) if n in unquantized else p for n, p in self.layers.items()}
        )

    def export_plan(self, fmt: OutputFormat) -> ExportPlan:
        """The plan for a format, with the names of its files: the checkpoint's, or the modules' for formats with their
        own naming rules."""
        schemes = {name: plan.scheme for name, plan in self.layers.items()}
        # A reader could take these for quantized, though no module of this model has their tensors.
        spare = tuple(name.removesuffix(".weight") for name in self.spare if name.endswith(".weight"))
        plan = ExportPlan(
            self.scheme, schemes, self.blocks, self.settings, model_type=self.model_type, embeddings=self.embeddings,
            other_matrices=self.other_matrices, spare=spare, cache=None if self.cache is None else self.cache.scheme,
        )  # fmt: skip
        if not fmt.checkpoint_names:
            return plan
        stored = lambda name: self.stored_names.get(name, name)
        return replace(
            plan, layers={stored(name): scheme for name, scheme in schemes.items()},
            block_names=self.stored_blocks or self.blocks, embeddings=tuple(map(stored, self.embeddings)),
            other_matrices=tuple(map(stored, self.other_matrices)), patterns=self.patterns,
        )  # fmt: skip

    def to_dict(self) -> dict[str, Any]:
        """Plain values for report.json."""
        return {
            "model": self.model,
            **({"stored_as": self.stored_as} if self.stored_as else {}),
            "scheme": self.scheme_name,
            "default": self.scheme.describe(),
            "formats": list(self.formats),
            "settings": dict(self.settings),
            "blocks": len(self.blocks),
            "layers": {n: p.description + (f" ({p.reason})" if p.reason else "") for n, p in self.layers.items()},
            **({"copied": dict(self.spare)} if self.spare else {}),
            "left": dict(self.skipped),
            "steps": self.steps,
            "bytes_on_disk": dict(self.bytes_on_disk),
            "compute": self.compute,
        }

    def render(self) -> str:
        """The plan as text, for `--dry_run`."""
        memory = self.memory_plan
        most = max(memory.phases, key=lambda name: memory.phases[name]) if memory.phases else ""
        weights = sum(p.out_features * p.in_features for p in self.quantized().values())
        rows = [
            ("model", self.model),
            *([("stored as", f"{self.stored_as}; dequantized while it is read")] if self.stored_as else []),
            ("scheme", f"{self.scheme_name} ({self.scheme.describe()})"),
            ("blocks", f"{len(self.blocks)} ({self.blocks[0]} .. {self.blocks[-1]})" if self.blocks else "none"),
            ("layers", f"{len(self.quantized())} quantized of {len(self.layers)}, {weights / 1e6:.1f} M weights"),
            ("algorithm", ", ".join(f"{k}={v}" for k, v in self.settings.items() if v is not None)),
            *([("attention", self.cache.scheme.describe())] if self.cache else []),
            ("compute", self.compute),
            ("steps", f"{self.steps} in total" if self.steps else "none (rounding only)"),
        ]
        rows += [(f"format {n}", f"{format_bytes(b)} of weights") for n, b in self.bytes_on_disk.items()]
        if self.journal_bytes:
            size = format_bytes(self.journal_bytes)
            rows.append(("journal", f"up to {size} in {envs.resume_folder()} (none with --no_resume)"))
        if self.output_dir:
            rows.append(("output", self.output_dir))
        parts = f", libraries included; most of it in: {most}" if most else ""
        rows.append(("memory", f"about {format_bytes(self.peak_ram)}{parts}"))
        if self.peak_vram:
            rows.append(("GPU memory", f"about {format_bytes(self.peak_vram)}"))
        if memory.spilled:
            rows.append(("temporary files", f"{format_bytes(memory.spilled)} of activations in AR_WORK_SPACE"))
        if memory.codes:
            rows.append(("and", f"{format_bytes(memory.codes)} of codes of one block's experts"))
        if memory.streams_experts:
            alone = "tuned one at a time, after the other layers of their block"
            rows.append(("experts", alone if self.steps else "read one at a time, and again for every format"))
        lines = [f"{name:<18} {text}" for name, text in rows]
        groups = Counter(p.description + (f": {p.reason}" if p.reason else "") for p in self.layers.values())
        lines += ["", "layers by scheme:"] + [f"  {count:>5}  {text}" for text, count in groups.most_common()]
        others = Counter(self.skipped.values())
        lines += [
            f"  {count:>5}  other weights in the blocks, unquantized: {text}" for text, count in others.most_common()
        ]
        different = [p for p in self.layers.values() if p.scheme != self.scheme]
        shown = different[:40]
        if shown:
            lines += ["", "layers that differ from the default:"]
            lines += [f"  {p.name}: {p.description}{f' ({p.reason})' if p.reason else ''}" for p in shown]
            if len(different) > len(shown):
                lines.append(f"  and {len(different) - len(shown)} more")
        lines += [f"note: {note}" for note in self.notes]
        return "\n".join(lines)


def plan_for_quantized(job: Job, memory: Job, done: Mapping[str, QuantizedLayer]) -> Job:
    """Adapt `job` to write the layers `done` that are quantized already; `memory` is the job that they were quantized
    with. Raises UnsupportedError when its formats cannot hold one of them."""
    refused = sorted(set(done) - set(job.quantized()))
    if refused:
        raise UnsupportedError(
            f"{', '.join(job.formats)} cannot hold {len(refused)} of the quantized layers, such as {refused[0]}: "
            f"{job.layers[refused[0]].reason}; use quantize_and_save, which leaves them in full precision, or format "
            "fake"
        )
    other = [name for name, layer in done.items() if layer.codes.ggml not in (None, job.layers[name].ggml)]
    if other:
        raise UnsupportedError(
            f"{', '.join(job.formats)} stores {other[0]} as {job.layers[other[0]].ggml}, and it is quantized as "
            f"{done[other[0]].codes.ggml}; use quantize_and_save, or the format of the scheme that was used"
        )
    unquantized = {name: memory.layers[name] for name in job.quantized() if name not in done}
    return replace(job, layers={**job.layers, **unquantized})
