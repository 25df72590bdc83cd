"""A GPTQ or AWQ config in AutoRound's words, for a model that is saved again.

Transformers saves such a config with quant_method "auto-round", and readers of that look for `packing_format`,
`block_name_to_quantize` and `extra_config` only.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from auto_round.inference.config_reader import FOREIGN_KEYS, LayerFormat, is_foreign, packing_format_of, read_config
from auto_round.inference.qlinear import QuantLinear
from auto_round.inference.stored_names import StoredNames
from auto_round.modeling.blocks import find_blocks, linear_names

_DROPPED = (*FOREIGN_KEYS, "damp_percent", "lm_head", "quant_block_list", "to_quant_block_names", "true_sequential")


def restate_config(model: nn.Module, names: Callable[[], StoredNames]) -> None:
    """Rewrite `model.config.quantization_config` in place when it is an object that speaks GPTQ's or AWQ's language.
    None keeps the backend that was asked for: a saved model may be opened where there are others.

    A plain mapping is left alone: it belongs to somebody who has not passed it through Transformers.

    Args:
        names: reads what the files call the layers; Transformers saves them under those names again.
    """
    stored = getattr(getattr(model, "config", None), "quantization_config", None)
    if stored is None or isinstance(stored, dict):
        return
    if getattr(stored, "backend", None):
        stored.backend = "auto"
    if not is_foreign(stored):
        return
    default = read_config(stored).default
    blocks = find_blocks(model)
    inside = tuple(f"{block}." for block in blocks)
    extra: dict[str, dict[str, Any]] = {name: {"bits": 16} for name in linear_names(model) if name.startswith(inside)}
    for name, module in model.named_modules():
        if isinstance(module, QuantLinear):
            extra.pop(name, None)
            if module.format != default or not name.startswith(inside):
                extra[name] = _entry(module.format)
    for key in _DROPPED:
        if hasattr(stored, key):
            delattr(stored, key)
    stored.bits, stored.group_size, stored.sym = default.bits, default.group_size, default.sym
    stored.data_type, stored.packing_format = "int", packing_format_of(default)
    stored.block_name_to_quantize = ",".join(dict.fromkeys(block.rpartition(".")[0] for block in blocks))
    if extra:
        called = names().layers
        stored.extra_config = {called.get(name, name): entry for name, entry in extra.items()}


def _entry(fmt: LayerFormat) -> dict[str, Any]:
    return {
        "bits": fmt.bits, "group_size": fmt.group_size, "sym": fmt.sym, "data_type": "int",
        "packing_format": packing_format_of(fmt),
    }  # fmt: skip
