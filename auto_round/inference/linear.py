"""Linear layers that keep packed weights and dequantize them in plain PyTorch: int8, MLX and small floats.

`PackedLinear` is their base class, and that of `qlinear.QuantLinear`. Layers with quantized inputs (int8, FP8, MXFP,
NVFP) quantize them before the product.
"""

from __future__ import annotations

import functools
from abc import abstractmethod
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from auto_round.codecs.activation import ActivationQuantizer
from auto_round.codecs.quantized_layer import (
    FloatCodes,
    IntCodes,
    QuantizedLayer,
    dequantize_codes,
    group_count,
)
from auto_round.errors import ModelError
from auto_round.inference.config import LayerFormat
from auto_round.layouts.floats import FloatLayout
from auto_round.layouts.mlx import mlx_words, mlx_zero_points, unpack_mlx
from auto_round.layouts.packed_int import stored_codes
from auto_round.schemes import QuantizationScheme

# Private operators of PyTorch that tell whether the CPU has matrix instructions for a dtype.
_CPU_CHECKS = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}
# Name of the group of backends in plain PyTorch.
TORCH_BACKEND = "torch"
# Weights of the MLX layout dequantized at once: bounds the temporary copies.
_CHUNK = 1 << 22
# Dtypes in which a file may store the scales of a small float layer.
_WIDE = (torch.float32, torch.bfloat16, torch.float16)


@functools.lru_cache(maxsize=2)
def cpu_multiplies(dtype: torch.dtype) -> bool:
    """Whether this CPU has matrix instructions for a half-precision dtype; False when PyTorch cannot tell.

    Without them products are emulated, several times slower than in float32.
    """
    check = getattr(torch.ops.mkldnn, _CPU_CHECKS.get(dtype, ""), None)
    return bool(check()) if check is not None else False


def compute_dtype_for(device: torch.device | str, dtype: torch.dtype) -> torch.dtype:
    """`dtype`, or float32 for a half precision on a CPU without matrix instructions for it.

    float32 represents every float16 and bfloat16 value, so no weight changes.
    """
    if torch.device(device).type != "cpu" or dtype not in _CPU_CHECKS:
        return dtype
    return dtype if cpu_multiplies(dtype) else torch.float32


class PackedLinear(nn.Module):
    """y = x W^T + bias, with W [out, in] packed in buffers that are named and shaped as in the checkpoint.

    Attributes:
        words: name of the buffer that holds the codes.
        uncast_buffers: names of buffers that keep the file's dtype when the module is cast: rounding float16 scales to
            bfloat16 would damage every weight.
        backend: name of the table's row that runs it.
    """

    words: str
    uncast_buffers: tuple[str, ...]
    bias: torch.Tensor | None
    backend: str = TORCH_BACKEND

    def __init__(
        self, in_features: int, out_features: int, fmt: LayerFormat, *, bias: bool, dtype: torch.dtype,
        device: torch.device | str | None, buffers: Mapping[str, tuple[tuple[int, ...], torch.dtype] | None],
    ) -> None:  # fmt: skip
        """An empty layer.

        Args:
            bias: whether it has one, [out] in `dtype`.
            dtype: of the model.
            buffers: shape and dtype by name; None for one that this layer does not have.
        """
        super().__init__()
        self.in_features, self.out_features, self.format = in_features, out_features, fmt
        self.bits, self.dtype = fmt.bits, dtype
        for name, spec in {**buffers, "bias": ((out_features,), dtype) if bias else None}.items():
            self.register_buffer(name, None if spec is None else torch.zeros(spec[0], dtype=spec[1], device=device))

    @property
    def activation(self) -> ActivationQuantizer | None:
        """The quantizer of the inputs; None when they are not quantized."""
        return None

    @abstractmethod
    def unpack(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The exact (codes uint8 [out, in], scales [out, groups] as stored, zero points uint8 [out, groups])."""

    def layer(self, name: str) -> QuantizedLayer:
        """The quantized layer that the buffers hold, without the bias."""
        codes, scale, zero = self.unpack()
        step = self.activation
        scheme = QuantizationScheme(bits=self.bits, group_size=self.format.group_size, sym=self.format.sym)
        return QuantizedLayer(
            name, scheme, IntCodes(codes, scale, zero, self.format.group_size),
            act_scale=None if step is None else step.scale, act_zero_point=None if step is None else step.zero_point,
        )  # fmt: skip

    @torch.no_grad()
    def prepare(self, name: str = "") -> None:
        """Check the filled buffers. `name` is for messages. Raises ModelError for values that cannot be run."""

    @property
    def is_loaded(self) -> bool:
        """Whether the codes are in memory; offloaded layers are on meta until they run."""
        return not self.get_buffer(self.words).is_meta

    @abstractmethod
    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """W [out, in]: `scale * (code - zero)` computed in float32 and rounded once to `dtype`."""

    def _dense(self, dtype: torch.dtype) -> torch.Tensor:
        """W transposed, [in, out]."""
        return self.dequantize(dtype).T

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        compute = compute_dtype_for(x.device, x.dtype)
        y = torch.matmul(x.to(compute), self._dense(compute))
        if self.bias is not None:
            y = y + self.bias.to(compute)
        return y.to(x.dtype)

    def linear(self, x: torch.Tensor) -> torch.Tensor:
        """The product with quantized inputs, bit for bit that of `nn.Linear`: rounding inputs to codes magnifies any
        difference."""
        step = self.activation
        x = x if step is None else step(x)
        compute = compute_dtype_for(x.device, x.dtype)
        bias = None if self.bias is None else self.bias.to(compute)
        return nn.functional.linear(x.to(compute), self.dequantize(compute), bias).to(x.dtype)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> PackedLinear:
        before = {name: tensor for name in self.uncast_buffers if (tensor := getattr(self, name)) is not None}
        self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype
        super()._apply(fn, recurse)
        for name, tensor in before.items():
            after = self.get_buffer(name)
            if after.dtype != tensor.dtype:
                setattr(self, name, tensor.to(after.device))
        return self

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"bits={self.bits}, group_size={self.format.group_size}, sym={self.format.sym}, "
            f"packing={self.format.packing}"
        )


class Int8Linear(PackedLinear):
    """y = q(x) W^T + bias, with W [out, in] one signed byte per weight and q the quantization of inputs.

    Buffers: `weight` int8 [out, in], `weight_scale` [out, groups], `weight_zero_point` int8 [out, groups] when
    asymmetric, and for static inputs `input_scale` [1] and `input_zero_point` int8 [1].
    """

    words: str = "weight"
    uncast_buffers: tuple[str, ...] = ("weight_scale", "input_scale")
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
        shapes = int8_shapes(in_features, out_features, fmt)
        dtypes = {
            "weight": torch.int8, "weight_scale": scale_dtype, "weight_zero_point": torch.int8,
            "input_scale": input_scale_dtype or dtype, "input_zero_point": torch.int8,
        }  # fmt: skip
        buffers = {leaf: (shapes[leaf], kind) if leaf in shapes else None for leaf, kind in dtypes.items()}
        super().__init__(in_features, out_features, fmt, bias=bias, dtype=dtype, device=device, buffers=buffers)

    @torch.no_grad()
    def prepare(self, name: str = "") -> None:
        """Raises ModelError when a scale is not finite."""
        for leaf in self.uncast_buffers:
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


class MlxLinear(PackedLinear):
    """y = x W^T + bias with W = scales * code + biases.

    Buffers: `weight` uint32 [out, in*bits/32], `scales` and `biases` [out, groups] in the file's dtypes.
    """

    words: str = "weight"
    uncast_buffers: tuple[str, ...] = ("scales", "biases")
    weight: torch.Tensor
    scales: torch.Tensor
    biases: torch.Tensor

    def __init__(
        self, in_features: int, out_features: int, fmt: LayerFormat, *, bias: bool = False,
        dtype: torch.dtype = torch.float32, scale_dtype: torch.dtype = torch.float16,
        biases_dtype: torch.dtype = torch.float16, device: torch.device | str | None = None,
    ) -> None:  # fmt: skip
        dtypes = {"weight": torch.uint32, "scales": scale_dtype, "biases": biases_dtype}
        buffers = {leaf: (shape, dtypes[leaf]) for leaf, shape in mlx_shapes(in_features, out_features, fmt).items()}
        super().__init__(in_features, out_features, fmt, bias=bias, dtype=dtype, device=device, buffers=buffers)

    @torch.no_grad()
    def prepare(self, name: str = "") -> None:
        if not bool(torch.isfinite(self.scales).all() & torch.isfinite(self.biases).all()):
            raise ModelError(f"{name or 'layer'}: a scale or bias is NaN or Inf; fetch the files again")

    def unpack(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return unpack_mlx(self.weight, self.bits), self.scales, mlx_zero_points(self.scales, self.biases)

    @torch.no_grad()
    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        dense = torch.empty(self.out_features, self.in_features, dtype=dtype, device=self.weight.device)
        step = max(1, _CHUNK // self.in_features)
        groups = self.scales.shape[1]
        for start in range(0, self.out_features, step):
            rows = slice(start, start + step)
            values = unpack_mlx(self.weight[rows], self.bits).view(-1, groups, self.in_features // groups).float()
            values.mul_(self.scales[rows].float().unsqueeze(-1)).add_(self.biases[rows].float().unsqueeze(-1))
            dense[rows] = values.view(-1, self.in_features)
        return dense


def mlx_shapes(in_features: int, out_features: int, fmt: LayerFormat) -> dict[str, tuple[int, ...]]:
    """Shapes of `weight`, `scales` and `biases`. Raises UnsupportedError when a row does not fill whole words."""
    groups = in_features // fmt.group_size
    return {
        "weight": (out_features, mlx_words(in_features, fmt.bits)),
        "scales": (out_features, groups),
        "biases": (out_features, groups),
    }


def mlx_shape_problem(in_features: int, fmt: LayerFormat) -> str | None:
    """None when a layer of this width can be stored in `fmt`, or the reason why not."""
    if fmt.group_size <= 0 or in_features % fmt.group_size:
        return f"in_features={in_features} is not a multiple of the group size {fmt.group_size}"
    return None if in_features * fmt.bits % 32 == 0 else f"in_features={in_features} does not fill whole words"


class FloatLinear(PackedLinear):
    """y = q(x) W^T + bias, with W [out, in] of a small float type or in a plugin's `Layout`, and q the quantization of
    inputs, if any.

    Buffers: see `fmt.naming`; all but `bias` keep the file's dtype when the module is cast. Weights are dequantized for
    each call.
    """

    scheme: QuantizationScheme
    weight_scale: torch.Tensor

    def __init__(
        self, in_features: int, out_features: int, fmt: LayerFormat, *, bias: bool = False,
        dtype: torch.dtype = torch.float32, stored: Mapping[str, torch.dtype] | None = None,
        device: torch.device | str | None = None,
    ) -> None:  # fmt: skip
        """`stored`: dtypes of the file's tensors; scales may have another wide float dtype than the layout's."""
        assert fmt.scheme is not None
        specs = fmt.naming.specs(fmt.scheme, in_features, out_features)
        words = next(iter(specs))
        buffers: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
        for name, (shape, usual) in specs.items():
            kind = (stored or {}).get(name, usual)
            # Codes and scales of one byte are defined by their dtype.
            replaceable = name != words and usual.itemsize > 1 and kind in _WIDE
            buffers[name] = shape, kind if replaceable else usual
        super().__init__(in_features, out_features, fmt, bias=bias, dtype=dtype, device=device, buffers=buffers)
        self.scheme, self.words, self.uncast_buffers = fmt.scheme, words, tuple(specs)

    def check_dtypes(self, name: str, stored: Mapping[str, torch.dtype]) -> None:
        """Raise ModelError when a tensor of the file has another dtype than its buffer."""
        for leaf in self.uncast_buffers:
            wanted = self.get_buffer(leaf).dtype
            if stored.get(leaf, wanted) != wanted:
                raise ModelError(
                    f"tensor {name}.{leaf} is {stored[leaf]}, but layout {self.format.packing} of its "
                    f"quantization_config has {wanted}"
                )

    @torch.no_grad()
    def prepare(self, name: str = "") -> None:
        """Raises ModelError when a scale is not finite."""
        for leaf in self.uncast_buffers[1:]:
            scale = self.get_buffer(leaf)
            if scale.dtype == torch.uint8 and isinstance(self.format.naming, FloatLayout):
                finite = scale != 255  # E8M0
            else:
                finite = torch.isfinite(scale.float())
            if not bool(finite.all()):
                raise ModelError(f"{name or 'layer'}: {leaf} holds NaN or Inf; fetch the files again")

    def layer(self, name: str) -> QuantizedLayer:
        tensors = {leaf: self.get_buffer(leaf) for leaf in self.uncast_buffers}
        return self.format.naming.unpack(name, self.scheme, tensors, self.in_features, self.out_features)

    def unpack(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(codes uint8 [out, in], float32 scales, zeros)."""
        read = self.layer("").codes_as(FloatCodes)
        return read.codes, read.scale, torch.zeros_like(read.scale, dtype=torch.uint8)

    @property
    def activation(self) -> ActivationQuantizer | None:
        if self.format.activation is None:
            return None
        scalars = {"scale": "input_scale", "global_scale": "input_global_scale"}
        fixed: dict[str, Any] = {
            key: self.get_buffer(leaf).float().reshape(())
            for key, leaf in scalars.items()
            if leaf in self.uncast_buffers
        }
        return ActivationQuantizer(self.format.activation, **fixed)

    @torch.no_grad()
    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return self.layer("").dequantize(dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x)


class ScaledMmLinear(FloatLinear):
    """FP8 weights with scales per channel or tensor and static inputs, by `torch._scaled_mm`: FP8 products with float32
    sums in hardware (CUDA, compute capability 8.9 and above).

    Falls back to `FloatLinear` for shapes that the hardware does not support, and on other devices.
    """

    weight: torch.Tensor
    input_scale: torch.Tensor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # The hardware works on tiles of 16.
        if x.device.type != "cuda" or self.in_features % 16 or self.out_features % 16 or x.numel() == 0:
            return self.linear(x)
        return self.multiply(x)

    @torch.no_grad()
    def multiply(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., in] -> [..., out] in the dtype of `x`. Scales are applied to the float32 sums."""
        top = torch.finfo(self.weight.dtype).max
        scale = self.input_scale.float().reshape(())
        codes = (x.reshape(-1, self.in_features).float() / scale).clamp_(-top, top).to(self.weight.dtype)
        one = torch.ones((), dtype=torch.float32, device=x.device)
        sums = torch._scaled_mm(codes, self.weight.t(), scale_a=scale, scale_b=one, out_dtype=torch.float32)
        sums.mul_(self.weight_scale.float().reshape(1, -1))
        if self.bias is not None:
            sums.add_(self.bias.float())
        return sums.to(x.dtype).view(*x.shape[:-1], self.out_features)
