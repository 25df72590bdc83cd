"""The model families that can be written as GGUF: the constants of this folder's modules, and those of plugins."""

from __future__ import annotations

from auto_round.gguf.families import layer_norm, rms_norm
from auto_round.gguf.family import FAMILIES, Family, register_family

for _module in (layer_norm, rms_norm):
    for _value in vars(_module).values():
        if isinstance(_value, Family):
            register_family(_value)

__all__ = ["FAMILIES", "register_family"]
