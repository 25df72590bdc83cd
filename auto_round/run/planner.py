"""Build a Job from settings and a model: resolve schemes, ask the formats, add up sizes. Reads no weights."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from math import prod
from typing import Any

import torch

from auto_round.algorithms.quantization.sign_round.config import SignRoundConfig
from auto_round.calibration.data.spec import parse_dataset_string
from auto_round.codecs.activation import activation_function
from auto_round.codecs.kinds import codec_of
from auto_round.errors import ConfigError, UnsupportedError
from auto_round.formats.base import (
    OutputFormat,
    TensorSpecs,
    available_formats,
    get_format,
    require_plan,
    require_scheme,
)
from auto_round.formats.cache_scales import require_cache
from auto_round.formats.table import slow_kernel_notes
from auto_round.inference.linear import compute_dtype_for
from auto_round.layer_config import pattern_regex, scheme_from_entry
from auto_round.layouts.base import stored_group_size
from auto_round.modeling.blocks import is_conv1d, linear_names, weight_2d
from auto_round.modeling.config import largest
from auto_round.modeling.layer_rules import block_weights, fused_groups, is_routed_expert
from auto_round.modeling.source import ModelSource
from auto_round.output.writer import header_entry_bytes
from auto_round.run.file_layout import plan_files
from auto_round.run.folders import journal_bytes, split_runs
from auto_round.run.gguf import (
    file_type_schemes,
    gguf_format,
    is_rearranged,
    plan_gguf_file,
    resolve_bits,
    resolve_types,
    shared_with_head,
    with_embedding_types,
    with_types,
)
from auto_round.run.keywords import symmetric_if_required
from auto_round.run.layer_schemes import (
    fit_groups,
    mixed_defaults,
    resolve_layer_schemes,
    select_blocks,
    unquantized_by_default,
)
from auto_round.run.memory import MemoryInputs
from auto_round.run.memory_policy import choose_storage
from auto_round.run.plan import CachePlan, Job, LayerPlan, plan_cache
from auto_round.run.settings import Settings, parse_scale_dtype
from auto_round.schemes import QuantizationScheme

_MTP = "it belongs to multi-token prediction"
_NO_NAMES = "checkpoints of this model type store all experts of a block in one tensor, and readers know no other names"
_ASKED = "layer_config, ignore_layers or the scheme ask for full precision"


def compute_dtype(settings: Settings, source: ModelSource) -> torch.dtype:
    """Dtype of matrix products: with amp bfloat16 if the device supports it natively, else float32."""
    if not settings.amp:
        return torch.float32
    if settings.device.type != "cpu":
        return torch.bfloat16
    return compute_dtype_for("cpu", torch.bfloat16)


def check_data_type(scheme: QuantizationScheme, what: str) -> None:
    """Raise ConfigError or UnsupportedError when this version cannot quantize to `scheme`."""
    if not scheme.quantizes_weights:
        return
    if scheme.rotation_config is not None:
        raise UnsupportedError(f"{what}: rotation_config is not available in this version; leave it out")
    problem = codec_of(scheme).problem()
    if problem is not None:
        raise ConfigError(f"{what}: {problem}")
    activations = scheme.activations
    if activations is None:
        return
    activation_function(activations)
    input_codec = codec_of(activations)
    if not isinstance(activations.group_size, int):
        raise ConfigError(f"{what}: act_group_size={activations.group_size} is a block; use -1, 0 or a positive number")
    if (problem := input_codec.problem()) is not None:
        raise ConfigError(f"{what}: act_{problem}")
    if not activations.dynamic and activations.group_size > 0:
        raise UnsupportedError(
            f"{what}: act_group_size={activations.group_size} with act_dynamic=False: a static scale is one for the "
            "whole layer; use act_group_size 0 or -1"
        )


def check_before_opening(settings: Settings, formats: Sequence[OutputFormat] | None) -> None:
    """Check settings and formats as far as that is possible without a model.

    Raises:
        ConfigError: an entry of the layer configuration is no scheme, or the dataset string is invalid.
        UnsupportedError: an unknown data type, or a format that cannot hold the scheme.
    """
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
    fit: bool = True, tokenizer: Any = None, unquantized: Mapping[str, str] | None = None, in_memory: bool = False,
    per_expert: bool | None = None,
) -> Job:  # fmt: skip
    """Resolve the schemes of all layers, the storage of activations, and the sizes of the output.

    Args:
        tokenizer: of the model, for files that contain it (GGUF).
        fit: shrink groups that a format cannot hold; False when the layers are quantized already.
        unquantized: layers that are left unquantized whatever their scheme, with the reasons.
        in_memory: the quantized layers stay in memory.
        per_expert: how an interrupted run tunes experts, one at a time (True) or with their block (False), to be
            repeated if it fits; None without one.

    Raises:
        ConfigError: a layer pattern matches nothing, an entry is no scheme, or `max_memory` is too low.
        UnsupportedError: an unknown data type, or a format that cannot hold a scheme.
    """
    check_data_type(settings.scheme, f"scheme {settings.scheme_name}")
    for fmt in formats:
        require_scheme(fmt, settings.scheme, f"scheme {settings.scheme_name}")
        if fmt.scale_dtype not in (None, settings.scale_dtype):
            raise UnsupportedError(
                f"format {fmt.name!r} stores scales as {fmt.scale_dtype}, not {settings.scale_dtype}; leave "
                "scale_dtype out, or use format fake"
            )
    require_cache(formats, settings.cache)
    cache = plan_cache(source, settings.cache)
    model_type = str(getattr(source.config, "model_type", ""))
    notes = _model_notes(formats, model_type)
    blocks = select_blocks(settings, source.blocks)
    weights = block_weights(source.model, source.blocks)
    advice = "leave model_free out (--disable_model_free), " if not source.can_run else ""
    if (warning := weights.check(source.name_or_path, advice)) is not None:
        notes.append(warning)
    inside = [f"{block}.{name}" for block in source.blocks for name in linear_names(source.model.get_submodule(block))]
    everything = linear_names(source.model)
    inside_set = set(inside)
    head = _head_name(source)
    outside = [name for name in everything if name not in inside_set and name == head]
    own_defaults = mixed_defaults(settings.mixed, settings.scheme, [*inside, *outside], source.config)
    gguf_output = gguf_format(formats)
    gguf = None if gguf_output is None else plan_gguf_file(gguf_output, source, tokenizer, settings.weighs)
    option = "imatrix" if settings.imatrix is not None else "save_imatrix"
    if gguf is None and (settings.imatrix is not None or settings.save_imatrix is not None):
        raise ConfigError(f"{option} needs a GGUF format, since importance files use its tensor names; give such a one")
    if settings.imatrix is not None and not settings.optimized_start:
        raise ConfigError("imatrix weights the search of scales, which disable_opt_rtn turns off; give one of them")
    embedded: set[str] = set()
    if gguf is not None:
        gguf, embedded = with_embedding_types(gguf, source, settings.layer_config, everything, settings.scheme)
        own_defaults = file_type_schemes(gguf, source, everything, settings.scheme)
    schemes, unused = resolve_layer_schemes(
        settings, inside, outside, (name for name, _ in source.model.named_modules()), own_defaults,
        {name: entry for name, entry in settings.layer_config.items() if name not in embedded},
        settings.quant_lm_head or gguf is not None,
    )  # fmt: skip
    notes += unused
    if gguf is not None:
        schemes, fallbacks = resolve_bits(schemes, own_defaults, _row_widths(source, schemes))
        notes += [*gguf.notes, *fallbacks]
    if settings.mixed is not None and not any(map(is_routed_expert, inside)):
        notes.append(
            f"{settings.scheme_name} gives routed experts {settings.scheme.bits} bits, and this model has none: every "
            f"layer gets {settings.mixed.other_bits}"
        )
    known = set(inside) | set(outside)
    # Linear layers that are neither in a block nor the head are never quantized; formats must list them.
    schemes |= {n: settings.scheme.with_overrides({"bits": 16, "act_bits": 16}) for n in everything if n not in known}
    instead, group_notes = fit_groups(schemes, _row_widths(source, schemes), formats) if fit else ({}, [])
    schemes = {name: instead.get(scheme, scheme) for name, scheme in schemes.items()}
    notes += group_notes
    default = unquantized_by_default(source.model, model_type, everything, formats, settings.layer_config)
    notes += default.notes()
    layers: dict[str, LayerPlan] = {}
    for name, scheme in schemes.items():
        plan = _layer_plan(source, name, scheme)
        if not scheme.quantizes_weights:
            plan = plan.unquantized(default.reasons.get(name, _ASKED)) if name in inside_set else plan
        elif name in default.reasons:
            plan = plan.unquantized(default.reasons[name])
        elif unquantized is not None and name in unquantized:
            plan = plan.unquantized(unquantized[name])
        elif name in inside_set and not name.startswith(tuple(f"{b}." for b in blocks)):
            plan = plan.unquantized("its block is not in to_quant_block_names")
        else:
            check_data_type(scheme, f"layer {name}")
            plan = _for_formats(plan, formats, model_type, source)
            rearranged = None if gguf is None else is_rearranged(gguf, source, name)
            plan = plan if rearranged is None else plan.unquantized(rearranged)
        layers[name] = plan
    layers = _same_scheme_for_fused(layers, formats)
    if gguf is not None or settings.scheme.super_bits is not None:
        layers = with_types(layers)
    if gguf is not None:
        asked, gguf = gguf, resolve_types(gguf, source, layers)
        if embedded:
            notes += shared_with_head(asked, gguf, source, _embeddings(source))
    if settings.gptq is not None:
        layers = _without_feedback(layers)
    usual = {None, _ASKED, *default.reasons.values()}
    refused = [p for p in layers.values() if p.reason not in usual and p.scheme.bits >= 16]
    for plan in refused[:5]:
        notes.append(f"{plan.name} stays in full precision: {plan.reason}")
    if len(refused) > 5:
        notes.append(f"and {len(refused) - 5} more layers stay in full precision")
    if not any(p.scheme.quantizes_weights for p in layers.values()):
        raise ConfigError(
            "no layer is left to quantize; " + (notes[0] if notes else "check scheme, ignore_layers and layer_config")
        )
    notes += _fused_notes(layers, formats) + _activation_notes(layers, formats) + _slower_notes(layers, formats)
    compute = compute_dtype(settings, source)
    algorithm = settings.algorithm
    steps = algorithm.iters * len(blocks) if isinstance(algorithm, SignRoundConfig) else 0
    memory = choose_storage(MemoryInputs(settings, source, layers, compute, in_memory), tuple(formats), per_expert)
    resumable = source.lazy and (settings.tunes or not memory.streams_experts)
    journaled = resumable and output_dir is not None
    scheme = instead.get(settings.scheme, settings.scheme)
    job = Job(
        source.name_or_path, source.blocks, layers, tuple(f.name for f in formats), settings.recorded(),
        settings.scheme_name, scheme, steps,
        {
            f.name: gguf.nbytes() if gguf and f is gguf_output else planned_bytes(f, layers, source, cache)
            for f in formats
        },
        memory.ram, memory.vram, f"{settings.device}, {str(compute).removeprefix('torch.')}", output_dir, tuple(notes),
        model_type, _embeddings(source), _other_matrices(source, layers), source.stored_as, cache, gguf, resumable,
        journal_bytes(settings, largest(source.config, "hidden_size"), compute.itemsize) if journaled else 0,
        memory,
        skipped={weight.name: weight.reason for weight in weights.dense}, **_stored_names(source, layers),
        patterns=tuple(dict.fromkeys(pattern_regex(key) for key in settings.layer_config if key not in layers)),
    )  # fmt: skip
    for fmt in formats:
        require_plan(fmt, job.export_plan(fmt))
    return job


def _without_feedback(layers: Mapping[str, LayerPlan]) -> dict[str, LayerPlan]:
    """The layers, with the reason where their data type has no codes that error feedback could choose.

    Raises ConfigError when that is all of them.
    """
    chosen = [plan for plan in layers.values() if plan.scheme.quantizes_weights]
    without = {plan.name for plan in chosen if not plan.codec.uses_feedback(asked=True)}
    if chosen and len(without) == len(chosen):
        raise ConfigError(
            f"GPTQ chooses codes, and data type {chosen[0].scheme.data_type!r} with group size "
            f"{chosen[0].scheme.group_size} stores none; use --algorithm auto_round or rtn"
        )
    said = "GPTQ leaves it out: its data type stores no codes"
    return {name: replace(plan, reason=said) if name in without else plan for name, plan in layers.items()}


def _head_name(source: ModelSource) -> str | None:
    getter = getattr(source.model, "get_output_embeddings", None)
    head = getter() if callable(getter) else None
    return next((n for n, m in source.model.named_modules() if m is head), None) if head is not None else None


def _row_widths(source: ModelSource, names: Iterable[str]) -> dict[str, int]:
    return {name: int(weight_2d(source.model.get_submodule(name)).shape[1]) for name in names}


def _layer_plan(source: ModelSource, name: str, scheme: QuantizationScheme) -> LayerPlan:
    module = source.model.get_submodule(name)
    out, columns = weight_2d(module).shape
    bias = getattr(module, "bias", None)
    bias_dtype = source.unquantized_meta(f"{name}.bias")[1] if bias is not None else None
    return LayerPlan(name, scheme, int(out), int(columns), bias_dtype, is_conv1d(module))


def _other_matrices(source: ModelSource, layers: Mapping[str, LayerPlan]) -> tuple[str, ...]:
    """Modules that a reader could take for linear layers, such as a router or a projection outside the blocks."""
    return tuple(
        name
        for name, module in source.model.named_modules()
        if name not in layers
        and not isinstance(module, torch.nn.Embedding)
        and isinstance(weight := getattr(module, "weight", None), torch.nn.Parameter)
        and weight.dim() == 2
    )


def _stored_names(source: ModelSource, layers: Mapping[str, LayerPlan]) -> dict[str, Any]:
    """Fields of `Job`: checkpoint names of modules and blocks, and checkpoint tensors that no module reads."""
    naming = source.checkpoint_naming()
    modules = (*layers, *_embeddings(source), *_other_matrices(source, layers))
    stored = {name: called for name in modules if (called := naming.module(name)) != name}
    blocks = tuple(dict.fromkeys(called for block in source.blocks for called in naming.block(block)))
    plans = (source.own_plan(name) for name in source.tied())
    aliases = {key for plan in plans if plan is not None for key in plan.origin.stored}
    spare = {key: _unused_reason(key, blocks) for key in source.unused_tensors if key not in aliases}
    return {"stored_names": stored, "stored_blocks": blocks, "spare": spare}


def _unused_reason(key: str, blocks: Sequence[str]) -> str:
    """Why no module reads a checkpoint tensor, from its name."""
    stem = f"{blocks[0].rpartition('.')[0]}." if blocks else "."
    index = key.removeprefix(stem).partition(".")[0] if key.startswith(stem) else ""
    further = index.isdigit() and f"{stem}{index}" not in blocks
    return _MTP if further or any(part.startswith("mtp") for part in key.split(".")) else "no module reads it"


def _for_formats(plan: LayerPlan, formats: Sequence[OutputFormat], model_type: str, source: ModelSource) -> LayerPlan:
    """The plan, left unquantized if one of the formats cannot hold the layer."""
    for fmt in formats:
        require_scheme(fmt, plan.scheme, f"layer {plan.name}")
        reason = fmt.rules(model_type).unquantized_reason(plan.name)
        reason = reason or fmt.check_layer(plan.scheme, plan.in_features, plan.out_features)
        if fmt.experts_by_name and is_routed_expert(plan.name):
            stored = source.tensor_plan(f"{plan.name}.weight")
            if stored is not None and stored.key is None:  # stacked in the checkpoint
                reason = _NO_NAMES
        if plan.transposed and not fmt.supports_conv1d:
            reason = "it stores its weight transposed (Conv1D), and the layout is for ordinary linear layers"
        if reason is not None:
            return plan.unquantized(f"format {fmt.name}: {reason}")
    return plan


def _model_notes(formats: Sequence[OutputFormat], model_type: str) -> list[str]:
    """Notes of the formats on this type of model. Raises UnsupportedError when one cannot hold it."""
    rules = {fmt.name: fmt.rules(model_type) for fmt in formats}
    for name, rule in rules.items():
        if rule.refused is not None:
            others = [f for f in available_formats() if get_format(f).rules(model_type).refused is None]
            raise UnsupportedError(
                f"format {name!r} cannot hold a model of type {model_type!r}: {rule.refused}; formats that can: "
                f"{', '.join(others)}"
            )
    return [rule.note for rule in rules.values() if rule.note is not None]


def _embeddings(source: ModelSource) -> tuple[str, ...]:
    return tuple(name for name, m in source.model.named_modules() if isinstance(m, torch.nn.Embedding))


def _same_scheme_for_fused(layers: dict[str, LayerPlan], formats: Sequence[OutputFormat]) -> dict[str, LayerPlan]:
    """Leave all layers that engines fuse unquantized when a format cannot pack one of them."""
    if not any(fmt.fusing_runtimes for fmt in formats):
        return layers
    made = dict(layers)
    for group in fused_groups(list(layers)):
        odd = next((layers[n] for n in group if (layers[n].reason or "").startswith("format ")), None)
        if odd is None:
            continue
        reason = f"{odd.name}, which engines fuse with it, is left unquantized: {odd.reason}"
        made |= {name: made[name].unquantized(reason) for name in group if made[name].scheme.quantizes_weights}
    return made


def _fused_notes(layers: dict[str, LayerPlan], formats: Sequence[OutputFormat]) -> list[str]:
    """Notes on layers that the readers of these formats fuse although their schemes differ."""
    readers = {fmt.name: fmt.fusing_runtimes for fmt in formats if fmt.fusing_runtimes}
    if not readers:
        return []
    runtimes = " and ".join(dict.fromkeys(runtime for names in readers.values() for runtime in names))
    notes = []
    for group in fused_groups(list(layers)):
        described = {layers[name].scheme.describe() for name in group if name in layers}
        if len(described) > 1:
            notes.append(
                f"{group[0]} and {len(group) - 1} more are fused by {runtimes} but have different schemes "
                f"({', '.join(sorted(described))}); those runtimes will refuse the files of {', '.join(readers)}"
            )
    return notes[:3]


def _slower_notes(layers: dict[str, LayerPlan], formats: Sequence[OutputFormat]) -> list[str]:
    """Notes on fast kernels that the quantized layers are too narrow for."""
    plans = [p for p in layers.values() if p.scheme.quantizes_weights and isinstance(p.scheme.group_size, int)]
    sizes = [(p.name, p.in_features, p.out_features, stored_group_size(p.scheme)) for p in plans]
    return slow_kernel_notes([fmt.name for fmt in formats], sizes)


def _activation_notes(layers: dict[str, LayerPlan], formats: Sequence[OutputFormat]) -> list[str]:
    """Notes on formats that do not store the quantization of activations."""
    if all(plan.scheme.activations is None for plan in layers.values()):
        return []
    return [
        f"format {fmt.name} holds weights only: a model opened from it does not quantize activations"
        for fmt in formats
        if not fmt.stores_activation_scheme
    ]


def with_cache_scales(specs: TensorSpecs, fmt: OutputFormat, cache: CachePlan | None) -> TensorSpecs:
    """Tensor specs of a format's files, with the static scales of the key-value cache."""
    return specs if cache is None else specs | cache.specs(fmt)


def planned_bytes(
    fmt: OutputFormat, layers: dict[str, LayerPlan], source: ModelSource, cache: CachePlan | None = None
) -> int:
    """Bytes of all tensors in a format's files."""
    specs = with_cache_scales(plan_files(fmt, layers, source).tensors, fmt, cache)
    return sum(prod(shape) * dtype.itemsize for shape, dtype in specs.values())


def header_bytes(specs: TensorSpecs) -> int:
    """Bytes of the safetensors header entries of these tensors."""
    return sum(header_entry_bytes(name, len(shape)) for name, (shape, _) in specs.items())
