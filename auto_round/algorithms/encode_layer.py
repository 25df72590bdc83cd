"""Encode a layer's weight with given scales and rounding deltas into a `QuantizedLayer`. All codes are made here."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from auto_round.algorithms.base import LayerTask
from auto_round.codecs.block_float import BlockFloatSpec, Encoded, block_float_spec, encode
from auto_round.codecs.ggml.types import GGML_TYPES, GgmlBlocks, GgmlType, ggml_type_of
from auto_round.codecs.int import QuantParams, round_groups, stored_codes, to_codes
from auto_round.codecs.quantized_layer import QuantizedLayer
from auto_round.codecs.registry import reshape_pad_tensor_by_group_size
from auto_round.data_type import get_quant_func
from auto_round.errors import NumericsError
from auto_round.schemes import QuantizationScheme

# Weights rounded at once: few enough for a shared cache, without a float32 copy of a whole layer; many enough to hide
# the cost of PyTorch calls.
_ROWS = 1 << 20
_GPU_ROWS = 1 << 26


def is_integer(scheme: QuantizationScheme) -> bool:
    """True for the built-in integer type with one-dimensional groups, whose codes are stored."""
    return scheme.data_type == "int" and isinstance(scheme.group_size, int)


def minifloat_spec(scheme: QuantizationScheme) -> BlockFloatSpec | None:
    """The built-in small float type of a scheme, whose codes are stored, or None."""
    return block_float_spec(scheme.data_type, scheme.bits)


def ggml_type_for(task: LayerTask) -> GgmlType | None:
    """The ggml type that stores a layer: the planned one, or the one its scheme describes if its width fills blocks;
    else None."""
    if task.ggml is not None:
        return GGML_TYPES[task.ggml]
    if task.scheme.data_type == "int":
        return None
    kind = ggml_type_of(task.scheme)
    return kind if kind is not None and task.weight.shape[1] % kind.block == 0 else None


def has_codes(task: LayerTask) -> bool:
    """Whether codes of the layer are stored; other data types give dense weights by their function."""
    return ggml_type_for(task) is not None or scheme_has_codes(task.scheme)


def scheme_has_codes(scheme: QuantizationScheme) -> bool:
    """Whether a scheme says integers or small floats whose codes are stored."""
    return is_integer(scheme) or minifloat_spec(scheme) is not None


def as_groups(weight: torch.Tensor, group_size: int) -> torch.Tensor:
    """[out, in] as [out, groups, group_size], zero-padded; per tensor as [1, 1, out * in]."""
    if group_size == 0:
        return weight.reshape(1, 1, -1)
    groups, _ = reshape_pad_tensor_by_group_size(weight, group_size)
    return groups.view(weight.shape[0], -1, groups.shape[-1])


def importance_groups(importance: torch.Tensor | None, weight: torch.Tensor, group_size: int) -> torch.Tensor | None:
    """[in] as [groups, group_size]; padding has zero importance."""
    if importance is None:
        return None
    if group_size == 0:
        return importance.repeat(weight.shape[0]).view(1, -1)
    groups, _ = reshape_pad_tensor_by_group_size(importance.view(1, -1), group_size)
    return groups


def encode_integer(
    task: LayerTask, qparams: QuantParams, v: torch.Tensor | None, scale_dtype: torch.dtype
) -> QuantizedLayer:
    """Encode an integer layer.

    Args:
        task: the layer; `task.weight` is [out, in].
        qparams: scale [out, groups, 1] (or [1, 1, 1] per tensor).
        v: rounding deltas in units of one code, in the shape of `as_groups`, or None.

    Raises:
        NumericsError: a scale is not finite.
    """
    scheme = task.scheme
    assert isinstance(scheme.group_size, int)
    groups = as_groups(task.weight, scheme.group_size)
    codes = torch.empty(groups.shape, dtype=torch.uint8, device=groups.device)
    for rows in _row_chunks(groups):
        zero = qparams.zero[rows] if isinstance(qparams.zero, torch.Tensor) else qparams.zero
        part = QuantParams(qparams.scale[rows], zero, qparams.bits)
        offsets = 0.0 if v is None else v[rows]
        codes[rows] = stored_codes(to_codes(groups[rows], part, offsets), qparams.bits)
    return integer_layer(task, qparams, codes, scale_dtype)


def encode_integer_rtn(task: LayerTask, scale_dtype: torch.dtype) -> QuantizedLayer:
    """Encode an integer layer with min/max scales: `encode_integer` with `integer_qparams`, in half the passes over the
    weight. Raises NumericsError when a scale is not finite."""
    scheme = task.scheme
    assert isinstance(scheme.group_size, int)
    groups = as_groups(task.weight, scheme.group_size)
    codes = torch.empty(groups.shape, dtype=torch.uint8, device=groups.device)
    group_qparams = []
    for rows in _row_chunks(groups):
        qparams, codes[rows] = round_groups(groups[rows], scheme.bits, scheme.sym, scale_dtype=scale_dtype)
        group_qparams.append(qparams)
    zero = group_qparams[0].zero
    if isinstance(zero, torch.Tensor):
        zero = torch.cat([qparams.zero for qparams in group_qparams if isinstance(qparams.zero, torch.Tensor)])
    whole = QuantParams(torch.cat([qparams.scale for qparams in group_qparams]), zero, scheme.bits)
    return integer_layer(task, whole, codes, scale_dtype)


def _row_chunks(groups: torch.Tensor) -> Iterator[slice]:
    """Slices of rows of [out, groups, group_size] that are rounded together."""
    most = _ROWS if groups.device.type == "cpu" else _GPU_ROWS
    step = max(1, most // max(1, groups.shape[1] * groups.shape[2]))
    for start in range(0, groups.shape[0], step):
        yield slice(start, start + step)


def integer_layer(
    task: LayerTask, qparams: QuantParams, codes: torch.Tensor, scale_dtype: torch.dtype
) -> QuantizedLayer:
    """An integer layer from its codes, uint8 [out, in] or in the shape of its groups.

    Raises:
        NumericsError: a scale is not finite.
    """
    if not bool(torch.isfinite(qparams.scale).all()):
        raise NumericsError(f"layer {task.name}: a scale is NaN or Inf; check the layer's weights and calibration data")
    out, columns = task.weight.shape
    per_tensor = task.scheme.group_size == 0
    codes = codes.view(out, columns) if per_tensor else codes.view(out, -1)[:, :columns]
    scale = qparams.scale.squeeze(-1).to(scale_dtype)
    zero_point: torch.Tensor | int = int(qparams.zero) if not isinstance(qparams.zero, torch.Tensor) else 0
    if isinstance(qparams.zero, torch.Tensor):
        zero_point = qparams.zero.squeeze(-1).to(torch.uint8)
    if per_tensor:  # every row gets the one scale
        scale = scale.expand(out, 1)
        zero_point = zero_point.expand(out, 1) if isinstance(zero_point, torch.Tensor) else zero_point
    to_host = lambda t: t.contiguous().cpu() if isinstance(t, torch.Tensor) else t
    return _layer(task, codes=to_host(codes), scale=to_host(scale), zero_point=to_host(zero_point))


def encode_minifloat(
    task: LayerTask, spec: BlockFloatSpec, scale: torch.Tensor | None = None, v: torch.Tensor | None = None,
    global_scale: torch.Tensor | None = None,
) -> QuantizedLayer:  # fmt: skip
    """Encode a layer of a small float type.

    Args:
        task: the layer; `task.weight` is [out, in].
        scale: stored scales, one per block, in any shape; None computes them by the type's rule.
        v: rounding deltas [R, M, C, N] (see `codecs.minifloat`) in units of the element's step, or None.
        global_scale: to which `scale` is relative; None takes the task's, or the weight's own.

    Raises:
        NumericsError: a scale is not finite.
    """
    tensor_scale = task.global_scale if global_scale is None else global_scale
    found = encode(task.weight, spec, task.scheme.group_size, scale=scale, v=v, global_scale=tensor_scale)
    return minifloat_layer(task, spec, found)


def minifloat_layer(task: LayerTask, spec: BlockFloatSpec, found: Encoded) -> QuantizedLayer:
    """A minifloat layer from its codes and scales.

    Raises:
        NumericsError: a scale is not finite.
    """
    if not bool(torch.isfinite(found.scale).all()):
        raise NumericsError(f"layer {task.name}: NaN or Inf in the weights or their scales; check the layer's weights")
    return _layer(
        task, codes=found.codes.cpu(), scale=found.scale.cpu(), zero_point=0, element=spec.element.name,
        global_scale=None if found.global_scale is None else found.global_scale.cpu(),
    )  # fmt: skip


def encode_ggml(task: LayerTask, blocks: GgmlBlocks) -> QuantizedLayer:
    """A layer in blocks of a ggml type. Raises NumericsError when d or dmin is not finite."""
    if not all(bool(torch.isfinite(part).all()) for part in (blocks.d, blocks.dmin) if part is not None):
        raise NumericsError(f"layer {task.name}: NaN or Inf in the weights or their scales; check the layer's weights")
    return _layer(task, blocks=blocks.to("cpu"))


def _layer(task: LayerTask, **fields: Any) -> QuantizedLayer:
    """A `QuantizedLayer` with the task's name, scheme, bias and input scales, and the given fields."""
    if task.activation is not None:
        step = task.activation
        fields |= {"act_scale": step.scale, "act_zero_point": step.zero_point, "act_global_scale": step.global_scale}
    bias = None if task.bias is None else task.bias.cpu()
    return QuantizedLayer(name=task.name, scheme=task.scheme, bias=bias, transposed=task.transposed, **fields)


def encode_by_function(task: LayerTask, scale_dtype: torch.dtype, **learned: torch.Tensor) -> QuantizedLayer:
    """A layer of any registered data type: the dequantized weight that its function returns, without codes."""
    scheme = task.scheme
    function = get_quant_func(scheme.data_type, scheme.bits, scheme.sym)
    with torch.no_grad():
        qdq, _, _ = function(
            task.weight.float(), bits=scheme.bits, group_size=scheme.group_size, scale_dtype=scale_dtype,
            imatrix=task.importance, data_type=scheme.data_type, **learned,
        )  # fmt: skip
    if not bool(torch.isfinite(qdq).all()):
        raise NumericsError(f"layer {task.name}: data type {scheme.data_type!r} gave NaN or Inf")
    return _layer(task, weight=qdq.to(task.weight.dtype).cpu())
