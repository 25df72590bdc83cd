"""Helpers for scripts, under the names of AutoRound 0.x: get and set modules by name, find blocks, load a model."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from auto_round.errors import ConfigError, ModelError, first_line
from auto_round.later import DIFFUSION, MULTIMODAL, refuse
from auto_round.layer_config import parse_layer_config as parse_layer_config_arg
from auto_round.modeling.blocks import get_lm_head_name
from auto_round.modeling.files.folder import model_folder
from auto_round.modeling.source import resolve_dtype
from auto_round.run.settings import names_tuple, resolve_device

_TOWERS = ("vision", "visual", "image", "img", "audio", "speech")


def get_module(module: torch.nn.Module, key: str) -> torch.nn.Module | None:
    """The submodule called `key`, or None."""
    try:
        return module.get_submodule(key)
    except AttributeError:
        return None


def set_module(model: torch.nn.Module, key: str, new_module: torch.nn.Module) -> None:
    """Replace or add the submodule `key`. Does nothing when its parent does not exist."""
    parent = get_module(model, key.rpartition(".")[0])
    if parent is not None:
        setattr(parent, key.rpartition(".")[2], new_module)


def get_attr(module: Any, key: str) -> Any:
    """The attribute at a dotted name, such as a parameter `layers.0.weight`, or None."""
    for name in key.split("."):
        module = getattr(module, name, None)
    return module


def set_attr(model: Any, key: str, new_attr: Any) -> None:
    """Set the attribute at a dotted name. Does nothing when its parent does not exist."""
    parent, _, name = key.rpartition(".")
    owner = get_attr(model, parent) if parent else model
    if owner is not None:
        setattr(owner, name, new_attr)


def get_block_names(model: torch.nn.Module, quant_vision: bool = False) -> list[list[str]]:
    """Names of the members of every outermost ModuleList, one list for each; without vision and audio towers, unless
    `quant_vision`."""
    found = list(_outermost_lists(model, ""))
    if quant_vision or is_pure_text_model(model):
        return found
    return [names for names in found if not any(word in names[0].lower() for word in _TOWERS)]


def _outermost_lists(module: torch.nn.Module, prefix: str) -> Iterator[list[str]]:
    children = {prefix + name: child for name, child in module.named_children()}
    if not isinstance(module, torch.nn.ModuleList):
        for name, child in children.items():
            yield from _outermost_lists(child, f"{name}.")
    elif children:
        yield list(children)


def find_matching_blocks(
    model: torch.nn.Module, all_blocks: Sequence[Sequence[str]], to_quant_block_names: str | Sequence[Any] | None
) -> Sequence[Sequence[str]]:
    """The blocks of `all_blocks` that match a comma-separated string of names or regular expressions, all for None; a
    list of names is returned unchanged. Raises ConfigError when nothing matches."""
    if not to_quant_block_names:
        return all_blocks
    if not isinstance(to_quant_block_names, str):
        return to_quant_block_names
    patterns = names_tuple(to_quant_block_names)
    found = [[block for pattern in patterns for block in blocks if re.search(pattern, block)] for blocks in all_blocks]
    if not any(found):
        raise ConfigError(
            f"to_quant_block_names={to_quant_block_names!r} matches none of the blocks; give None for all of them"
        )
    return [blocks for blocks in found if blocks]


def is_pure_text_model(model: torch.nn.Module) -> bool:
    """Whether the model's only inputs are token ids."""
    return not hasattr(getattr(model, "config", None), "vision_config") and all(
        getattr(kind, "main_input_name", "input_ids") == "input_ids"
        and not any(word in str(kind).lower() for word in ("vision", "image", "img"))
        for kind in map(type, model.modules())
    )


def get_major_device(device_map: Any = None) -> str:
    """The first device of a `device_map`: "cuda:0" for "0,1". Raises DeviceError for a device that does not exist."""
    if isinstance(device_map, Mapping):
        device_map = next(iter(device_map.values()), None)
    if isinstance(device_map, (list, tuple)):
        device_map = device_map[0] if device_map else None
    if isinstance(device_map, str):
        device_map = device_map.split(",")[0].strip()
    return str(resolve_device(device_map))


def llm_load_model(
    pretrained_model_name_or_path: str, platform: str = "hf", trust_remote_code: bool = False,
    model_dtype: str | None = None, device: Any = "cpu", **kwargs: Any,
) -> tuple[torch.nn.Module, Any]:  # fmt: skip
    """Load a causal language model completely, in evaluation mode. Returns (model, tokenizer).

    `model_dtype` None is the checkpoint's. `trust_remote_code` runs the model's own code, in AutoRound 0.x by default.
    `kwargs` are for `from_pretrained`. Raises ModelError for a model and DeviceError for a device that cannot be used.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    target = get_major_device(device)
    folder = model_folder(pretrained_model_name_or_path, trust_remote_code=trust_remote_code, platform=platform)
    dtype = kwargs.pop("dtype", kwargs.pop("torch_dtype", None)) or resolve_dtype(model_dtype) or "auto"
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, trust_remote_code=trust_remote_code, **kwargs)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ModelError(f"{pretrained_model_name_or_path!r} cannot be opened: {first_line(error)}") from error
    return model.to(target).eval(), tokenizer


def mllm_load_model(*args: Any, **kwargs: Any) -> None:
    """Raises UnsupportedError: this version does not support multimodal models."""
    refuse(MULTIMODAL, "mllm_load_model")


def diffusion_load_model(*args: Any, **kwargs: Any) -> None:
    """Raises UnsupportedError: this version does not support diffusion models."""
    refuse(DIFFUSION, "diffusion_load_model")


__all__ = [
    "diffusion_load_model", "find_matching_blocks", "get_attr", "get_block_names", "get_lm_head_name",
    "get_major_device", "get_module", "is_pure_text_model", "llm_load_model", "mllm_load_model",
    "parse_layer_config_arg", "set_attr", "set_module",
]  # fmt: skip
