"""A linear layer with int8 weights that quantizes its inputs, in plain PyTorch on any device."""

from __future__ import annotations

import torch

from auto_round.data_type.activation import ActivationQuantizer
from auto_round.errors import ModelError
from auto_round.export.packing.compressed_tensors import stored_codes
from auto_round.inference.config_reader import LayerFormat
from auto_round.inference.packed_linear import PackedLinear
from auto_round.quantized_layer import dequantize_codes, group_count


class Int8Linear(PackedLinear):
    """y = q(x) W^T + bias, with W [out, in] one signed byte a weight and q the quantization of inputs.

    Buffers, named and shaped as in the checkpoint: `weight` int8 [out, in], `weight_scale` [out, groups],
    `weight_zero_point` int8 [out, groups] when asymmetric, `input_scale` [1] and `input_zero_point` int8 [1] for static
    inputs, `bias` [out] in the model's dtype. Scales keep the file's dtype when the module is cast.
    """

    words: str = "weight"
    kept: tuple[str, ...] = ("weight_scale", "input_scale")
    weight: torch.Tensor
    weight_scale: torch.Tensor
    weight_zero_point: torch.Tensor | None
    input_scale: torch.Tensor | None
    input_zero_point: torch.Tensor | None

    def __init__(
        self, in_features: int, out_features: int, fmt: LayerFormat, *, bias: bool = False,
        dtype: torch.dtype = torch.float32, scale_dtype: torch.dtype = torch.float16,
        input_scale_dtype: torch.dtype | None = None, device: torch.device | str | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.in_features, self.out_features, self.format = in_features, out_features, fmt
        self.bits, self.dtype = fmt.bits, dtype
        groups = group_count(in_features, fmt.group_size)
        activation = fmt.activation
        static = activation is not None and not activation.dynamic
        buffers: dict[str, tuple[tuple[int, ...], torch.dtype] | None] = {
            "weight": ((out_features, in_features), torch.int8),
            "weight_scale": ((out_features, groups), scale_dtype),
            "weight_zero_point": None if fmt.sym else ((out_features, groups), torch.int8),
            "input_scale": ((1,), input_scale_dtype or dtype) if static else None,
            "input_zero_point": ((1,), torch.int8) if static and activation and not activation.sym else None,
            "bias": ((out_features,), dtype) if bias else None,
        }
        for name, spec in buffers.items():
            self.register_buffer(name, None if spec is None else torch.zeros(spec[0], dtype=spec[1], device=device))

    @torch.no_grad()
    def prepare(self, name: str = "") -> None:
        """Raises ModelError when a scale is not finite."""
        for leaf in self.kept:
            scale = getattr(self, leaf)
            if scale is not None and not bool(torch.isfinite(scale).all()):
                raise ModelError(f"{name or 'layer'}: {leaf} holds NaN or Inf; fetch the files again")

    @property
    def activation(self) -> ActivationQuantizer | None:
        if self.format.activation is None:
            return None
        scale = None if self.input_scale is None else self.input_scale.detach().float().reshape(())
        zero = None if self.input_zero_point is None else int(self.input_zero_point)
        return ActivationQuantizer(self.format.activation, scale, zero)

    def unpack(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        codes = stored_codes(self.weight, self.bits)
        if self.weight_zero_point is None:
            zeros = torch.full_like(self.weight_scale, 2 ** (self.bits - 1), dtype=torch.uint8)
        else:
            zeros = stored_codes(self.weight_zero_point, self.bits)
        return codes, self.weight_scale, zeros

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        zeros = 0 if self.weight_zero_point is None else self.weight_zero_point
        return dequantize_codes(self.weight, self.weight_scale, zeros, self.format.group_size).to(dtype)

    def _dense(self, dtype: torch.dtype) -> torch.Tensor:
        return self.dequantize(dtype).T

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x)


def int8_shapes(in_features: int, out_features: int, fmt: LayerFormat) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors that a checkpoint must hold for a layer."""
    groups = group_count(in_features, fmt.group_size)
    shapes: dict[str, tuple[int, ...]] = {"weight": (out_features, in_features), "weight_scale": (out_features, groups)}
    if not fmt.sym:
        shapes["weight_zero_point"] = (out_features, groups)
    if fmt.activation is not None and not fmt.activation.dynamic:
        shapes["input_scale"] = (1,)
        if not fmt.activation.sym:
            shapes["input_zero_point"] = (1,)
    return shapes
