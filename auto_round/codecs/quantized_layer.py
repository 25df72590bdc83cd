"""`QuantizedLayer`: codes, scales and zero points of one linear layer, from a quantizer to an output format."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from auto_round.codecs.ggml.types import GgmlBlocks
from auto_round.codecs.minifloat import MINIFLOATS, dequantize_minifloat
from auto_round.schemes import QuantizationScheme


def group_count(in_features: int, group_size: int) -> int:
    """Groups along the input dimension, the last one possibly partial; -1 and 0 give one group."""
    return 1 if group_size <= 0 else -(-in_features // group_size)


@dataclass(frozen=True, eq=False)
class QuantizedLayer:
    """One linear layer after quantization.

    Attributes:
        name: the module's full name in the model.
        scheme: how it was quantized. `scale` has one column per group even where `group_size` is -1.
        codes: uint8 [out, in]: integers 0 .. 2**bits - 1 (symmetric: value + 2**(bits-1)), or codes of `element`; None
            for ggml types, and data types without codes, whose result is `weight`.
        scale: [out, groups] in its stored dtype (float16 for integers); scales may be negative. With `element`: float32
            values that the scheme's scale type holds exactly; [1, 1] per tensor, [out/M, in/N] for blocks.
        zero_point: uint8 [out, groups], or one int for all groups (symmetric: 2**(bits-1)).
        weight: dequantized [out, in], only for data types without codes.
        bias: [out] in the model's dtype, or None.
        transposed: the module stores its weight as [in, out] (Transformers' Conv1D).
        act_scale: float32 scalar, the scale of static activations, exact in the model's dtype; else None.
        act_zero_point: code of 0.0 in the signed range, for static asymmetric activations.
        element: name in `codecs.minifloat.MINIFLOATS`, for the small float types.
        global_scale: float32 scalar by which stored scales are divided (NVFP4), or None.
        act_global_scale: the same for inputs.
        blocks: codes and scales of a layer in a ggml type.

    The dequantized weight is `scale * (codes - zero_point)` in float32, or that of `dequantize_minifloat` with
    `element`.
    """

    name: str
    scheme: QuantizationScheme
    codes: torch.Tensor | None = None
    scale: torch.Tensor | None = None
    zero_point: torch.Tensor | int | None = None
    weight: torch.Tensor | None = None
    bias: torch.Tensor | None = None
    transposed: bool = False
    act_scale: torch.Tensor | None = None
    act_zero_point: int | None = None
    element: str | None = None
    global_scale: torch.Tensor | None = None
    act_global_scale: torch.Tensor | None = None
    blocks: GgmlBlocks | None = None

    @property
    def out_features(self) -> int:
        return int(self._codes_or_weight().shape[0])

    @property
    def in_features(self) -> int:
        return int(self._codes_or_weight().shape[1])

    @property
    def kind(self) -> str | None:
        """Name of the ggml type that stores the layer, `Q4_K`, or None."""
        return None if self.blocks is None else self.blocks.kind.name

    def _codes_or_weight(self) -> torch.Tensor:
        source = self.blocks.codes if self.blocks is not None else self.weight if self.codes is None else self.codes
        assert source is not None
        return source

    def rows(self, wanted: slice) -> QuantizedLayer:
        """A slice of the outputs as a layer; scales must be per row or per tensor."""
        count = self.out_features

        def part(t: Any) -> Any:
            return t[wanted] if isinstance(t, torch.Tensor) and t.dim() and t.shape[0] == count else t

        blocks = None if self.blocks is None else self.blocks.rows(wanted)
        return replace(
            self, codes=part(self.codes), scale=part(self.scale), zero_point=part(self.zero_point),
            weight=part(self.weight), blocks=blocks, bias=part(self.bias),
        )  # fmt: skip

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """[out, in], computed in float32 and then cast to `dtype`."""
        size = self.scheme.group_size
        if self.blocks is not None:
            values = self.blocks.dequantize()
        elif self.codes is None or self.scale is None:
            values = self._codes_or_weight()
        elif self.element is not None:
            values = dequantize_minifloat(self.codes, MINIFLOATS[self.element], self.scale, size, self.global_scale)
        else:
            values = dequantize_codes(self.codes, self.scale, self.zero_point, size)
        return values.to(dtype)


def dequantize_codes(
    codes: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor | int | None, group_size: object
) -> torch.Tensor:
    """float32 [out, in] from codes [out, in], scale [out, groups] and zero point (int or [out, groups])."""
    out, cols = codes.shape
    size = group_size if isinstance(group_size, int) and group_size > 0 else cols
    groups = scale.shape[-1]
    values = codes.float()
    if groups * size != cols:
        values = torch.nn.functional.pad(values, (0, groups * size - cols))
    values = values.view(out, groups, size)
    zero = zero_point.float().unsqueeze(-1) if isinstance(zero_point, torch.Tensor) else float(zero_point or 0)
    values = values.sub_(zero).mul_(scale.float().unsqueeze(-1))
    return values.view(out, groups * size)[:, :cols]
