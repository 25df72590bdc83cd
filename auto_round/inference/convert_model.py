"""Replace a Transformers model's quantized layers by packed ones: the hooks that `from_pretrained` calls.

Before the weights are read, `convert_hf_model` replaces the quantized layers of the empty model by modules whose
buffers are named as in the files; afterwards `post_init` checks that all of them were filled.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Container, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from auto_round.errors import ConfigError, DeviceError, ModelError
from auto_round.inference.config import (
    GPTQ_AWQ_KEYS,
    PACKINGS,
    CheckpointConfig,
    LayerFormat,
    PluginPacking,
    is_gptq_or_awq,
    read_config,
    resolve_layers,
)
from auto_round.inference.linear import PackedLinear, QuantLinear, ScaledMmLinear, enable_grouped_experts
from auto_round.inference.table import OWN_CPU, SCALED_MM, available_devices, choose_backends
from auto_round.layouts.integers import GptqLayout
from auto_round.logger import ensure_logging, logger
from auto_round.modeling.attention import find_attention
from auto_round.modeling.blocks import find_blocks, linear_names, weight_2d
from auto_round.modeling.experts import LinearExperts, is_fused_experts, unfuse_experts
from auto_round.modeling.files.safetensors import StoredTensor, TensorFiles
from auto_round.modeling.tensor_map import DEFAULT_EXPERT_NAMES, Conversions, ExpertLayerNames, conversions_of
from auto_round.plugins import load_plugins

_EXPERT = re.compile(r"^(?P<experts>(?:.*\.)?experts)\.(?P<index>\d+)\.(?P<leaf>[^.]+)")
CACHE_SCALE_NAMES = ("k_scale", "q_scale", "v_scale")
_DROPPED_KEYS = (
    *GPTQ_AWQ_KEYS, "damp_percent", "lm_head", "quant_block_list", "to_quant_block_names", "true_sequential",
)  # fmt: skip


def infer_target_device(device_map: object = None) -> str:
    """The kind of device ("cuda") of a `device_map`: the first accelerator. Raises DeviceError if it is none."""
    here = available_devices()
    if device_map is None:  # on a Gaudi machine, users move the loaded model to the accelerator
        return "hpu" if "hpu" in here else "cpu"
    if isinstance(device_map, dict):
        kinds = [infer_target_device(value) for value in device_map.values() if value not in ("disk", "meta")]
        return next((kind for kind in kinds if kind != "cpu"), "cpu")
    if isinstance(device_map, torch.device):
        return device_map.type
    if isinstance(device_map, bool) or not isinstance(device_map, (int, str)):
        raise DeviceError(f"device_map={device_map!r} is not a device, a number, 'auto' or a map of modules to devices")
    number = isinstance(device_map, int) or device_map.isdigit()
    if number or device_map in ("auto", "balanced", "balanced_low_0", "sequential"):
        return next((kind for kind in here if kind != "cpu"), "cuda" if number else "cpu")
    return str(device_map).split(":")[0]


def convert_hf_model(model: Any, target_device: str = "cpu") -> tuple[Any, list[str]]:
    """Replace the quantized layers of `model`, usually on meta, in place. Returns (model, names of the backends used).
    Its `config.quantization_config` describes the checkpoint. Raises ConfigError when there is none, ModelError when
    config and files contradict each other, UnsupportedError for a data type, packing or backend that cannot be run."""
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
        if (reason := fmt.layout.mismatch(fmt.scheme, int(weight.shape[1]), int(weight.shape[0]))) is not None:
            raise ModelError(f"{name} cannot be stored as the quantization_config says: {reason}")
        dtypes = {leaf: tensor.dtype for leaf, tensor in leaves.items()}
        new = build_layer(fmt, weight, getattr(old, "bias", None) is not None, dtypes, config.g_idx, backend.name)
        if leaves:
            check_tensors(name, new, leaves)
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
    """Check that packed layers got their tensors (else ModelError), start kernels, and normalize the config."""
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
                raise _missing(f"{name}.{leaf}")
            module.g_idx = module.default_g_idx(tensor.device)
        if module.is_loaded:
            module.prepare(name)
            if isinstance(module, QuantLinear):
                module.start_kernel(name)
    enable_grouped_experts(model)
    normalize_saved_config(model, lambda: read_names(model, checkpoint_tensors(model)))


def _missing(tensor_name: str) -> ModelError:
    return ModelError(
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


def check_tensors(name: str, layer: PackedLinear, leaves: Mapping[str, StoredTensor]) -> None:
    """Raise ModelError when the tensors of the file are not those that a layer has."""
    scheme = layer.format.scheme
    for leaf in layer.leaves:
        wanted = layer.get_buffer(leaf)
        if leaf not in leaves:
            raise _missing(f"{name}.{leaf}")
        if leaves[leaf].shape != tuple(wanted.shape):
            raise ModelError(
                f"tensor {name}.{leaf} has shape {list(leaves[leaf].shape)}, but its quantization_config "
                f"({scheme.bits} bits, group size {scheme.group_size}) asks for {list(wanted.shape)}"
            )
        if leaves[leaf].dtype != wanted.dtype:
            raise ModelError(
                f"tensor {name}.{leaf} is {leaves[leaf].dtype}, but layout {layer.format.packing} of its "
                f"quantization_config has {wanted.dtype}"
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
    """An empty module with the layout `fmt` and the shape, dtype and device of `weight`; `stored`: dtypes in the
    file."""
    kind: Any = ScaledMmLinear if backend == SCALED_MM else PackedLinear
    options: dict[str, Any] = {"bias": bias, "dtype": weight.dtype, "stored": stored, "device": weight.device}
    if isinstance(fmt.layout, GptqLayout):
        kind, options["g_idx"] = QuantLinear, "g_idx" in stored if stored else g_idx
    layer: PackedLinear = kind(int(weight.shape[1]), int(weight.shape[0]), fmt, **options)
    layer.backend = backend or layer.backend
    return layer


class StoredNames:
    """The tensors of a checkpoint and their names. Build it with `read_names`."""

    def __init__(
        self, tensors: dict[str, StoredTensor] | None, mapping: Conversions,
        layers: Mapping[str, str] | None = None, fused_names: Container[str] = (),
    ) -> None:  # fmt: skip
        """By their names in the model: the tensors, if the files can be found; the names in the files of modules where
        they differ; dense tensors that Transformers would fuse. `mapping` are its conversions."""
        self.tensors, self.layers, self.fused_names = tensors, layers or {}, fused_names
        # The tensors of each module that has any in the files, by their names in the module.
        self.modules: dict[str, dict[str, StoredTensor]] = {}
        for name, tensor in (tensors or {}).items():
            module, _, leaf = name.rpartition(".")
            self.modules.setdefault(module, {})[leaf] = tensor
        self._inverse = mapping.inverse()
        self._family_leaves = mapping.expert_names() or DEFAULT_EXPERT_NAMES
        own, matches = set(self._family_leaves) - set(DEFAULT_EXPERT_NAMES), map(_EXPERT.match, self.modules)
        self._family_experts = {m["experts"] for m in matches if m is not None and m["leaf"] in own}

    def config_names(self, layer: str) -> tuple[str, ...]:
        """The names that a quantization_config may use for the module `layer`, the most likely first."""
        names = [self.layers[layer]] if layer in self.layers else []
        expert = _EXPERT.match(layer)
        if expert is None:
            names.append(self._inverse.renamed(f"{layer}.weight").removesuffix(".weight"))
        elif self.tensors is None or expert["experts"] in self._family_experts:
            own = dict(zip(DEFAULT_EXPERT_NAMES, self._family_leaves, strict=True)).get(expert["leaf"], expert["leaf"])
            container = self.layers.get(expert["experts"]) or self._inverse.renamed(expert["experts"])
            names.append(f"{container}.{expert['index']}.{own}")
        return tuple(dict.fromkeys((*names, layer)))

    def expert_names(self, expert: str) -> ExpertLayerNames:
        """The names in the files of the matrices of the module `expert`, such as `model.layers.0.mlp.experts.0`."""
        if self.tensors is None:
            return self._family_leaves
        pairs = zip(self._family_leaves, DEFAULT_EXPERT_NAMES, strict=True)
        return ExpertLayerNames(*(own if f"{expert}.{own}" in self.modules else usual for own, usual in pairs))


def read_names(model: nn.Module, files: Mapping[str, StoredTensor] | None) -> StoredNames:
    """Map `files`, the tensors of a checkpoint by their names there, to the names in `model`: Transformers renames what
    it reads, as Mixtral's `block_sparse_moe.experts.0.w1`, and a quantization_config uses the names in the files."""
    if files is None:
        return StoredNames(None, conversions_of(model, legacy=False))
    from transformers.core_model_loading import dot_natural_key

    mapping = conversions_of(model)
    modules = {name for name, _ in model.named_modules()}
    tensors: dict[str, StoredTensor] = {}
    layers: dict[str, str] = {}
    fused_names: set[str] = set()
    for key in sorted(files, key=dot_natural_key):
        name = mapping.renamed(key)
        if mapping.prefix is not None and not _names_module(name, modules):
            # The base model's prefix is added or removed if only that names a module.
            front = f"{mapping.prefix}."
            other = name.removeprefix(front) if name.startswith(front) else front + name
            name = other if _names_module(other, modules) else name
        if name != key and _names_module(key, modules) and not _names_module(name, modules):
            name = key  # as Transformers does
        tensors.setdefault(name, files[key])
        if name == key:
            continue
        module, stored = name.rpartition(".")[0], key.rpartition(".")[0]
        layers.setdefault(module, stored)
        expert, stored_expert = _EXPERT.match(module), _EXPERT.match(stored)
        if expert is not None and stored_expert is not None:
            layers.setdefault(expert["experts"], stored_expert["experts"])
        if mapping.converter_of(name) is not None:
            fused_names.add(name)
    return StoredNames(tensors, conversions_of(model, legacy=False), layers, fused_names)


def _names_module(tensor: str, modules: set[str]) -> bool:
    expert = _EXPERT.match(tensor)
    return tensor.rpartition(".")[0] in modules or (expert is not None and expert["experts"] in modules)


def checkpoint_tensors(model: Any) -> dict[str, StoredTensor] | None:
    """Names, shapes and dtypes of the checkpoint's tensors, or None when its files cannot be found again."""
    config = model.config
    where = getattr(config, "name_or_path", None) or getattr(config, "_name_or_path", None)
    if not where:
        return None
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    folder, revision = Path(where), getattr(config, "_commit_hash", None)
    try:
        if not folder.is_dir():
            folder = Path(snapshot_download(str(where), revision=revision, local_files_only=True))
        return TensorFiles.open(folder).tensors
    except (HFValidationError, LocalEntryNotFoundError, ModelError) as error:
        logger.debug("checkpoint not inspected: %s", error)
        return None


def ignore_unexpected_keys(model: Any, patterns: Iterable[str]) -> None:
    """Ignore tensors whose names match one of these regular expressions when this model is loaded."""
    # Transformers adds patterns of its own: to a list in 5.3 to 5.8, in 5.12 and newer to a set.
    key = "_keys_to_ignore_on_load_unexpected"
    before = getattr(model, key, None)
    merged = dict.fromkeys([*(before or ()), *patterns])
    setattr(model, key, set(merged) if isinstance(before, (set, frozenset)) else list(merged))


def register_cache_scales(model: nn.Module, config: Any, files: Mapping[str, StoredTensor] | None) -> int:
    """Register buffers for static cache scales in `files`, to save them again; returns how many."""
    if files is None:
        values = config if isinstance(config, Mapping) else vars(config)
        if any(values.get(f"static_{what}_dtype") for what in ("kv", "attention")):
            ignore_unexpected_keys(model, [rf"\.{leaf}$" for leaf in CACHE_SCALE_NAMES])
        return 0
    found = 0
    for attention in find_attention(model):
        device = next((p.device for p in attention.module.parameters()), torch.device("cpu"))
        for leaf in CACHE_SCALE_NAMES:
            if (stored := files.get(f"{attention.name}.{leaf}")) is not None:
                empty = torch.empty(stored.shape, dtype=stored.dtype, device=device)
                attention.module.register_buffer(leaf, empty)
                found += 1
    return found


def normalize_saved_config(model: nn.Module, names: Callable[[], StoredNames]) -> None:
    """Give a `quantization_config` with GPTQ's or AWQ's keys AutoRound's, which its readers use when Transformers saves
    it as "auto-round". A plain mapping is not changed. `names` reads the names in the files, which layers get again."""
    stored = getattr(getattr(model, "config", None), "quantization_config", None)
    if stored is None or isinstance(stored, dict):
        return
    if getattr(stored, "backend", None):
        stored.backend = "auto"  # a saved model may be opened on another machine
    if not is_gptq_or_awq(stored):
        return
    default = read_config(stored).default
    blocks = find_blocks(model)
    inside = tuple(f"{block}." for block in blocks)
    extra: dict[str, dict[str, Any]] = {name: {"bits": 16} for name in linear_names(model) if name.startswith(inside)}
    for name, module in model.named_modules():
        if isinstance(module, QuantLinear):
            extra.pop(name, None)
            if module.format != default or not name.startswith(inside):
                extra[name] = _layer_entry(module.format)
    for key in _DROPPED_KEYS:
        if hasattr(stored, key):
            delattr(stored, key)
    for key, value in _layer_entry(default).items():
        setattr(stored, key, value)
    stored.block_name_to_quantize = ",".join(dict.fromkeys(block.rpartition(".")[0] for block in blocks))
    if extra:
        file_names = names().layers
        stored.extra_config = {file_names.get(name, name): entry for name, entry in extra.items()}


def _layer_entry(fmt: LayerFormat) -> dict[str, Any]:
    """AutoRound's keys for a layer in GPTQ or AWQ layout."""
    scheme = fmt.scheme
    return {
        "bits": scheme.bits, "group_size": scheme.group_size, "sym": scheme.sym, "data_type": "int",
        "packing_format": fmt.packing_format,
    }  # fmt: skip
