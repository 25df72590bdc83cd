"""Static scales of keys, values and queries in a checkpoint: read into the model, and kept when it is saved again.

They are for runtimes with a key-value cache in FP8. Transformers has no such cache; nothing here uses them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from auto_round.inference.left_out import leave_out
from auto_round.modeling.attention import find_attention
from auto_round.modeling.tensor_files import StoredTensor

LEAVES = ("k_scale", "q_scale", "v_scale")


def accept_cache_scales(model: nn.Module, config: Any, files: Mapping[str, StoredTensor] | None) -> int:
    """Give attention modules a buffer for every scale that the checkpoint holds; returns how many.

    Args:
        model: the skeleton; buffers are put where its attention's parameters are, usually on meta.
        config: its `quantization_config`, a mapping or an object.
        files: the checkpoint's tensors; where they are not known and the config speaks of scales, they are left out
            when it is read, without a warning.
    """
    found = 0
    for attention in find_attention(model) if files is not None else ():
        where = next((p.device for p in attention.module.parameters()), torch.device("cpu"))
        for leaf in LEAVES:
            stored = (files or {}).get(f"{attention.name}.{leaf}")
            if stored is not None:
                empty = torch.empty(stored.shape, dtype=stored.dtype, device=where)
                attention.module.register_buffer(leaf, empty)
                found += 1
    values = config if isinstance(config, Mapping) else vars(config)
    if files is None and any(values.get(f"static_{what}_dtype") for what in ("kv", "attention")):
        leave_out(model, [rf"\.{leaf}$" for leaf in LEAVES])
    return found
