"""Build a Job from settings and a model: resolve schemes, ask the formats, add up sizes. Reads no weights."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import gcd, prod
from typing import Any

import torch

from auto_round.calibration.data.spec import parse_dataset_string
from auto_round.codecs.activation import activation_function
from auto_round.codecs.kinds import codec_of
from auto_round.errors import ConfigError, UnsupportedError, nearest
from auto_round.formats.base import (
    OutputFormat,
    available_formats,
    get_format,
    require_cache,
    require_plan,
    require_scheme,
    slow_kernel_notes,
)
from auto_round.formats.no_config import GgufFormat
from auto_round.inference.linear import compute_dtype_for
from auto_round.layer_config import matching_layers, pattern_regex, resolve_layers, scheme_from_entry
from auto_round.layouts.integers import stored_group_size
from auto_round.modeling import layer_rules
from auto_round.modeling.blocks import get_lm_head_name, is_conv1d, linear_names, weight_2d
from auto_round.modeling.config import largest
from auto_round.modeling.source import ModelSource
from auto_round.run.file_layout import plan_files
from auto_round.run.folders import journal_bytes, split_runs
from auto_round.run.gguf import GgufRules
from auto_round.run.keywords import no_zero_point, symmetric_if_required, without_tuning
from auto_round.run.memory import BudgetError, MemoryModel
from auto_round.run.plan import CachePlan, Job, LayerPlan, LayerRules, embedding_names
from auto_round.run.settings import Settings, parse_scale_dtype
from auto_round.schemes import QuantizationScheme

_MTP = "it belongs to multi-token prediction"
_NO_NAMES = "checkpoints of this model type store all experts of a block in one tensor, and readers know no other names"
_ASKED = "layer_config, ignore_layers or the scheme ask for full precision"
# Below this group size kernels have no support, and scales would take as much as two bits per weight.
_MIN_GROUP_SIZE = 32
_TOLERANCE = 1.02  # what libraries hold differs by this much from one start to the next

Schemes = dict[str, QuantizationScheme]


def compute_dtype(settings: Settings, source: ModelSource) -> torch.dtype:
    """Dtype of matrix products: with amp bfloat16 if the device supports it natively, else float32."""
    if not settings.amp:
        return torch.float32
    return torch.bfloat16 if settings.device.type != "cpu" else compute_dtype_for("cpu", torch.bfloat16)


def check_data_type(scheme: QuantizationScheme, what: str) -> None:
    """Raise ConfigError or UnsupportedError when this version cannot quantize to `scheme`."""
    if not scheme.quantizes_weights:
        return
    if scheme.rotation_config is not None:
        raise UnsupportedError(f"{what}: rotation_config is not available in this version; leave it out")
    if (problem := codec_of(scheme).problem()) is not None:
        raise ConfigError(f"{what}: {problem}")
    activations = scheme.activations
    if activations is None:
        return
    activation_function(activations)
    size, input_codec = activations.group_size, codec_of(activations)
    if not isinstance(size, int):
        raise ConfigError(f"{what}: act_group_size={size} is a block; use -1, 0 or a positive number")
    if (problem := input_codec.problem()) is not None:
        raise ConfigError(f"{what}: act_{problem}")
    if not activations.dynamic and size > 0:
        raise UnsupportedError(
            f"{what}: act_group_size={size} with act_dynamic=False: a static scale is one for the whole layer; use "
            "act_group_size 0 or -1"
        )


def check_before_opening(settings: Settings, formats: Sequence[OutputFormat] | None) -> None:
    """Raise ConfigError or UnsupportedError as far as settings and formats can be checked without a model."""
    check_data_type(settings.scheme, f"scheme {settings.scheme_name}")
    for name, entry in settings.layer_config.items():
        own = entry.get("scale_dtype") if isinstance(entry, Mapping) else None
        if own is not None and parse_scale_dtype(own) is not settings.scale_dtype:
            raise UnsupportedError(f"layer_config[{name!r}]: scale_dtype is one for the whole model; leave it out here")
        scheme, _ = symmetric_if_required(scheme_from_entry(name, entry, settings.scheme))
        check_data_type(scheme, f"layer_config[{name!r}]")
    if isinstance(settings.dataset, str):
        parse_dataset_string(settings.dataset)
    for own_settings, group in split_runs(settings, formats or (), quiet=True):
        for fmt in group:
            require_scheme(fmt, own_settings.scheme, f"scheme {own_settings.scheme_name}")


def make_job(
    settings: Settings, source: ModelSource, formats: Sequence[OutputFormat], output_dir: str | None = None,
    fit: bool = True, tokenizer: Any = None, damaged: Mapping[str, str] | None = None, in_memory: bool = False,
    tune: bool | None = None,
) -> Job:  # fmt: skip
    """Resolve the schemes of all layers, the storage of activations, and the sizes of the output.

    Blocks with experts that do not fit into `max_memory` while they are tuned get codes by GPTQ instead, if
    necessary with one expert in memory at a time.

    Args:
        fit: shrink groups that a format cannot hold; False when the layers are quantized already.
        damaged: tensors with NaN or Inf that stay unquantized, and what they hold.
        in_memory: the quantized layers stay in memory.
        tune: whether an interrupted run tunes its blocks. The same is done again if it fits, or nearly fits.

    Raises ConfigError, UnsupportedError or NumericsError for settings that this model or these formats do not allow.
    """
    given = source, formats, output_dir, fit, tokenizer, damaged or {}, in_memory
    if not (settings.tunes and source.streams_experts_of(_block_linears(source))):
        return _make_job(settings, *given)
    limit: BudgetError | None = None
    if tune is not False:
        try:
            return _make_job(settings, *given, 1.0 if tune is None else _TOLERANCE)
        except BudgetError as error:
            limit = error
    try:
        job = _make_job(without_tuning(settings), *given)
    except BudgetError:
        raise
    except ConfigError as error:  # GPTQ may have no codes to choose
        raise limit or error from None
    why = "as in the interrupted run" if limit is None else f"tuning needs max_memory={limit.needed}"
    return replace(job, fallback=f"{settings.algorithm_name} is replaced by GPTQ without tuning: {why}")


def _make_job(
    settings: Settings, source: ModelSource, formats: Sequence[OutputFormat], output_dir: str | None, fit: bool,
    tokenizer: Any, damaged: Mapping[str, str], in_memory: bool, tolerance: float = 1.0,
) -> Job:  # fmt: skip
    check_data_type(settings.scheme, f"scheme {settings.scheme_name}")
    for fmt in formats:
        require_scheme(fmt, settings.scheme, f"scheme {settings.scheme_name}")
        if settings.cache is not None:
            require_cache(fmt, settings.cache)
        if fmt.scale_dtype not in (None, settings.scale_dtype):
            raise UnsupportedError(
                f"format {fmt.name!r} stores scales as {fmt.scale_dtype}, not {settings.scale_dtype}; leave "
                "scale_dtype out, or use format fake"
            )
    cache = CachePlan.of(source, settings.cache)
    notes = _model_notes(formats, source)
    blocks = select_blocks(settings, source.blocks)
    weights = layer_rules.block_weights(source.model, source.blocks)
    advice = "leave model_free out (--disable_model_free), " if not source.can_run else ""
    if (warning := weights.check(source.name_or_path, advice)) is not None:
        notes.append(warning)
    files = next((fmt for fmt in formats if isinstance(fmt, GgufFormat)), None)  # a run has at most one
    if files is None and (settings.imatrix is not None or settings.save_imatrix is not None):
        option = "imatrix" if settings.imatrix is not None else "save_imatrix"
        raise ConfigError(f"{option} needs a GGUF format, since importance files use its tensor names; give such a one")
    if settings.imatrix is not None and not settings.optimized_start:
        raise ConfigError("imatrix weights the search of scales, which disable_opt_rtn turns off; give one of them")
    rules = LayerRules(settings, source) if files is None else GgufRules(settings, source, files, tokenizer)
    schemes, instead, further = _resolve_schemes(rules, formats, fit)
    notes += further
    layers, unquantized, further = _plan_layers(rules, schemes, formats, blocks, damaged)
    notes += further
    compute = compute_dtype(settings, source)
    memory = MemoryModel(settings, source, layers, compute, in_memory).choose_storage(tolerance)
    journal = journal_bytes(settings, largest(source.config, "hidden_size"), compute.itemsize)

    def nbytes(fmt: OutputFormat) -> int:
        specs = plan_files(fmt, layers, source).tensors | cache.specs(fmt)
        return sum(prod(shape) * dtype.itemsize for shape, dtype in specs.values())

    job = Job(
        model=source.name_or_path, used=settings, blocks=source.blocks, layers=layers,
        formats=tuple(fmt.name for fmt in formats), settings=settings.recorded(), scheme_name=settings.scheme_name,
        scheme=instead.get(settings.scheme, settings.scheme),
        steps=getattr(settings.algorithm, "iters", 0) * len(blocks),
        bytes_on_disk={fmt.name: rules.nbytes(fmt) or nbytes(fmt) for fmt in formats},
        peak_ram=memory.ram, peak_vram=memory.vram,
        compute=f"{settings.device}, {str(compute).removeprefix('torch.')}",
        output_dir=output_dir, notes=tuple(notes), model_type=_model_type(source), stored_as=source.stored_as,
        cache=cache, gguf=rules.file, embedding_types=rules.embedding_types(), resumable=source.lazy,
        journal_bytes=journal if source.lazy and output_dir else 0, memory_plan=memory,
        skipped={weight.name: weight.reason for weight in weights.dense}, damaged=unquantized,
        patterns=tuple(dict.fromkeys(pattern_regex(key) for key in settings.layer_config if key not in layers)),
        file_identity=rules.identity(), **_names(source, layers),
    )  # fmt: skip
    for fmt in formats:
        require_plan(fmt, job.export_plan(fmt))
    return job


def _model_type(source: ModelSource) -> str:
    return str(getattr(source.config, "model_type", ""))


def _model_notes(formats: Sequence[OutputFormat], source: ModelSource) -> list[str]:
    """Notes of the formats on this type of model; an error when one cannot hold it."""
    model_type, notes = _model_type(source), []
    for fmt in formats:
        rules = fmt.rules(model_type)
        if rules.refused is not None:
            others = [f for f in available_formats() if get_format(f).rules(model_type).refused is None]
            raise UnsupportedError(
                f"format {fmt.name!r} cannot hold a model of type {model_type!r}: {rules.refused}; formats that can: "
                f"{', '.join(others)}"
            )
        notes += [] if rules.note is None else [rules.note]
    return notes


def select_blocks(settings: Settings, blocks: Sequence[str]) -> tuple[str, ...]:
    """The blocks that match `to_quant_block_names`: names, prefixes of names, or regular expressions."""
    chosen: set[str] = set() if settings.to_quant_block_names else {*blocks}
    for name in settings.to_quant_block_names:
        found = [block for block in blocks if block == name or block.startswith(f"{name}.")]
        try:
            found = found or [block for block in blocks if re.search(name, block)]
        except re.error as error:
            raise ConfigError(f"to_quant_block_names: {name!r} is not a regular expression: {error}") from error
        if not found:
            raise ConfigError(f"to_quant_block_names: {name!r} is no block of this model{nearest(name, blocks)}")
        chosen.update(found)
    return tuple(block for block in blocks if block in chosen)


def _resolve_schemes(
    rules: LayerRules, formats: Sequence[OutputFormat], fit: bool
) -> tuple[Schemes, dict[QuantizationScheme, QuantizationScheme], list[str]]:
    """The scheme of every linear layer, schemes that were replaced because of their groups, and notes for the user."""
    settings, model = rules.settings, rules.source.model
    everything, inside, head = linear_names(model), _block_linears(rules.source), get_lm_head_name(model)
    outside = [name for name in everything if name == head and name not in inside]
    known = [*inside, *outside]
    others = [name for name, _ in model.named_modules() if name and name not in known]
    notes: list[str] = []
    schemes = resolve_layers(
        inside, settings.scheme, rules.layer_config, settings.ignore_layers, outside, rules.quant_lm_head,
        rules.defaults(known), others, None if settings.strict else notes.append,
    )  # fmt: skip
    for name, scheme in schemes.items():
        schemes[name], changed = symmetric_if_required(scheme)
        for field in changed:
            note = f"layer_config: {field}=False is not used: {no_zero_point(schemes[name], field)}"
            notes += [note] if note not in notes else []
    widths = {name: int(weight_2d(model.get_submodule(name)).shape[1]) for name in everything}
    schemes, further = rules.fitted(schemes, widths)
    # Linear layers that are neither in a block nor the head are never quantized; formats must list them.
    full = settings.scheme.with_overrides({"bits": 16, "act_bits": 16})
    schemes |= {name: full for name in everything if name not in schemes}
    instead, shrunk = fit_groups(schemes, widths, formats) if fit else ({}, [])
    return {name: instead.get(scheme, scheme) for name, scheme in schemes.items()}, instead, notes + further + shrunk


def _block_linears(source: ModelSource) -> list[str]:
    return [f"{block}.{name}" for block in source.blocks for name in linear_names(source.model.get_submodule(block))]


def fit_groups(
    schemes: Mapping[str, QuantizationScheme], widths: Mapping[str, int], formats: Sequence[OutputFormat]
) -> tuple[dict[QuantizationScheme, QuantizationScheme], list[str]]:
    """Replace group sizes that do not divide the rows of a layer (`widths`), for formats without a short last group:
    (replacement by scheme, notes for the user). All layers of a scheme get one size: some formats support only one."""
    instead: dict[QuantizationScheme, QuantizationScheme] = {}
    notes: list[str] = []
    asking = ", ".join(fmt.name for fmt in formats if fmt.requires_full_groups)
    for scheme in dict.fromkeys(schemes.values()) if asking else ():
        size = scheme.group_size
        if not scheme.quantizes_weights or not isinstance(size, int) or size < _MIN_GROUP_SIZE:
            continue
        fitting, owners = size, [name for name, own in schemes.items() if own == scheme]
        for name in owners:
            common = gcd(fitting, widths[name])
            fitting = common if common >= _MIN_GROUP_SIZE else fitting  # else the layer is left unquantized
        if fitting != size:
            instead[scheme] = scheme.with_overrides({"group_size": fitting})
            odd = next(name for name in owners if widths[name] % size)
            notes.append(
                f"groups of {fitting} instead of {size}: {odd} has {widths[odd]} inputs, and {asking} files have no "
                "short last group"
            )
    return instead, notes


def _plan_layers(
    rules: LayerRules, schemes: Schemes, formats: Sequence[OutputFormat], blocks: Sequence[str],
    damaged: Mapping[str, str],
) -> tuple[dict[str, LayerPlan], dict[str, str], list[str]]:  # fmt: skip
    """The plan of every layer, the reasons of those that stay unquantized because of damaged tensors, and notes."""
    settings, source = rules.settings, rules.source
    default, notes = _unquantized_by_default(settings, source, list(schemes), formats)
    known, chosen = set(_block_linears(source)), tuple(f"{block}." for block in blocks)
    layers: dict[str, LayerPlan] = {}
    for name, scheme in schemes.items():
        module = source.model.get_submodule(name)
        out, columns = weight_2d(module).shape
        biased = getattr(module, "bias", None) is not None
        bias_dtype = source.unquantized_meta(f"{name}.bias")[1] if biased else None
        plan = LayerPlan(name, scheme, int(out), int(columns), bias_dtype, is_conv1d(module))
        reason = default.get(name) if plan.quantized or name in known else None
        if not plan.quantized and name in known:
            reason = reason or _ASKED
        elif plan.quantized and reason is None:
            if name in known and not name.startswith(chosen):
                reason = "its block is not in to_quant_block_names"
            else:
                check_data_type(scheme, f"layer {name}")
                reason = _format_reason(plan, formats, source)
                reason = rules.unquantized_reason(name) or reason
        layers[name] = plan if reason is None else plan.unquantized(reason)
    unquantized = _damaged_layers(layers, damaged, source)
    layers = {name: p.unquantized(unquantized[name]) if name in unquantized else p for name, p in layers.items()}
    if any(fmt.fusing_runtimes for fmt in formats):
        for group in layer_rules.fused_groups(list(layers)):  # when one cannot be packed, none is quantized
            odd = next((layers[n] for n in group if (layers[n].reason or "").startswith("format ")), None)
            if odd is not None:
                reason = f"{odd.name}, which engines fuse with it, is left unquantized: {odd.reason}"
                layers |= {name: layers[name].unquantized(reason) for name in group if layers[name].quantized}
    layers, shared = rules.settled(layers)
    rules.check_damaged(damaged)
    notes += shared
    if settings.gptq is not None:
        planned = [plan for plan in layers.values() if plan.quantized]
        without = [plan for plan in planned if not plan.codec.uses_feedback(asked=True)]
        if planned and len(without) == len(planned):
            raise ConfigError(
                f"GPTQ chooses codes, and data type {planned[0].scheme.data_type!r} with group size "
                f"{planned[0].scheme.group_size} stores none; use --algorithm auto_round or rtn"
            )
        said = "GPTQ leaves it out: its data type stores no codes"
        layers |= {plan.name: replace(plan, reason=said) for plan in without}
    usual = {None, _ASKED, *default.values()}
    refused = [p for p in layers.values() if p.reason not in usual and p.scheme.bits >= 16]
    notes += [f"{plan.name} stays in full precision: {plan.reason}" for plan in refused[:5]]
    if len(refused) > 5:
        notes.append(f"and {len(refused) - 5} more layers stay in full precision")
    if not any(plan.quantized for plan in layers.values()):
        raise ConfigError(
            "no layer is left to quantize; " + (notes[0] if notes else "check scheme, ignore_layers and layer_config")
        )
    return layers, unquantized, notes + _reader_notes(layers, formats)


def _unquantized_by_default(
    settings: Settings, source: ModelSource, layers: Sequence[str], formats: Sequence[OutputFormat]
) -> tuple[dict[str, str], list[str]]:
    """Layers that stay in full precision, with the reasons, and notes: routers, and in formats for serving engines what
    these do not load quantized, unless an entry of the layer configuration matches only such layers."""
    routers = layer_rules.router_names(source.model)
    served = not formats or any(fmt.fusing_runtimes for fmt in formats)
    reasons: dict[str, str] = {}
    for name in layers:
        row = layer_rules.engine_unquantized(_model_type(source), name) if served else None
        if name in routers:
            reasons[name] = layer_rules.ROUTER
        elif row is not None:
            reasons[name] = f"serving engines keep it unquantized: {row.reason}"
    overridden: dict[str, list[str]] = {}  # by reason
    matches = [matching_layers(pattern, layers) for pattern in settings.layer_config]
    asked = {name for names in matches if all(name in reasons for name in names) for name in names}
    for name in layers:
        if name in asked:
            overridden.setdefault(reasons.pop(name), []).append(name)
    notes = []
    for reason, names in overridden.items():
        shown = f"{names[0]} is" if len(names) == 1 else f"{names[0]} and {len(names) - 1} more are"
        notes.append(f"{shown} quantized because layer_config asks for it, against the default: {reason}")
    return reasons, notes


def _format_reason(plan: LayerPlan, formats: Sequence[OutputFormat], source: ModelSource) -> str | None:
    """Why one of the formats cannot hold the layer quantized, or None."""
    for fmt in formats:
        require_scheme(fmt, plan.scheme, f"layer {plan.name}")
        reason = fmt.rules(_model_type(source)).unquantized_reason(plan.name)
        reason = reason or fmt.check_layer(plan.scheme, plan.in_features, plan.out_features)
        if fmt.experts_by_name and layer_rules.is_routed_expert(plan.name):
            stored = source.tensor_plan(f"{plan.name}.weight")
            if stored is not None and stored.key is None:  # stacked in the checkpoint
                reason = _NO_NAMES
        if plan.transposed and not fmt.supports_conv1d:
            reason = "it stores its weight transposed (Conv1D), and the layout is for ordinary linear layers"
        if reason is not None:
            return f"format {fmt.name}: {reason}"
    return None


def _damaged_layers(layers: Mapping[str, LayerPlan], damaged: Mapping[str, str], source: ModelSource) -> dict[str, str]:
    """The owners of damaged tensors and the layers that runtimes fuse with them, with the reason."""
    planned, tied = [name for name, plan in layers.items() if plan.quantized], source.tied()
    reasons: dict[str, str] = {}
    for layer in planned if damaged else ():
        for leaf in ("weight", "bias"):
            name = f"{layer}.{leaf}"
            bad = damaged.get(tied.get(name, name))
            if bad is not None:
                reasons.setdefault(layer, f"its {leaf} holds {bad}")
    for group in layer_rules.fused_groups(planned) if reasons else ():
        first = next((name for name in group if name in reasons), None)
        if first is not None:
            for name in group:
                reasons.setdefault(name, f"{first}, which runtimes fuse with it, is left unquantized")
    return reasons


def _reader_notes(layers: Mapping[str, LayerPlan], formats: Sequence[OutputFormat]) -> list[str]:
    """Notes on what readers of these formats do with the layers."""
    notes: list[str] = []
    readers = {fmt.name: fmt.fusing_runtimes for fmt in formats if fmt.fusing_runtimes}
    runtimes = " and ".join(dict.fromkeys(runtime for names in readers.values() for runtime in names))
    for group in layer_rules.fused_groups(list(layers)) if readers else ():
        described = {layers[name].scheme.describe() for name in group if name in layers}
        if len(described) > 1 and len(notes) < 3:
            notes.append(
                f"{group[0]} and {len(group) - 1} more are fused by {runtimes} but have different schemes "
                f"({', '.join(sorted(described))}); those runtimes will refuse the files of {', '.join(readers)}"
            )
    if any(plan.scheme.activations is not None for plan in layers.values()):
        notes += [
            f"format {fmt.name} holds weights only: a model opened from it does not quantize activations"
            for fmt in formats
            if not fmt.stores_activation_scheme
        ]
    plans = [p for p in layers.values() if p.quantized and isinstance(p.scheme.group_size, int)]
    sizes = [(p.name, p.in_features, p.out_features, stored_group_size(p.scheme)) for p in plans]
    return notes + slow_kernel_notes(formats, sizes)


def _names(source: ModelSource, layers: Mapping[str, LayerPlan]) -> dict[str, Any]:
    """Fields of `Job`: modules that are no linear layers, and names in the checkpoint."""
    embeddings = embedding_names(source)
    others = tuple(
        name
        for name, module in source.model.named_modules()
        if name not in layers
        and not isinstance(module, torch.nn.Embedding)
        and isinstance(weight := getattr(module, "weight", None), torch.nn.Parameter)
        and weight.dim() == 2
    )
    naming = source.checkpoint_naming()
    names = {name: called for name in (*layers, *embeddings, *others) if (called := naming.module(name)) != name}
    blocks = tuple(dict.fromkeys(called for block in source.blocks for called in naming.block(block)))
    stem = f"{blocks[0].rpartition('.')[0]}." if blocks else "."
    plans = (source.own_plan(name) for name in source.tied())
    aliases = {key for plan in plans if plan is not None for key in plan.origin.stored}
    spare = {}
    for key in (key for key in source.unused_tensors if key not in aliases):
        index = key.removeprefix(stem).partition(".")[0] if key.startswith(stem) else ""
        further = index.isdigit() and f"{stem}{index}" not in blocks  # a block after the last one
        mtp = further or any(part.startswith("mtp") for part in key.split("."))
        spare[key] = _MTP if mtp else "no module reads it"
    return {
        "embeddings": embeddings, "other_matrices": others, "stored_names": names, "stored_blocks": blocks,
        "spare": spare,
    }  # fmt: skip
