"""Build a Job from settings and a model: resolve schemes, ask the formats, add up sizes. Reads no weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import prod
from typing import Any

import torch

from auto_round.calibration.data.spec import parse_dataset_string
from auto_round.codecs.activation import activation_function
from auto_round.codecs.kinds import codec_of
from auto_round.errors import ConfigError, UnsupportedError
from auto_round.formats.base import (
    OutputFormat,
    TensorSpecs,
    available_formats,
    get_format,
    require_cache,
    require_plan,
    require_scheme,
    slow_kernel_notes,
)
from auto_round.inference.linear import compute_dtype_for
from auto_round.layer_config import pattern_regex, scheme_from_entry
from auto_round.layouts.integers import stored_group_size
from auto_round.modeling.blocks import get_lm_head_name, is_conv1d, linear_names, weight_2d
from auto_round.modeling.config import largest
from auto_round.modeling.layer_rules import block_weights, fused_groups, is_routed_expert
from auto_round.modeling.source import ModelSource
from auto_round.output.writer import header_entry_bytes
from auto_round.run.file_layout import plan_files
from auto_round.run.folders import journal_bytes, split_runs
from auto_round.run.gguf import GgufRules, gguf_format
from auto_round.run.keywords import symmetric_if_required
from auto_round.run.layer_schemes import (
    LayerRules,
    embedding_names,
    fit_groups,
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
        if settings.cache is not None:
            require_cache(fmt, settings.cache)
        if fmt.scale_dtype not in (None, settings.scale_dtype):
            raise UnsupportedError(
                f"format {fmt.name!r} stores scales as {fmt.scale_dtype}, not {settings.scale_dtype}; leave "
                "scale_dtype out, or use format fake"
            )
    cache = plan_cache(source, settings.cache)
    model_type = str(getattr(source.config, "model_type", ""))
    notes = _model_notes(formats, model_type)
    blocks = select_blocks(settings, source.blocks)
    weights = block_weights(source.model, source.blocks)
    advice = "leave model_free out (--disable_model_free), " if not source.can_run else ""
    if (warning := weights.check(source.name_or_path, advice)) is not None:
        notes.append(warning)
    everything = linear_names(source.model)
    inside = [f"{block}.{name}" for block in source.blocks for name in linear_names(source.model.get_submodule(block))]
    head = get_lm_head_name(source.model)
    outside = [name for name in everything if name == head and name not in inside]
    rules = _layer_rules(settings, source, formats, tokenizer)
    schemes, unused = resolve_layer_schemes(rules, inside, outside)
    widths = {name: int(weight_2d(source.model.get_submodule(name)).shape[1]) for name in everything}
    schemes, further = rules.fitted(schemes, widths)
    notes += unused + further
    # Linear layers that are neither in a block nor the head are never quantized; formats must list them.
    full = settings.scheme.with_overrides({"bits": 16, "act_bits": 16})
    schemes |= {name: full for name in everything if name not in schemes}
    instead, further = fit_groups(schemes, widths, formats) if fit else ({}, [])
    schemes = {name: instead.get(scheme, scheme) for name, scheme in schemes.items()}
    default, asked = unquantized_by_default(source.model, model_type, everything, formats, settings.layer_config)
    notes += further + asked

    known, chosen = set(inside), tuple(f"{block}." for block in blocks)
    layers: dict[str, LayerPlan] = {}
    for name, scheme in schemes.items():
        plan = _layer_plan(source, name, scheme)
        reason = default.get(name) if scheme.quantizes_weights or name in known else None
        if not scheme.quantizes_weights and name in known:
            reason = reason or _ASKED
        elif scheme.quantizes_weights and reason is None:
            reason = (unquantized or {}).get(name)
            if reason is None and name in known and not name.startswith(chosen):
                reason = "its block is not in to_quant_block_names"
            elif reason is None:
                check_data_type(scheme, f"layer {name}")
                reason = _format_reason(plan, formats, model_type, source)
                reason = rules.unquantized_reason(name) or reason
        layers[name] = plan if reason is None else plan.unquantized(reason)
    layers = _same_scheme_for_fused(layers, formats)
    layers, shared = rules.settled(layers)
    notes += shared
    if settings.gptq is not None:
        layers = _without_feedback(layers)
    usual = {None, _ASKED, *default.values()}
    refused = [p for p in layers.values() if p.reason not in usual and p.scheme.bits >= 16]
    notes += [f"{plan.name} stays in full precision: {plan.reason}" for plan in refused[:5]]
    if len(refused) > 5:
        notes.append(f"and {len(refused) - 5} more layers stay in full precision")
    if not any(p.scheme.quantizes_weights for p in layers.values()):
        raise ConfigError(
            "no layer is left to quantize; " + (notes[0] if notes else "check scheme, ignore_layers and layer_config")
        )
    notes += _reader_notes(layers, formats)

    compute = compute_dtype(settings, source)
    memory = choose_storage(MemoryInputs(settings, source, layers, compute, in_memory), tuple(formats), per_expert)
    resumable = source.lazy and (settings.tunes or not memory.streams_experts)
    journaled = resumable and output_dir is not None
    width = largest(source.config, "hidden_size")
    job = Job(
        model=source.name_or_path,
        blocks=source.blocks,
        layers=layers,
        formats=tuple(fmt.name for fmt in formats),
        settings=settings.recorded(),
        scheme_name=settings.scheme_name,
        scheme=instead.get(settings.scheme, settings.scheme),
        steps=getattr(settings.algorithm, "iters", 0) * len(blocks),
        bytes_on_disk={f.name: rules.nbytes(f) or planned_bytes(f, layers, source, cache) for f in formats},
        peak_ram=memory.ram,
        peak_vram=memory.vram,
        compute=f"{settings.device}, {str(compute).removeprefix('torch.')}",
        output_dir=output_dir,
        notes=tuple(notes),
        model_type=model_type,
        embeddings=embedding_names(source),
        other_matrices=_other_matrices(source, layers),
        stored_as=source.stored_as,
        cache=cache,
        gguf=rules.file,
        resumable=resumable,
        journal_bytes=journal_bytes(settings, width, compute.itemsize) if journaled else 0,
        memory_plan=memory,
        skipped={weight.name: weight.reason for weight in weights.dense},
        patterns=tuple(dict.fromkeys(pattern_regex(key) for key in settings.layer_config if key not in layers)),
        **_stored_names(source, layers),
    )
    for fmt in formats:
        require_plan(fmt, job.export_plan(fmt))
    return job


def _layer_rules(
    settings: Settings, source: ModelSource, formats: Sequence[OutputFormat], tokenizer: Any
) -> LayerRules:
    """What the output decides about layers. Raises ConfigError for importance files that cannot be used."""
    files = gguf_format(formats)
    option = "imatrix" if settings.imatrix is not None else "save_imatrix"
    if files is None and (settings.imatrix is not None or settings.save_imatrix is not None):
        raise ConfigError(f"{option} needs a GGUF format, since importance files use its tensor names; give such a one")
    if settings.imatrix is not None and not settings.optimized_start:
        raise ConfigError("imatrix weights the search of scales, which disable_opt_rtn turns off; give one of them")
    return LayerRules(settings, source) if files is None else GgufRules(settings, source, files, tokenizer)


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
    modules = (*layers, *embedding_names(source), *_other_matrices(source, layers))
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


def _format_reason(
    plan: LayerPlan, formats: Sequence[OutputFormat], model_type: str, source: ModelSource
) -> str | None:
    """Why one of the formats cannot hold the layer quantized, or None."""
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
            return f"format {fmt.name}: {reason}"
    return None


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


def _reader_notes(layers: Mapping[str, LayerPlan], formats: Sequence[OutputFormat]) -> list[str]:
    """Notes on what readers of these formats do with the layers: engines fuse layers whose schemes differ, activations
    are not quantized, and fast kernels do not take layers that are too narrow."""
    notes: list[str] = []
    readers = {fmt.name: fmt.fusing_runtimes for fmt in formats if fmt.fusing_runtimes}
    runtimes = " and ".join(dict.fromkeys(runtime for names in readers.values() for runtime in names))
    for group in fused_groups(list(layers)) if readers else ():
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
    plans = [p for p in layers.values() if p.scheme.quantizes_weights and isinstance(p.scheme.group_size, int)]
    sizes = [(p.name, p.in_features, p.out_features, stored_group_size(p.scheme)) for p in plans]
    return notes + slow_kernel_notes(formats, sizes)


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
