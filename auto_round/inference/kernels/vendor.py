"""Kernels from other packages for packed integer weights: PyTorch's own, for machines without a C compiler, those of
auto-round-lib (`import auto_round_kernel`, "ark"), imported when the first layer needs it, and Gaudi's.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from typing import Any

import torch

from auto_round.inference.kernels import IntegerWeight, LayerSpec, LinearKernel
from auto_round.layouts.bit_stream import pack_words, unpack_rows
from auto_round.layouts.integers import signed_values, stored_codes

_GROUP_SIZES = (32, 64, 128, 256)
ARK_INSTALL = "needs auto-round-lib and torch 2.8 or newer: pip install auto-round-lib"


def _aligned(rows: torch.Tensor) -> torch.Tensor:
    """`rows` as bfloat16, contiguous and aligned to 64 bytes: the kernels of PyTorch 2.6 crash on other addresses."""
    rows = rows.to(torch.bfloat16).contiguous()
    return rows if rows.data_ptr() % 64 == 0 else rows.clone()


def _missing(operation: str) -> str | None:
    return None if hasattr(torch.ops.aten, operation) else f"this version of PyTorch has no {operation}"


class CpuInt4(LinearKernel):
    """Weights of 2, 3 and 4 bits through `_weight_int4pack_mm_for_cpu`.

    It computes scale * (code - 8) + offset with scale and offset in bfloat16: weights are rounded by up to 2**-9. The
    offset, scale * (8 - zero), is zero for symmetric weights, and for 2 and 3 bits, where code - zero + 8 fits into 4
    bits and is stored instead of the code.
    """

    packed: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor

    def __init__(self, weight: IntegerWeight) -> None:
        super().__init__(weight)
        scales, zeros = weight.scales.float(), weight.zeros
        offset, codes = scales * (8 - zeros.float()), weight.codes.to(torch.int32)
        if weight.spec.bits < 4:
            offset, codes = torch.zeros_like(scales), codes + 8 - zeros.repeat_interleave(weight.spec.group_size, 1)
        self.hold(
            packed=torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 2), zeros=zeros,
            scales=torch.stack([scales, offset], -1).transpose(0, 1).contiguous().to(torch.bfloat16),
        )  # fmt: skip

    @classmethod
    def unsupported_reason(cls, spec: LayerSpec) -> str | None:
        if spec.group_size not in _GROUP_SIZES or spec.in_features % spec.group_size or spec.out_features % 16:
            return (
                f"needs whole groups of {', '.join(map(str, _GROUP_SIZES))} columns and a multiple of 16 outputs, not "
                f"{spec.group_size} of {spec.in_features} and {spec.out_features}"
            )
        return _missing("_weight_int4pack_mm_for_cpu")

    def multiply(self, rows: torch.Tensor, scales: torch.Tensor | None = None) -> torch.Tensor:
        product, scales = torch.ops.aten._weight_int4pack_mm_for_cpu, self.scales if scales is None else scales
        y: torch.Tensor = product(_aligned(rows), self.packed, self.spec.group_size, scales)
        return y

    def codes(self) -> torch.Tensor:
        """Read back with a unit matrix, some rows at a time: small integers are exact in bfloat16."""
        ones, chunks = torch.zeros_like(self.scales), []
        ones[..., 0] = 1
        for columns in torch.arange(self.spec.in_features).split(512):
            unit = torch.zeros(len(columns), self.spec.in_features, dtype=torch.bfloat16)
            unit[torch.arange(len(columns)), columns] = 1
            chunks.append(self.multiply(unit, ones).to(torch.int16))
        codes = torch.cat(chunks).T
        offset = 8 if self.spec.bits == 4 else self.zeros.repeat_interleave(self.spec.group_size, 1)
        return (codes + offset).to(torch.uint8).contiguous()


class CpuInt8(LinearKernel):
    """Symmetric weights of 8 bits with one exact scale per row, applied to the outputs, by `_weight_int8pack_mm`."""

    packed: torch.Tensor
    scales: torch.Tensor
    ones: torch.Tensor

    def __init__(self, weight: IntegerWeight) -> None:
        super().__init__(weight)
        packed, ones = signed_values(weight.codes, 8), torch.ones(weight.spec.out_features, dtype=torch.bfloat16)
        self.hold(packed=packed, scales=weight.scales[:, 0].float(), ones=ones)

    @classmethod
    def unsupported_reason(cls, spec: LayerSpec) -> str | None:
        if not spec.sym or spec.group_size < spec.in_features:
            return "runs symmetric weights with one scale per row"
        if spec.in_features % 16 or spec.out_features % 16:
            return f"needs sizes that are multiples of 16, not {spec.in_features} and {spec.out_features}"
        return _missing("_weight_int8pack_mm")

    def multiply(self, rows: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = torch.ops.aten._weight_int8pack_mm(_aligned(rows), self.packed, self.ones)
        return y.float() * self.scales

    def codes(self) -> torch.Tensor:
        return stored_codes(self.packed, 8)


@functools.lru_cache(maxsize=1)
def package() -> Any:
    """auto-round-lib's module, or the reason why it cannot be imported, a text."""
    if tuple(int(part) for part in torch.__version__.split(".")[:2]) < (2, 8):
        return ARK_INSTALL
    try:
        return importlib.import_module("auto_round_kernel")
    except (ImportError, OSError) as error:
        missing = isinstance(error, ModuleNotFoundError) and error.name == "auto_round_kernel"
        return ARK_INSTALL if missing else f"auto-round-lib cannot be imported: {error}"


class ArkKernel(LinearKernel):
    """Weights of 2, 4 and 8 bits through auto-round-lib: in float32 on CPUs; on Intel GPUs (untested) symmetric ones,
    with integer products and float16 scales.
    """

    blob: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor
    unscaled: torch.Tensor

    def __init__(self, weight: IntegerWeight) -> None:
        super().__init__(weight)
        spec, asym = weight.spec, not bool((weight.zeros == 1 << (weight.spec.bits - 1)).all())
        compute, scale_type, dtype = ("int8", "fp16", torch.float16)
        if spec.device == "cpu":
            compute, scale_type, dtype = ("fp32", "fp32", torch.float32)
        kind = (compute, f"int{spec.bits}", scale_type, asym)
        # The package's arguments: outputs, inputs, group size, compute type, weight type, scale type, asymmetric.
        self.kind = (spec.out_features, spec.in_features, spec.group_size, *kind)
        codes, zeros = signed_values(weight.codes.T, spec.bits), signed_values(weight.zeros.T, spec.bits)
        zeros, scales = zeros if asym else zeros.new_empty(0), weight.scales.T.to(dtype).contiguous()
        blob = package().repack_quantized_weight(codes, scales, zeros, spec.group_size, *kind)
        # For `codes`: weights divided by scales, and a copy of the codes whose scale is zero.
        unscaled = weight.codes[self._expand_groups(weight.scales == 0)].clone()
        self.hold(blob=blob, scales=weight.scales, zeros=weight.zeros, unscaled=unscaled)

    @classmethod
    def unsupported_reason(cls, spec: LayerSpec) -> str | None:
        if spec.in_features % spec.group_size or spec.group_size % 8:
            return f"needs groups of a multiple of 8 columns that fill the {spec.in_features}, not {spec.group_size}"
        if spec.device == "xpu" and not spec.sym:
            return "runs symmetric weights on xpu"
        found = package()
        return found if isinstance(found, str) else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        product = torch.ops.auto_round.ark_linear if torch.compiler.is_compiling() else ark_multiply
        y: torch.Tensor = product(self.blob, x, *self.kind)
        return y

    def codes(self) -> torch.Tensor:
        out, width, *rest = self.kind
        dense = package().unpack_weight(self.blob, torch.float32, out, width, *rest)
        scales, zeros = self._expand_groups(self.scales.float()), self._expand_groups(self.zeros)
        unscaled = scales == 0
        codes = ((dense / scales.masked_fill(unscaled, 1)).round().to(torch.int16) + zeros).to(torch.uint8)
        codes[unscaled] = self.unscaled
        return codes

    def _expand_groups(self, values: torch.Tensor) -> torch.Tensor:
        """[out, groups] to [out, in]."""
        return values.repeat_interleave(self.spec.group_size, 1)


def ark_multiply(blob: torch.Tensor, x: torch.Tensor, out: int, width: int, *kind: Any) -> torch.Tensor:
    """x [..., width] -> [..., out] in the dtype of `x`, by the weight `blob`; the rest is `ArkKernel.kind`."""
    flat = x.reshape(-1, width).to(torch.float32 if x.device.type == "cpu" else torch.float16).contiguous()
    if not flat.shape[0]:
        return x.new_empty((*x.shape[:-1], out))
    y: torch.Tensor = package().woqgemm(flat, blob, flat.new_empty(0), out, width, *kind)
    return y.to(x.dtype).view(*x.shape[:-1], out)


@torch.library.custom_op(
    "auto_round::ark_linear", mutates_args=(),
    schema="(Tensor blob, Tensor x, int out, int width, int group_size, str compute, str kind, str scale, bool asym) "
    "-> Tensor",
)  # fmt: skip
def _ark_linear(blob: torch.Tensor, x: torch.Tensor, *kind: Any) -> torch.Tensor:
    y = ark_multiply(blob, x, *kind)
    return y.clone() if y.data_ptr() == x.data_ptr() else y


_ark_linear.register_fake(lambda blob, x, out, *kind: x.new_empty((*x.shape[:-1], out)))


class HpuLinear(LinearKernel):
    """x -> x W^T on Gaudi: `torch.ops.hpu.convert_from_uint4` dequantizes W, then a dense product."""

    words: torch.Tensor
    zeros: torch.Tensor
    scales: torch.Tensor

    def __init__(self, weight: IntegerWeight) -> None:
        super().__init__(weight)
        self.hold(**hpu_operands(weight))

    @classmethod
    def unsupported_reason(cls, spec: LayerSpec) -> str | None:
        if spec.out_features % 8:
            return f"needs outputs in multiples of 8, not {spec.out_features}"
        if spec.in_features % spec.group_size:
            return f"needs groups of one size: {spec.in_features} inputs are no multiple of {spec.group_size}"
        if importlib.util.find_spec("habana_frameworks") is None:
            return "needs Habana's PyTorch bridge (habana_frameworks), which is not installed"
        importlib.import_module("habana_frameworks.torch.core")
        return None if hasattr(torch.ops.hpu, "convert_from_uint4") else "the bridge has no convert_from_uint4"

    @torch.no_grad()
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        dense = torch.ops.hpu.convert_from_uint4(self.words, self.scales, self.zeros, torch.bfloat16)
        return torch.matmul(x.to(torch.bfloat16), dense).to(x.dtype)

    def codes(self) -> torch.Tensor:
        return unpack_rows(self.words, 4).T.contiguous()


def hpu_operands(weight: IntegerWeight) -> dict[str, torch.Tensor]:
    """The operands of `convert_from_uint4`: codes int32 [in, out/8], nibble i of word w for output 8w + i, zero points
    [groups, out/8] likewise, and scales [groups, out]."""
    return {
        "words": pack_words(weight.codes, 4).T.contiguous(), "zeros": pack_words(weight.zeros, 4).T.contiguous(),
        "scales": weight.scales.T.to(torch.bfloat16).contiguous(),
    }  # fmt: skip
