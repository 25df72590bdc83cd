"""Which quantized checkpoints can be read as models to quantize, and how their tensors are found.

| quant_method | weights |
|---|---|
| fp8, fbgemm_fp8 | float8 `weight` with `weight_scale_inv` or `weight_scale`: blocks, channels or one scale |
| modelopt | the same, algorithms FP8, FP8_PER_CHANNEL_PER_TOKEN, FP8_PB_WO |
| compressed-tensors | float-quantized, naive-quantized (8-bit floats), mxfp8-quantized, mxfp4-pack-quantized |
| mxfp4 | `*_blocks` and `*_scales` of experts |

The tensors decide what is dequantized; the configuration only says what has to be expected.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from auto_round.errors import ModelError, UnsupportedError
from auto_round.modeling.config_values import read_value, text_config
from auto_round.modeling.dequantize import is_float8
from auto_round.modeling.dequantized_files import DequantizedFiles, StoredWeight
from auto_round.modeling.json_text import read_object
from auto_round.modeling.links import inside
from auto_round.modeling.tensor_files import TensorFiles

READABLE = (
    "FP8 (quant_method fp8, fbgemm_fp8, modelopt; compressed-tensors float-quantized, naive-quantized and "
    "mxfp8-quantized) and MXFP4 (quant_method mxfp4; compressed-tensors mxfp4-pack-quantized)"
)
_CONFIG_KEYS = ("quantization_config", "compression_config")
_MODELOPT = ("FP8", "FP8_PER_CHANNEL_PER_TOKEN", "FP8_PB_WO")
_COMPRESSED = ("float-quantized", "naive-quantized", "mxfp8-quantized", "mxfp4-pack-quantized", "dense")
# What follows a weight's own name, or replaces its last part, in the name of its scale. All of them are multiplied.
_SCALES = ("{name}_scale_inv", "{name}_scale", "{stem}.scale", "{stem}.qscale_weight")
# Other tensors beside a quantized weight; a dense checkpoint has none of them.
_BESIDE = (
    "input_scale", "activation_scale", "output_scale", "qscale_act", "weight_shape", "input_global_scale",
    "weight_scale_2", "weight_zero_point", "input_zero_point",
)  # fmt: skip


def quantization_of(config: Any) -> dict[str, Any] | None:
    """The quantization that a model's configuration declares, for the whole or for its text part; None for none.

    Raises ModelError when it is no object.
    """
    text = text_config(config)
    for part in (config, text):
        for key in _CONFIG_KEYS:
            values = read_value(part, key)
            if values is None:
                continue
            if not isinstance(values, Mapping) and not hasattr(values, "to_dict"):
                raise ModelError(f"config.json has {key}={values!r}, which is no object; fetch it again")
            return dict(values) if isinstance(values, Mapping) else dict(values.to_dict())
    return None


def drop_quantization(config: Any) -> None:
    """Take the declaration away, in place: the model that is built from the configuration is a dense one."""
    text = text_config(config)
    for part in (config, text):
        for key in _CONFIG_KEYS:
            if hasattr(part, key):
                delattr(part, key)


def check_readable(declared: Mapping[str, Any] | None, name: str) -> None:
    """Raise UnsupportedError when checkpoints with this `quantization_config` are not read; `name` is the model's."""
    if declared is None:
        return
    try:
        reason = _refusal(declared)
        _block(declared)
    except (TypeError, ValueError, AttributeError, KeyError) as error:
        raise ModelError(
            f"the quantization_config of {name} is malformed ({error!r}); fetch config.json again"
        ) from error
    if reason is not None:
        raise UnsupportedError(
            f"{name} is quantized already ({reason}), and is not read: give the original model. Quantized checkpoints "
            f"that are read: {READABLE}"
        )


def is_readable(declared: Mapping[str, Any] | None) -> bool:
    """Whether there is a declaration, of weights that are read as dense ones."""
    return declared is not None and _refusal(declared) is None


def dense_view(
    files: TensorFiles, declared: Mapping[str, Any] | None, dtype: torch.dtype | None
) -> DequantizedFiles | None:
    """The files as a dense checkpoint in `dtype` (default bfloat16), or None when they are one.

    Args:
        declared: the `quantization_config`, which `check_readable` has passed. Without one, float8 weights that have a
            scale beside them are dequantized all the same: some writers put the declaration into a file of its own.

    Raises:
        ModelError: a quantized weight without its scale, or shapes that do not belong together.
        UnsupportedError: that other file declares what is not read.
    """
    if declared is None:
        declared = _modelopt_file(files)
        check_readable(declared, str(files.folder))
    block = _block(declared or {})
    weights: dict[str, StoredWeight] = {}
    for key, stored in files.tensors.items():
        if is_float8(stored.dtype) and len(stored.shape) > 1:
            scale = _scale_of(key, files)
            if scale is not None:
                weights[key] = StoredWeight(key, scale, "float8", block)
            elif declared is not None:
                raise ModelError(
                    f"{stored.file}: the FP8 tensor {key!r} has no scale (looked for "
                    f"{', '.join(p.format(name=key, stem=_stem(key)) for p in _SCALES)}); fetch the files again"
                )
        elif key.endswith("_blocks") and len(stored.shape) == 4 and f"{key[:-7]}_scales" in files:
            weights[key[:-7]] = StoredWeight(key, f"{key[:-7]}_scales", "mxfp4_experts")
        elif key.endswith(".weight_packed") and stored.dtype == torch.uint8 and f"{_stem(key)}.weight_scale" in files:
            weights[f"{_stem(key)}.weight"] = StoredWeight(key, f"{_stem(key)}.weight_scale", "mxfp4")
    if not weights:
        if declared is not None:
            raise ModelError(
                f"config.json in {files.folder} declares a quantization ({_method(declared)}), but no quantized tensor "
                "is in its files; fetch them again, or take quantization_config out of config.json"
            )
        return None
    hidden = {f"{_stem(name)}.{leaf}" for name in weights for leaf in _BESIDE}
    return DequantizedFiles(files, weights, hidden, dtype or torch.bfloat16, _describe(files, weights))


def _refusal(declared: Mapping[str, Any]) -> str | None:
    """What is declared, where it is not read."""
    method = _method(declared)
    if method in ("fp8", "fbgemm_fp8"):
        return f"{method} with experts in fp4" if declared.get("expert_dtype") == "fp4" else None
    if method == "mxfp4":
        return None
    if method == "modelopt":
        algorithm = str(declared.get("quant_algo") or dict(declared.get("quantization") or {}).get("quant_algo"))
        return None if algorithm.upper() in _MODELOPT else f"modelopt {algorithm}"
    if method == "compressed-tensors":
        return _compressed_refusal(declared)
    bits = declared.get("bits", declared.get("w_bit"))
    return f"{method or 'quant_method not given'}{f', {bits} bits' if bits else ''}"


def _compressed_refusal(declared: Mapping[str, Any]) -> str | None:
    groups = [g for g in dict(declared.get("config_groups") or {}).values() if isinstance(g, Mapping)]
    top = declared.get("format")
    formats = {str(group.get("format") or top) for group in groups} or {str(top)}
    unread = sorted(formats - set(_COMPRESSED))
    if unread:
        return f"compressed-tensors {', '.join(unread)}"
    for group in groups:
        weights = group.get("weights") or {}
        if weights and weights.get("type") != "float":
            return f"compressed-tensors {group.get('format') or top} of integers"
    if dict(declared.get("transform_config") or {}).get("config_groups"):
        return "compressed-tensors with rotations"
    sparsity = dict(declared.get("sparsity_config") or {})
    if str(sparsity.get("format") or "dense") != "dense":
        return f"compressed-tensors with sparse weights, {sparsity['format']}"
    return None


def _method(declared: Mapping[str, Any]) -> str:
    method = declared.get("quant_method")
    return str(getattr(method, "value", method) or "").lower()


def _block(declared: Mapping[str, Any]) -> tuple[int, int] | None:
    """The one size of two-dimensional blocks that is declared, None for none or for several."""
    found = {tuple(size) for size in (declared.get("weight_block_size"),) if size}
    for group in dict(declared.get("config_groups") or {}).values():
        size = dict(group.get("weights") or {}).get("block_structure")
        found |= {tuple(int(n) for n in size.split("x")) if isinstance(size, str) else tuple(size)} if size else set()
    sizes = [size for size in found if len(size) == 2]
    return (int(sizes[0][0]), int(sizes[0][1])) if len(sizes) == 1 else None


def _modelopt_file(files: TensorFiles) -> dict[str, Any] | None:
    """What ModelOpt's own file beside config.json declares."""
    file = files.folder / "hf_quant_config.json"
    if not file.is_file():
        return None
    return {"quant_method": "modelopt", **read_object(inside(files.folder, file))}


def _scale_of(key: str, files: TensorFiles) -> str | None:
    names = (pattern.format(name=key, stem=_stem(key)) for pattern in _SCALES)
    return next((name for name in names if name in files), None)


def _stem(key: str) -> str:
    return key.rpartition(".")[0]


def _describe(files: TensorFiles, weights: Mapping[str, StoredWeight]) -> str:
    kinds: dict[str, int] = {}
    for weight in weights.values():
        stored = files.tensors[weight.codes]
        kind = "MXFP4" if weight.layout != "float8" else f"FP8 {str(stored.dtype).removeprefix('torch.float8_')[:4]}"
        kinds[kind] = kinds.get(kind, 0) + 1
    return " and ".join(f"{count} tensors in {kind}" for kind, count in sorted(kinds.items()))
