"""Replace a Transformers model's quantized layers by packed ones: the hooks that `from_pretrained` calls.

Before the weights are read, `convert_hf_model` replaces the quantized layers of the empty model by modules whose
buffers are named as in the files; afterwards `post_init` checks that all of them were filled.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from auto_round.errors import ConfigError, ModelError
from auto_round.inference.config import (
    PACKINGS,
    CheckpointConfig,
    LayerFormat,
    PluginPacking,
    read_config,
    resolve_layers,
)
from auto_round.inference.hf import (
    StoredNames,
    checkpoint_tensors,
    ignore_unexpected_keys,
    normalize_saved_config,
    read_names,
    register_cache_scales,
)
from auto_round.inference.linear import PackedLinear, ScaledMmLinear
from auto_round.inference.qlinear import QuantLinear, enable_grouped_experts
from auto_round.inference.table import OWN_CPU, SCALED_MM, choose_backends, device_kind
from auto_round.layouts.integers import GptqLayout
from auto_round.logger import ensure_logging, logger
from auto_round.modeling.blocks import find_blocks, linear_names, weight_2d
from auto_round.modeling.experts import LinearExperts, is_fused_experts, unfuse_experts
from auto_round.modeling.files.safetensors import StoredTensor
from auto_round.plugins import load_plugins


def infer_target_device(device_map: object = None) -> str:
    """The kind of device ("cpu", "cuda", ...) that Transformers' `device_map` selects."""
    return device_kind(device_map)


def convert_hf_model(model: Any, target_device: str = "cpu") -> tuple[Any, list[str]]:
    """Replace the quantized layers of `model`, usually on meta, in place. Returns (model, names of the backends used).

    Its `config.quantization_config` describes the checkpoint; it will run on `target_device`.

    Raises:
        ConfigError: the model has no quantization_config.
        ModelError: config and files contradict each other.
        UnsupportedError: a data type, packing or backend that this version cannot run.
    """
    ensure_logging()
    load_plugins()
    stored_config = getattr(getattr(model, "config", None), "quantization_config", None)
    if stored_config is None:
        raise ConfigError(f"{type(model).__name__} has no config.quantization_config; load a quantized checkpoint")
    config = read_config(stored_config)
    stored = read_names(model, checkpoint_tensors(model))
    _split_experts(model, config, stored)
    layers = _quantized_layers(model, config, stored)
    _check_dense_experts(model, layers, stored)
    kind = target_device.split(":")[0]
    specs = {}
    for name, fmt in layers.items():
        weight = weight_2d(model.get_submodule(name))
        specs[name] = fmt, fmt.spec(weight.shape[1], weight.shape[0], weight.dtype, kind)
    choices = choose_backends(specs, kind, config.backend)
    for name, fmt in layers.items():
        old, backend = model.get_submodule(name), choices[name].backend
        weight, leaves = weight_2d(old), stored.modules.get(name, {})
        _check_tensors(name, fmt, weight, leaves)
        dtypes = {leaf: tensor.dtype for leaf, tensor in leaves.items()}
        new = build_layer(fmt, weight, getattr(old, "bias", None) is not None, dtypes, config.g_idx, backend.name)
        new.check_dtypes(name, dtypes)
        if isinstance(new, QuantLinear):
            new.kernel_path, new.kernel_device = backend.kernel, kind
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, new.train(old.training))
    used = Counter(choice.backend.name for choice in choices.values())
    if OWN_CPU in used:
        from auto_round.inference.kernels.cpu import use_dense_linear  # its C code is not needed elsewhere

        use_dense_linear(model)
    tied: Any = getattr(model, "all_tied_weights_keys", None)
    for key in [key for key in tied if key.removesuffix(".weight") in layers] if isinstance(tied, dict) else ():
        del tied[key]  # a packed head has no weight to share with the embedding
        model.config.tie_word_embeddings = False
    register_cache_scales(model, stored_config, stored.tensors)
    if config.g_idx:
        # GPTQ files may contain g_idx even for contiguous groups; layers without the buffer ignore it.
        ignore_unexpected_keys(model, [r"\.g_idx$"])
    logger.info("%d quantized layers run with %s", len(layers), ", ".join(f"{b} ({n})" for b, n in used.items()))
    return model, list(used)


def post_init(model: nn.Module, used_backends: list[str] | None = None) -> None:
    """Check that every packed layer got its tensors, start kernels, and rewrite a GPTQ or AWQ config with AutoRound's
    keys. Raises ModelError naming the first missing tensor."""
    device_map = getattr(model, "hf_device_map", None) or {}
    # Transformers' mark on loaded tensors is lost when a tensor moves to another device.
    marked = len(set(map(str, device_map.values()))) <= 1 and any(
        getattr(buffer, "_is_hf_initialized", False) for buffer in model.buffers()
    )
    for name, module in model.named_modules():
        if not isinstance(module, PackedLinear):
            continue
        for leaf, tensor in module.named_buffers(recurse=False):
            if not marked or getattr(tensor, "_is_hf_initialized", False):
                continue
            if leaf != "g_idx" or not isinstance(module, QuantLinear):
                raise ModelError(_missing(f"{name}.{leaf}"))
            module.g_idx = module.default_g_idx(tensor.device)
        if module.is_loaded:
            module.prepare(name)
            if isinstance(module, QuantLinear):
                module.start_kernel(name)
    enable_grouped_experts(model)
    normalize_saved_config(model, lambda: read_names(model, checkpoint_tensors(model)))


def _missing(tensor_name: str) -> str:
    return (
        f"the checkpoint has no tensor {tensor_name}, which its quantization_config requires; "
        "download the files again, or quantize the model again"
    )


def _quantized_layers(model: nn.Module, config: CheckpointConfig, stored: StoredNames) -> dict[str, LayerFormat]:
    """The format of every layer that is quantized, according to the config and to the files."""
    names = linear = linear_names(model)
    if config.everywhere:
        get_head = getattr(model, "get_output_embeddings", None)
        head = get_head() if callable(get_head) else None
        names = [n for n in linear if model.get_submodule(n) is not head]
    wanted = resolve_layers(config, names, lambda: find_blocks(model), stored.config_names)
    packed = {name for name in linear if _is_packed(stored.modules.get(name, {}))}
    for name in linear:
        if name in packed and name not in wanted:
            raise ModelError(f"{name} is packed in the checkpoint, but its quantization_config says full precision")
    # Some writers list layers that they skipped.
    dense = [name for name in wanted if name not in packed and "weight" in stored.modules.get(name, {})]
    if dense:
        logger.warning("%d layers are listed as quantized but stored dense, such as %s", len(dense), dense[0])
    return {name: fmt for name, fmt in wanted.items() if name not in set(dense)}


def _is_packed(leaves: Mapping[str, StoredTensor]) -> bool:
    """Whether a module with these tensors is packed: a layer of GPTQ or AWQ has a `qweight`, of MLX a packed `weight`
    with `scales`, of the other layouts a `weight_scale` or `weight_scale_inv`, or a plugin's codes."""
    if "qweight" in leaves:
        return "weight" not in leaves
    codes = {packing.layout.leaves[0] for packing in PACKINGS.values() if isinstance(packing, PluginPacking)}
    return {"scales", "weight"} <= leaves.keys() or bool({"weight_scale", "weight_scale_inv", *codes} & leaves.keys())


def _check_tensors(name: str, fmt: LayerFormat, weight: torch.Tensor, leaves: Mapping[str, StoredTensor]) -> None:
    """Raise ModelError when the tensors of a layer, where they are known, are not those that its format has."""
    sizes = int(weight.shape[1]), int(weight.shape[0])
    reason = fmt.layout.mismatch(fmt.scheme, *sizes)
    if reason is not None:
        raise ModelError(f"{name} cannot be stored as the quantization_config says: {reason}")
    for leaf, (shape, _) in fmt.layout.specs(fmt.scheme, *sizes).items():
        if leaves and leaf not in leaves:
            raise ModelError(_missing(f"{name}.{leaf}"))
        if leaves and leaves[leaf].shape != shape:
            raise ModelError(
                f"tensor {name}.{leaf} has shape {list(leaves[leaf].shape)}, but its quantization_config "
                f"({fmt.scheme.bits} bits, group size {fmt.scheme.group_size}) asks for {list(shape)}"
            )


def _split_experts(model: nn.Module, config: CheckpointConfig, stored: StoredNames) -> None:
    """Replace fused experts that the checkpoint quantizes by linear layers, named as in the files."""
    for name, module in list(model.named_modules()):
        fused = is_fused_experts(module)
        if not fused and not isinstance(module, LinearExperts):
            continue
        inside = [leaves for owner, leaves in stored.modules.items() if f"{owner}.".startswith(f"{name}.")]
        if not any(map(_is_packed, inside)):
            first = f"{name}.0.{stored.expert_names(f'{name}.0').down}"
            in_block = not config.block_prefixes or first.startswith(tuple(f"{p}." for p in config.block_prefixes))
            if inside or config.layer(first, in_block, stored.config_names(first)) is None:
                continue
        if fused:
            unfuse_experts(model.get_submodule(name.rpartition(".")[0]))
        experts = model.get_submodule(name)
        if isinstance(experts, LinearExperts):
            for index in range(experts.num_experts):
                experts.rename_layers(index, stored.expert_names(f"{name}.{index}"))
            if experts.layout.identity:
                # Some checkpoints have weights for identity experts, which no module reads.
                unread = [rf"^{re.escape(f'{name}.{weight}')}$" for weight in experts.layout.weights]
                ignore_unexpected_keys(model, unread)


def _check_dense_experts(model: nn.Module, layers: Mapping[str, LayerFormat], stored: StoredNames) -> None:
    """Raise ModelError when Transformers would not load the weight of an unquantized expert next to packed ones."""
    for prefix, module in model.named_modules():
        if not isinstance(module, LinearExperts):
            continue
        usual = {f"{prefix}.{layer}": f"{prefix}.{name}" for layer, name in module.default_names().items()}
        lost = next((n for n in usual if n not in layers and f"{n}.weight" in stored.fused_names), None)
        if lost is not None and any(n in layers for n in usual):
            raise ModelError(
                f"{stored.layers[lost]} is stored dense next to packed experts of the same block, and Transformers "
                f"fuses dense experts of that name; rename the layer to {usual[lost]} in the file and its config, or "
                "quantize all experts of a block"
            )


def build_layer(
    fmt: LayerFormat, weight: torch.Tensor, bias: bool, stored: Mapping[str, torch.dtype], g_idx: bool = False,
    backend: str = "",
) -> PackedLinear:  # fmt: skip
    """An empty module for a layer's layout.

    Args:
        weight: [out, in], for its shape, dtype and device; its values are not read.
        stored: dtypes of the checkpoint's tensors; without them, `g_idx` tells whether there may be one.
        backend: name of the chosen row; default: plain PyTorch.
    """
    kind: Any = ScaledMmLinear if backend == SCALED_MM else PackedLinear
    options: dict[str, Any] = {"bias": bias, "dtype": weight.dtype, "stored": stored, "device": weight.device}
    if isinstance(fmt.layout, GptqLayout):
        kind, options["g_idx"] = QuantLinear, "g_idx" in stored if stored else g_idx
    layer: PackedLinear = kind(int(weight.shape[1]), int(weight.shape[0]), fmt, **options)
    layer.backend = backend or layer.backend
    return layer
