"""The module of each layout: what its tensors are called, which shapes it can have, and how it is made."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from auto_round.export.float_layouts import short_group
from auto_round.export.packing.mlx import bias_storage_dtype
from auto_round.inference.backend_table import SCALED_MM
from auto_round.inference.config_reader import LayerFormat
from auto_round.inference.float_linear import FloatLinear, ScaledMmLinear
from auto_round.inference.int8_linear import Int8Linear, int8_shapes
from auto_round.inference.mlx_linear import MlxLinear, mlx_packable, mlx_shapes
from auto_round.inference.packed_linear import PackedLinear
from auto_round.inference.qlinear import QuantLinear, expected_shapes, packable

# Every tensor that any layout has.
TENSORS = (
    "qweight", "qzeros", "scales", "g_idx", "bias", "weight", "biases", "weight_scale", "weight_zero_point",
    "input_scale", "input_zero_point", "weight_packed", "weight_scale_inv", "weight_global_scale", "input_global_scale",
)  # fmt: skip
# Endings of names that only quantized layers have.
PACKED_LEAVES = (".qweight", ".scales", ".weight_scale", ".weight_scale_inv")


def layout_problem(fmt: LayerFormat, in_features: int, out_features: int) -> str | None:
    """None when a layer of this shape can be stored in `fmt`, or the reason why not."""
    if fmt.scheme is not None:
        return short_group(fmt.scheme, in_features)
    if fmt.layout == "int8":
        return None
    return mlx_packable(in_features, fmt) if fmt.layout == "mlx" else packable(in_features, out_features, fmt)


def layout_shapes(fmt: LayerFormat, in_features: int, out_features: int) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors that a checkpoint must hold for a layer."""
    if fmt.scheme is not None:
        specs = fmt.naming.specs(fmt.scheme, in_features, out_features)
        return {leaf: shape for leaf, (shape, _) in specs.items()}
    shapes = {"int8": int8_shapes, "mlx": mlx_shapes}.get(fmt.layout, expected_shapes)
    return shapes(in_features, out_features, fmt)


def build_layer(
    fmt: LayerFormat, weight: torch.Tensor, bias: bool, stored: Mapping[str, torch.dtype], g_idx: bool, backend: str
) -> PackedLinear:
    """An empty module.

    Args:
        weight: [out, in], for its shape, dtype and device; its values are not read.
        stored: dtypes of the checkpoint's tensors, empty where they are not known.
        g_idx: whether the checkpoint may hold one, where its tensors are not known.
        backend: name of the row that was chosen.
    """
    out_features, in_features = int(weight.shape[0]), int(weight.shape[1])
    dtype, device = weight.dtype, weight.device
    if fmt.scheme is not None:
        kind = ScaledMmLinear if backend == SCALED_MM else FloatLinear
        return kind(in_features, out_features, fmt, bias=bias, dtype=dtype, stored=stored, device=device)
    scale_dtype = next((stored[t] for t in ("scales", "weight_scale") if t in stored), torch.float16)
    if fmt.layout == "int8":
        return Int8Linear(
            in_features, out_features, fmt, bias=bias, dtype=dtype, scale_dtype=scale_dtype,
            input_scale_dtype=stored.get("input_scale"), device=device,
        )  # fmt: skip
    if fmt.layout == "mlx":
        biases = stored["biases"] if stored else bias_storage_dtype(fmt.sym, scale_dtype)
        return MlxLinear(
            in_features, out_features, fmt, bias=bias, dtype=dtype, scale_dtype=scale_dtype, biases_dtype=biases,
            device=device,
        )  # fmt: skip
    return QuantLinear(
        in_features, out_features, fmt, bias=bias, g_idx="g_idx" in stored if stored else g_idx, dtype=dtype,
        scale_dtype=scale_dtype, device=device,
    )  # fmt: skip
