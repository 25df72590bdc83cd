"""What the `auto_round` formats say about layers of the small float types.

| layer | packing_format |
|---|---|
| mx_fp, nv_fp | auto_round:llm_compressor |
| mx_int | auto_round |
| fp with static activations | auto_round:fp8_static |
| fp otherwise | auto_round:fp8 |

Transformers 5.23 takes a config only when its `group_size` is -1 or a positive number, so that blocks and whole tensors
are told beside it: `weight_block_size` [rows, columns], `weight_strategy` "tensor". vLLM's loader in turn wants
`group_size` [128, 128] for blocks; the file `quantization_config.json` has it so. Entries of `extra_config` are read by
neither's checks and hold the scheme as it is.
"""

from __future__ import annotations

from typing import Any

from auto_round.export.float_layouts import element_of, family_of, is_float
from auto_round.schemes import QuantizationScheme

LLM_COMPRESSOR, FP8_STATIC, FP8, PLAIN = (
    "auto_round:llm_compressor", "auto_round:fp8_static", "auto_round:fp8", "auto_round"
)  # fmt: skip


def float_packing(scheme: QuantizationScheme) -> str:
    """The `packing_format` in which a float layer is written."""
    family, activations = family_of(scheme.data_type), scheme.activations
    if family == "fp":
        return FP8_STATIC if activations is not None and not activations.dynamic else FP8
    return PLAIN if family == "mx_int" else LLM_COMPRESSOR


def whole_group_size(scheme: QuantizationScheme) -> int | list[int]:
    """`group_size` as it is."""
    return list(scheme.group_size) if isinstance(scheme.group_size, tuple) else scheme.group_size


def accepted_group_size(scheme: QuantizationScheme) -> int:
    """`group_size` as Transformers' config class takes it: columns of a block, -1 for a whole tensor."""
    size = scheme.group_size
    return size[1] if isinstance(size, tuple) else size or -1


def float_values(scheme: QuantizationScheme) -> dict[str, Any]:
    """Keys beside the usual ones when the default scheme is a float one."""
    if not is_float(scheme):
        return {}
    found: dict[str, Any] = {}
    if family_of(scheme.data_type) == "fp":
        activations = scheme.activations
        static = activations is not None and not activations.dynamic
        found = {"activation_scheme": "static" if static else "dynamic"}
        found["fmt"] = element_of(scheme.data_type, scheme.bits)
    if isinstance(scheme.group_size, tuple):
        found["weight_block_size"] = list(scheme.group_size)
    elif scheme.group_size == 0:
        found["weight_strategy"] = "tensor"
    return found
