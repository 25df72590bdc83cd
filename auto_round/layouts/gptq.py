"""The GPTQ layout: `qweight` packed along the input dimension, `qzeros` along the output dimension.

    qweight int32 [in*bits/32, out]      value i of column o = code of weight [o, i]
    qzeros  int32 [groups, out*bits/32]  value o of row g    = zero point of group g of row o, minus `zero_offset`
    scales  float16 [groups, out]

`bit_stream.py` defines the words. `zero_offset` is 1 in GPTQ "v1" files (AutoGPTQ, `auto_round:auto_gptq`) and 0 in
"v2" and plain `auto_round` files. With an offset of 1 the arithmetic is modulo 2**bits: a zero point of 0 is stored as
2**bits - 1 and read back as 0. Readers that add 1 without wrapping see 2**bits there, so asymmetric v1 files are not
accurate everywhere and asymmetric layers use other layouts by default.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch

from auto_round.codecs.kinds import codec_of
from auto_round.codecs.quantized_layer import QuantizedLayer, group_count
from auto_round.layouts.base import SCALE_DTYPE, IntegerLayout, TensorSpecs, integer_arrays, stored_group_size
from auto_round.layouts.bit_stream import pack_words, packs_evenly, period, unpack_words, words_needed
from auto_round.schemes import QuantizationScheme


def pack_gptq(
    codes: torch.Tensor, zeros: torch.Tensor, bits: int, zero_offset: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Pack one layer.

    Args:
        codes: uint8 [out, in].
        zeros: zero points, uint8 [out, groups].
        bits: 2, 3, 4 or 8.
        zero_offset: 1 or 0, subtracted from the zero points, modulo 2**bits.

    Returns:
        (qweight int32 [in*bits/32, out], qzeros int32 [groups, out*bits/32]).
        Raises UnsupportedError when a dimension does not fill whole words.
    """
    stored = (zeros.to(torch.int16) - zero_offset).bitwise_and_((1 << bits) - 1).to(torch.uint8)
    return pack_words(codes.T, bits), pack_words(stored, bits).T.contiguous()


@dataclass(frozen=True)
class GptqLayout(IntegerLayout):
    """GPTQ tensors with zero points stored minus `zero_offset`.

    Attributes:
        g_idx: add `g_idx` int32 [in], the group of each input column, which AutoGPTQ's readers expect.
    """

    zero_offset: int
    g_idx: bool = False
    bits: ClassVar[tuple[int, ...]] = (2, 3, 4, 8)

    def specs(
        self, scheme: QuantizationScheme, in_features: int, out_features: int,
        model_dtype: torch.dtype = torch.bfloat16,
    ) -> TensorSpecs:  # fmt: skip
        groups = group_count(in_features, stored_group_size(scheme))
        specs: TensorSpecs = {
            "qweight": (self._weight_shape(in_features, out_features, scheme.bits), torch.int32),
            "qzeros": ((groups, words_needed(out_features, scheme.bits)), torch.int32),
            "scales": ((groups, out_features), SCALE_DTYPE),
        }
        return specs | {"g_idx": ((in_features,), torch.int32)} if self.g_idx else specs

    def pack(self, layer: QuantizedLayer, model_dtype: torch.dtype = torch.bfloat16) -> dict[str, torch.Tensor]:
        codes, scales, zeros = integer_arrays(layer)
        qweight, qzeros = self._pack_words(codes, zeros, layer.scheme.bits)
        tensors = {"qweight": qweight, "qzeros": qzeros, "scales": scales.T.contiguous()}
        if self.g_idx:
            size = stored_group_size(layer.scheme)
            columns = torch.arange(layer.in_features, dtype=torch.int32)
            tensors["g_idx"] = columns // (size if size > 0 else layer.in_features)
        return tensors

    def unpack(
        self, name: str, scheme: QuantizationScheme, tensors: Mapping[str, torch.Tensor], in_features: int,
        out_features: int,
    ) -> QuantizedLayer:  # fmt: skip
        codes = self.code_rows(tensors["qweight"], scheme.bits).T.contiguous()
        zeros = self.zero_rows(tensors["qzeros"], scheme.bits).T.contiguous()
        scales = tensors["scales"].T.contiguous()
        return QuantizedLayer(name, scheme, codec_of(scheme).codes(codes, scales, zeros))

    def mismatch(self, scheme: QuantizationScheme, in_features: int, out_features: int) -> str | None:
        for what, size in (("in_features", in_features), ("out_features", out_features)):
            if not packs_evenly(size, scheme.bits):
                return f"{what}={size} is not a multiple of {period(scheme.bits)[0]}"
        return None

    def row_period(self, bits: int) -> tuple[int, int]:
        """(input columns, rows of `qweight`): the smallest part of `qweight` that holds whole columns of codes."""
        return period(bits)

    def code_rows(self, words: torch.Tensor, bits: int) -> torch.Tensor:
        """Codes of whole rows of `qweight`, uint8 [in, out]."""
        return unpack_words(words, bits)

    def zero_rows(self, qzeros: torch.Tensor, bits: int) -> torch.Tensor:
        """Zero points, uint8 [groups, out]; adding the offset wraps modulo 2**bits."""
        stored = unpack_words(qzeros.T, bits).T.to(torch.int16)
        return (stored + self.zero_offset).bitwise_and_((1 << bits) - 1).to(torch.uint8)

    def _weight_shape(self, in_features: int, out_features: int, bits: int) -> tuple[int, int]:
        return words_needed(in_features, bits), out_features

    def _pack_words(self, codes: torch.Tensor, zeros: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
        return pack_gptq(codes, zeros, bits, self.zero_offset)


GPTQ_V1, GPTQ_V2 = GptqLayout(1), GptqLayout(0)
