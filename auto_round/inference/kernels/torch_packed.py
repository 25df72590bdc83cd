"""Packed integer weights on CPUs through PyTorch's own kernels, for machines without a C compiler.

bfloat16 models only: for other dtypes PyTorch has no fast form of them."""

from __future__ import annotations

import torch

from auto_round.inference.kernels.kernel import IntegerWeight, LayerSpec, LinearKernel

_GROUPS = (32, 64, 128, 256)
_ROWS = 512  # of the unit matrix that reads the codes back


def _aligned_rows(x: torch.Tensor, width: int) -> torch.Tensor:
    """`x` as bfloat16 rows [n, width] that start at a multiple of 64 bytes.

    The kernels of PyTorch 2.6 load rows with instructions that fault elsewhere, as in a slice of a larger tensor.
    """
    rows = x.reshape(-1, width).to(torch.bfloat16).contiguous()
    return rows if rows.data_ptr() % 64 == 0 else rows.clone()


class CpuInt4(LinearKernel):
    """Weights of 2, 3 and 4 bits through `_weight_int4pack_mm_for_cpu`.

    That kernel computes scale * (code - 8) + offset with scale and offset in bfloat16: scales of a float16 file change
    by up to 2**-9 of themselves, and with them each weight. The offset, scale * (8 - zero), is zero for symmetric
    weights; for 2 and 3 bits always, because code - zero + 8 fits into 4 bits and is stored instead. Codes are exact.
    """

    packed: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor

    def __init__(self, weight: IntegerWeight) -> None:
        super().__init__(weight)
        size, zeros = weight.spec.group_size, weight.zeros
        offset = torch.zeros(zeros.shape) if weight.spec.bits < 4 else weight.scales.float() * (8 - zeros.float())
        scales = torch.stack([weight.scales.float(), offset], -1).transpose(0, 1).contiguous()
        codes = weight.codes.to(torch.int32)
        if weight.spec.bits < 4:
            codes += 8 - zeros.repeat_interleave(size, 1).to(torch.int32)
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 2)
        self.register_buffer("packed", packed, persistent=False)
        self.register_buffer("scales", scales.to(torch.bfloat16), persistent=False)
        self.register_buffer("zeros", zeros, persistent=False)

    @classmethod
    def refuses(cls, spec: LayerSpec) -> str | None:
        if spec.device != "cpu" or spec.bits > 4:
            return f"runs up to 4 bits on cpu, not {spec.bits} on {spec.device}"
        if spec.dtype != torch.bfloat16:
            return f"runs bfloat16 models, not {str(spec.dtype).removeprefix('torch.')}"
        if spec.group_size not in _GROUPS or spec.in_features % spec.group_size or spec.out_features % 16:
            return (
                f"needs whole groups of {', '.join(map(str, _GROUPS))} columns and a multiple of 16 outputs, not "
                f"{spec.group_size} of {spec.in_features} and {spec.out_features}"
            )
        found = hasattr(torch.ops.aten, "_weight_int4pack_mm_for_cpu")
        return None if found else "this version of PyTorch has no _weight_int4pack_mm_for_cpu"

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._multiply(x, self.scales)

    def _multiply(self, x: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        flat = _aligned_rows(x, self.spec.in_features)
        if not flat.shape[0]:
            return x.new_empty((*x.shape[:-1], self.spec.out_features))
        y = torch.ops.aten._weight_int4pack_mm_for_cpu(flat, self.packed, self.spec.group_size, scales)
        return y.to(x.dtype).view(*x.shape[:-1], self.spec.out_features)

    def codes(self) -> torch.Tensor:
        """Read back with a unit matrix: small integers are exact in bfloat16."""
        ones = torch.zeros_like(self.scales)
        ones[..., 0] = 1
        pieces = []
        for start in range(0, self.spec.in_features, _ROWS):
            count = min(_ROWS, self.spec.in_features - start)
            unit = torch.zeros(count, self.spec.in_features, dtype=torch.bfloat16)
            unit[torch.arange(count), torch.arange(start, start + count)] = 1
            pieces.append(self._multiply(unit, ones).to(torch.int16))
        codes = torch.cat(pieces).T + 8
        if self.spec.bits < 4:
            codes = codes - 8 + self.zeros.repeat_interleave(self.spec.group_size, 1)
        return codes.to(torch.uint8).contiguous()


class CpuInt8(LinearKernel):
    """Symmetric weights of 8 bits with one scale a row through `_weight_int8pack_mm`.

    Scales are exact: they are applied to the outputs in float32."""

    packed: torch.Tensor
    scales: torch.Tensor
    ones: torch.Tensor

    def __init__(self, weight: IntegerWeight) -> None:
        super().__init__(weight)
        self.register_buffer("packed", (weight.codes.to(torch.int16) - 128).to(torch.int8), persistent=False)
        self.register_buffer("scales", weight.scales[:, 0].float(), persistent=False)
        ones = torch.ones(weight.spec.out_features, dtype=torch.bfloat16)
        self.register_buffer("ones", ones, persistent=False)

    @classmethod
    def refuses(cls, spec: LayerSpec) -> str | None:
        if spec.device != "cpu" or spec.bits != 8:
            return f"runs 8 bits on cpu, not {spec.bits} on {spec.device}"
        if spec.dtype != torch.bfloat16:
            return f"runs bfloat16 models, not {str(spec.dtype).removeprefix('torch.')}"
        if not spec.sym or spec.group_size < spec.in_features:
            return "runs symmetric weights with one scale a row"
        if spec.in_features % 16 or spec.out_features % 16:
            return f"needs sizes that are multiples of 16, not {spec.in_features} and {spec.out_features}"
        found = hasattr(torch.ops.aten, "_weight_int8pack_mm")
        return None if found else "this version of PyTorch has no _weight_int8pack_mm"

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        flat = _aligned_rows(x, self.spec.in_features)
        if not flat.shape[0]:
            return x.new_empty((*x.shape[:-1], self.spec.out_features))
        y = torch.ops.aten._weight_int8pack_mm(flat, self.packed, self.ones).float() * self.scales
        return y.to(x.dtype).view(*x.shape[:-1], self.spec.out_features)

    def codes(self) -> torch.Tensor:
        return (self.packed.to(torch.int16) + 128).to(torch.uint8)
