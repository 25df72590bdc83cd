"""A checkpoint that is quantized already, seen as the dense one it stands for."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch

from auto_round.errors import ModelError
from auto_round.modeling.dequantize import apply_scale, dequantize_mxfp4, is_float8, scale_block
from auto_round.modeling.tensor_files import StoredTensor, TensorFiles, empty_pages

_ELEMENT_OF = {torch.float8_e4m3fn: "e4m3", torch.float8_e5m2: "e5m2"}


@dataclass(frozen=True)
class StoredWeight:
    """One dense tensor that the files hold in small floats.

    Attributes:
        codes, scale: names of its two tensors in the files.
        layout: "float8" [..., out, in] in a float8 dtype; "mxfp4" [out, in/2] bytes; "mxfp4_experts" bytes
            [experts, out, in/32, 16], whose dense tensor is [experts, in, out].
        block: rows and columns that share a scale, as the config says.
    """

    codes: str
    scale: str
    layout: str
    block: tuple[int, int] | None = None


class DequantizedFiles(TensorFiles):
    """Reads quantized tensors as dense ones, under the names that the dense checkpoint has.

    Only the tensor that is asked for is in memory, with one expert of it or a few rows in float32.

    Args:
        files: what lies on disk.
        weights: by dense name, how it is stored.
        hidden: names that a dense checkpoint does not have: scales of weights and activations.
        dtype: of the dense tensors.
        description: how the weights are stored, in words.

    Raises:
        ModelError: the shapes of a weight and its scale do not belong together.
    """

    def __init__(
        self, files: TensorFiles, weights: Mapping[str, StoredWeight], hidden: Collection[str], dtype: torch.dtype,
        description: str,
    ) -> None:  # fmt: skip
        away = {*hidden, *(w.codes for w in weights.values()), *(w.scale for w in weights.values())}
        dense = {name: self._logical(files, weight, dtype) for name, weight in weights.items()}
        super().__init__(files.folder, {k: v for k, v in files.tensors.items() if k not in away} | dense)
        self.notes = files.notes
        self.stored, self.weights, self.dtype, self.description = files, dict(weights), dtype, description

    def read(self, key: str, row: int | None = None) -> torch.Tensor:
        weight = self.weights.get(key)
        if weight is None:
            return self.stored.read(key, row)
        shape = self.tensors[key].shape
        if row is None and len(shape) == 3:
            whole = empty_pages(shape, self.dtype)
            for expert in range(shape[0]):
                whole[expert] = self.read(key, expert)
            return whole
        codes, scale = self.stored.read(weight.codes, row), self._scale(weight, row)
        if weight.layout == "mxfp4_experts":
            packed = codes.flatten(-2)
            out = empty_pages((packed.shape[0], 2 * packed.shape[1]), self.dtype)
            return dequantize_mxfp4(packed, scale, out).T.contiguous()
        out = empty_pages(shape if row is None else shape[1:], self.dtype)
        if weight.layout == "mxfp4":
            return dequantize_mxfp4(codes, scale, out)
        block = scale_block(tuple(codes.shape), tuple(scale.shape), weight.block)
        assert block is not None  # checked when the files were opened
        return apply_scale(codes, _ELEMENT_OF[codes.dtype], scale, block, out)

    def equal(self, first: str, second: str) -> bool:
        one, two = self.weights.get(first), self.weights.get(second)
        if one is None and two is None:
            return self.stored.equal(first, second)
        if one is None or two is None or one.layout != two.layout:
            return False
        return self.stored.equal(one.codes, two.codes) and self.stored.equal(one.scale, two.scale)

    def _scale(self, weight: StoredWeight, row: int | None) -> torch.Tensor:
        """The scale of a whole tensor, or of one of its experts."""
        shape = self.stored.tensors[weight.scale].shape
        own = row is not None and len(shape) > 0 and shape[0] == self.stored.tensors[weight.codes].shape[0]
        return self.stored.read(weight.scale, row if own else None)

    @staticmethod
    def _logical(files: TensorFiles, weight: StoredWeight, dtype: torch.dtype) -> StoredTensor:
        """Shape and dtype of the dense tensor. Its byte range only tells how large it is."""
        codes, scale = files.tensors[weight.codes], files.tensors[weight.scale]
        shape: tuple[int, ...]
        if weight.layout == "float8":
            shape = codes.shape
            fits = is_float8(codes.dtype) and len(shape) > 1
            fits = fits and scale_block(shape, scale.shape, weight.block) is not None
        elif weight.layout == "mxfp4":
            shape = (*codes.shape[:-1], 2 * codes.shape[-1])
            fits = _is_byte(codes) and _is_byte(scale) and scale.shape == (*shape[:-1], shape[-1] // 32)
            fits = fits and shape[-1] % 32 == 0
        else:
            experts, out, groups, width = codes.shape
            shape = (experts, groups * width * 2, out)
            fits = _is_byte(codes) and _is_byte(scale) and width == 16 and scale.shape == codes.shape[:-1]
        if not fits:
            raise ModelError(
                f"{codes.file}: tensor {weight.codes!r} {list(codes.shape)} {codes.dtype} and its scale "
                f"{weight.scale!r} {list(scale.shape)} {scale.dtype} do not belong together; fetch the files again"
            )
        count = 1
        for size in shape:
            count *= size
        return StoredTensor(codes.file, dtype, shape, 0, count * dtype.itemsize)


def _is_byte(stored: StoredTensor) -> bool:
    return stored.dtype == torch.uint8 or stored.dtype == getattr(torch, "float8_e8m0fnu", None)
