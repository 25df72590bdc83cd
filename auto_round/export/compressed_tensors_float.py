"""What compressed-tensors calls the small float types, and which of them its readers take.

| scheme | format | weights | inputs |
|---|---|---|---|
| MXFP4 | mxfp4-pack-quantized | float 4, group 32, E8M0 bytes | the same, dynamic |
| MXFP8 | mxfp8-quantized | float 8, group 32, E8M0 bytes | the same, dynamic |
| NVFP4 | nvfp4-pack-quantized | float 4, tensor_group 16, e4m3 scales | the same, dynamic "local" |
| FPW8A16 | naive-quantized | float 8, tensor | none |
| FP8_STATIC | float-quantized | float 8, channel | float 8, tensor, static |
| FP8_BLOCK | float-quantized | float 8, block | float 8, group 128, dynamic |

"local": the scales of groups are computed from each input, under a scale of the whole input that is fixed. The keys are
those of the library's `QuantizationArgs` (0.20), which refuses any other.
"""

from __future__ import annotations

from typing import Any

from auto_round.export.float_layouts import family_of, float_problem, has_input_global_scale, short_group
from auto_round.schemes import ActivationScheme, GroupSize, QuantizationScheme

MX_GROUP, NV_GROUP = 32, 16
_SCALE_DTYPES = {"mx_fp": "torch.uint8", "nv_fp": "torch.float8_e4m3fn"}
_GROUPS = {"mx_fp": MX_GROUP, "nv_fp": NV_GROUP}


def float_format(scheme: QuantizationScheme) -> str:
    """The library's name of a layer's layout."""
    family = family_of(scheme.data_type)
    if family == "mx_fp":
        return "mxfp4-pack-quantized" if scheme.bits == 4 else "mxfp8-quantized"
    if family == "nv_fp":
        return "nvfp4-pack-quantized"
    return "float-quantized" if scheme.quantizes_activations else "naive-quantized"


def float_weights(scheme: QuantizationScheme) -> dict[str, Any]:
    """The group's `weights`."""
    return _arguments(scheme.data_type, scheme.bits, scheme.group_size) | {"dynamic": False}


def float_inputs(scheme: QuantizationScheme) -> dict[str, Any] | None:
    """The group's `input_activations`."""
    activations = scheme.activations
    if activations is None:
        return None
    added: dict[str, Any] = {"dynamic": activations.dynamic}
    if family_of(activations.data_type) == "nv_fp":
        added = {"dynamic": "local", "observer": "static_minmax"}
    size = activations.group_size if activations.dynamic else 0
    found = _arguments(activations.data_type, activations.bits, size) | added
    if found["strategy"] == "channel":
        found["strategy"] = "token"
    return found


def _arguments(data_type: str, bits: int, size: GroupSize) -> dict[str, Any]:
    family = family_of(data_type)
    found: dict[str, Any] = {"group_size": None, "num_bits": bits, "symmetric": True, "type": "float"}
    if isinstance(size, tuple):
        return found | {"strategy": "block", "block_structure": list(size)}
    if family in _SCALE_DTYPES:
        strategy = "tensor_group" if family == "nv_fp" else "group"
        return found | {"strategy": strategy, "group_size": size, "scale_dtype": _SCALE_DTYPES[family]}
    if size > 0:
        return found | {"strategy": "group", "group_size": size}
    return found | {"strategy": "tensor" if size == 0 else "channel"}


def float_scheme_problem(scheme: QuantizationScheme) -> str | None:
    """Why the library cannot say a float scheme, or None."""
    problem = float_problem(scheme)
    if problem is not None:
        return problem
    problem = _type_problem("weights", scheme.data_type, scheme.group_size)
    activations = scheme.activations
    if problem is not None or activations is None:
        return problem
    return _type_problem("activations", activations.data_type, activations.group_size) or _inputs_problem(
        scheme, activations
    )


def _type_problem(what: str, data_type: str, size: GroupSize) -> str | None:
    family = family_of(data_type)
    if family == "mx_int":
        return f"compressed-tensors has no {what} of data type {data_type!r}"
    if "e5m2" in data_type:
        return f"compressed-tensors has no e5m2 {what}, only e4m3"
    wanted = _GROUPS.get(str(family))
    if wanted is not None and size != wanted:
        return f"{what} of data type {data_type!r} need groups of {wanted} in compressed-tensors, not {size}"
    return None


def _inputs_problem(scheme: QuantizationScheme, activations: ActivationScheme) -> str | None:
    if not isinstance(activations.group_size, int):
        return f"activations have scales for groups along the input, not blocks of {activations.group_size}"
    if family_of(activations.data_type) == "nv_fp" and not has_input_global_scale(scheme):
        return (
            "its readers need a global scale of the inputs that is fixed: use act_data_type nv_fp4_with_static_gs, not "
            f"{activations.data_type}"
        )
    return None


def float_layer_problem(scheme: QuantizationScheme, in_features: int) -> str | None:
    """Why the library's readers do not take a layer of this width, or None. Blocks may be short of rows only."""
    reason = short_group(scheme, in_features)
    if reason is not None:
        return reason
    sizes = [("group size", scheme.group_size if isinstance(scheme.group_size, int) else scheme.group_size[1])]
    activations = scheme.activations
    if activations is not None and activations.dynamic and isinstance(activations.group_size, int):
        sizes.append(("activation group size", activations.group_size))
    for what, size in sizes:
        if size > 0 and in_features % size:
            return f"in_features={in_features} is not a multiple of the {what} {size}, which its readers ask for"
    return None
