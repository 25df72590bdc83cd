"""Read FP8 and MXFP4 checkpoints as dense ones, tensor by tensor.

| quant_method | weights |
|---|---|
| fp8, fbgemm_fp8 | float8 `weight` with `weight_scale_inv` or `weight_scale`: blocks, channels or one scale |
| modelopt | the same, algorithms FP8, FP8_PER_CHANNEL_PER_TOKEN, FP8_PB_WO |
| compressed-tensors | float-quantized, naive-quantized (8-bit floats), mxfp8-quantized, mxfp4-pack-quantized |
| mxfp4 | `*_blocks` and `*_scales` of experts |

The tensors decide what is dequantized; the configuration only says what to expect. A value is `element *
scale`, computed in float32 and rounded once to the requested dtype. A scale belongs to the whole tensor, to an
output channel, or to a block of rows and columns.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import torch

from auto_round.codecs.minifloat import MINIFLOATS
from auto_round.errors import ModelError, UnsupportedError
from auto_round.modeling.config import read_value, text_config
from auto_round.modeling.files.folder import check_inside, read_object
from auto_round.modeling.files.safetensors import StoredTensor, TensorFiles, empty_mmap

_CHUNK_NUMEL = 1 << 20  # elements in float32 at a time
_ELEMENT_OF = {torch.float8_e4m3fn: "e4m3", torch.float8_e5m2: "e5m2"}
_E8M0 = getattr(torch, "float8_e8m0fnu", None)  # newer than the oldest torch supported


def e8m0_values(codes: torch.Tensor) -> torch.Tensor:
    """float32 powers of two 2**(code - 127) of uint8 codes; 255 is NaN (OCP MX v1.0, 5.4.1)."""
    values = (codes.to(torch.int32) << 23).view(torch.float32)  # the code is the exponent field of float32
    values = values.masked_fill(codes == 0, 2.0**-127)
    return values.masked_fill(codes == 255, torch.nan)


def scale_values(stored: torch.Tensor) -> torch.Tensor:
    """Convert a stored scale to float32: uint8 and float8_e8m0fnu are powers of two."""
    if stored.dtype == torch.uint8 or stored.dtype == _E8M0:
        return e8m0_values(stored.view(torch.uint8))
    return stored.float()


def scale_block(
    weight: tuple[int, ...], scale: tuple[int, ...], block: tuple[int, int] | None = None
) -> tuple[int, int] | None:
    """Rows and columns of a weight [..., out, in] that share one scale; None when the shapes do not match.

    Args:
        weight: shape, at least two-dimensional; dimensions before the last two are experts.
        scale: shape: one number, or one per expert; [out] or [out, 1]; [out/M, in/N] with truncated blocks at the
            edges.
        block: (M, N) of the checkpoint's config. Without it, or if it does not match, blocks of equal size are assumed.
    """
    *experts, rows, columns = weight
    if prod(scale) == 1 or list(scale) == experts:
        return rows, columns
    if tuple(scale) == (rows,) and not experts:
        return 1, columns
    if len(scale) != len(weight) or list(scale[:-2]) != experts:
        return None
    row_blocks, column_blocks = scale[-2:]
    if block is not None and (-(-rows // block[0]), -(-columns // block[1])) == (row_blocks, column_blocks):
        return block
    if row_blocks and column_blocks and rows % row_blocks == 0 and columns % column_blocks == 0:
        return rows // row_blocks, columns // column_blocks
    return None


def apply_scale(
    codes: torch.Tensor, element: str, scale: torch.Tensor, block: tuple[int, int], out: torch.Tensor
) -> torch.Tensor:
    """Write `element * scale` to `out` and return it.

    Args:
        codes: uint8 [..., out, in], or the element's float8 dtype.
        element: name in `codecs.minifloat.MINIFLOATS`.
        scale: as stored, of a shape that `scale_block` accepts.
        block: the result of `scale_block`.
        out: contiguous, in the shape of `codes` and the target dtype.
    """
    rows, columns = codes.shape[-2:]
    flat, dense = codes.view(torch.uint8).reshape(-1, rows, columns), out.view(-1, rows, columns)
    factors = scale_values(scale).reshape(-1, -(-rows // block[0]), -(-columns // block[1]))
    factors = factors.expand(flat.shape[0], *factors.shape[1:])
    step = max(1, _CHUNK_NUMEL // max(1, columns))
    even = columns % block[1] == 0
    for expert in range(flat.shape[0]):
        for start in range(0, rows, step):
            part = flat[expert, start : start + step]
            own = factors[expert, torch.arange(start, start + part.shape[0]) // block[0]]
            values = MINIFLOATS[element].decode(part)
            if even:
                values.view(part.shape[0], -1, block[1]).mul_(own.unsqueeze(-1))
            else:
                values.mul_(own.repeat_interleave(block[1], 1)[:, :columns])
            dense[expert, start : start + step] = values
    return out


def unpack_nibbles(packed: torch.Tensor) -> torch.Tensor:
    """uint8 [..., 2n] codes of 4 bits from bytes [..., n]; the low half of a byte comes first."""
    return torch.stack((packed & 15, packed >> 4), dim=-1).flatten(-2)


def dequantize_mxfp4(packed: torch.Tensor, scale: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """Dequantize bytes [..., out, in/2] of two E2M1 codes each with E8M0 scales [..., out, in/32].

    The values are written to the contiguous `out` [..., out, in], which is returned (OCP MX v1.0, 6.1 and 5.3.3).
    """
    half = packed.shape[-1]
    flat, scales, dense = packed.reshape(-1, half), scale.reshape(-1, scale.shape[-1]), out.view(-1, 2 * half)
    step = max(1, _CHUNK_NUMEL // max(1, 2 * half))
    block = (1, 2 * half // scales.shape[-1])
    for start in range(0, flat.shape[0], step):
        codes = unpack_nibbles(flat[start : start + step])
        apply_scale(codes, "e2m1", scales[start : start + step], block, dense[start : start + step])
    return out


@dataclass(frozen=True)
class StoredWeight:
    """One dense tensor that is stored quantized.

    Attributes:
        codes, scale: names of its two tensors in the files.
        layout: "float8" [..., out, in] in a float8 dtype; "mxfp4" [out, in/2] bytes; "mxfp4_experts" bytes
            [experts, out, in/32, 16], whose dense tensor is [experts, in, out].
        block: rows and columns that share a scale, from the config.
    """

    codes: str
    scale: str
    layout: str
    block: tuple[int, int] | None = None


class DequantizedFiles(TensorFiles):
    """Reads quantized tensors as dense ones, under the names of the dense checkpoint.

    Only the requested tensor is in memory, with one expert of it or a few rows in float32.

    Args:
        files: the stored files.
        weights: by dense name, how it is stored.
        hidden: names that a dense checkpoint does not have: scales of weights and activations.
        dtype: of the dense tensors.
        description: how the weights are stored, in words.

    Raises:
        ModelError: the shapes of a weight and its scale do not match.
    """

    def __init__(
        self, files: TensorFiles, weights: Mapping[str, StoredWeight], hidden: Collection[str], dtype: torch.dtype,
        description: str,
    ) -> None:  # fmt: skip
        removed = {*hidden, *(w.codes for w in weights.values()), *(w.scale for w in weights.values())}
        dense = {name: self._dense_meta(files, weight, dtype) for name, weight in weights.items()}
        super().__init__(files.folder, {k: v for k, v in files.tensors.items() if k not in removed} | dense)
        self.notes = files.notes
        self.stored, self.weights, self.dtype, self.description = files, dict(weights), dtype, description

    def read(self, key: str, row: int | None = None) -> torch.Tensor:
        weight = self.weights.get(key)
        if weight is None:
            return self.stored.read(key, row)
        shape = self.tensors[key].shape
        if row is None and len(shape) == 3:
            whole = empty_mmap(shape, self.dtype)
            for expert in range(shape[0]):
                whole[expert] = self.read(key, expert)
            return whole
        codes, scale = self.stored.read(weight.codes, row), self._scale(weight, row)
        if weight.layout == "mxfp4_experts":
            packed = codes.flatten(-2)
            out = empty_mmap((packed.shape[0], 2 * packed.shape[1]), self.dtype)
            return dequantize_mxfp4(packed, scale, out).T.contiguous()
        out = empty_mmap(shape if row is None else shape[1:], self.dtype)
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
    def _dense_meta(files: TensorFiles, weight: StoredWeight, dtype: torch.dtype) -> StoredTensor:
        """Shape and dtype of the dense tensor. Its byte range gives only its size."""
        codes, scale = files.tensors[weight.codes], files.tensors[weight.scale]
        shape: tuple[int, ...]
        if weight.layout == "float8":
            shape = codes.shape
            fits = codes.dtype in _ELEMENT_OF and len(shape) > 1
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
                f"{weight.scale!r} {list(scale.shape)} {scale.dtype} do not match; fetch the files again"
            )
        return StoredTensor(codes.file, dtype, shape, 0, prod(shape) * dtype.itemsize)


def _is_byte(stored: StoredTensor) -> bool:
    return stored.dtype in (torch.uint8, _E8M0)


READABLE = (
    "FP8 (quant_method fp8, fbgemm_fp8, modelopt; compressed-tensors float-quantized, naive-quantized and "
    "mxfp8-quantized) and MXFP4 (quant_method mxfp4; compressed-tensors mxfp4-pack-quantized)"
)
_CONFIG_KEYS = ("quantization_config", "compression_config")
_MODELOPT = ("FP8", "FP8_PER_CHANNEL_PER_TOKEN", "FP8_PB_WO")
_COMPRESSED = ("float-quantized", "naive-quantized", "mxfp8-quantized", "mxfp4-pack-quantized", "dense")
# Name patterns of scales, which are all multiplied with the weight.
_SCALES = ("{name}_scale_inv", "{name}_scale", "{stem}.scale", "{stem}.qscale_weight")
# Other tensors of a quantized weight; a dense checkpoint has none of them.
_AUXILIARY_SUFFIXES = (
    "input_scale", "activation_scale", "output_scale", "qscale_act", "weight_shape", "input_global_scale",
    "weight_scale_2", "weight_zero_point", "input_zero_point",
)  # fmt: skip


def quantization_of(config: Any) -> dict[str, Any] | None:
    """The quantization that a configuration declares, for the whole model or its text part; None if there is none.

    Raises ModelError when it is not an object.
    """
    for part in (config, text_config(config)):
        for key in _CONFIG_KEYS:
            values = read_value(part, key)
            if values is None:
                continue
            if not isinstance(values, Mapping) and not hasattr(values, "to_dict"):
                raise ModelError(f"config.json has {key}={values!r}, which is not an object; fetch it again")
            return dict(values) if isinstance(values, Mapping) else dict(values.to_dict())
    return None


def drop_quantization(config: Any) -> None:
    """Remove the quantization from a configuration in place: the model that is built from it is dense."""
    for part in (config, text_config(config)):
        for key in _CONFIG_KEYS:
            if hasattr(part, key):
                delattr(part, key)


def check_readable(declared: Mapping[str, Any] | None, name: str) -> None:
    """Raise UnsupportedError when checkpoints with this `quantization_config` cannot be read; `name` is the model's."""
    if declared is None:
        return
    try:
        reason = _unsupported_reason(declared)
        _block(declared)
    except (TypeError, ValueError, AttributeError, KeyError) as error:
        raise ModelError(
            f"the quantization_config of {name} is malformed ({error!r}); fetch config.json again"
        ) from error
    if reason is not None:
        raise UnsupportedError(
            f"{name} is quantized already ({reason}), and cannot be read: give the original model. Quantized "
            f"checkpoints that can be read: {READABLE}"
        )


def is_readable(declared: Mapping[str, Any] | None) -> bool:
    """Whether there is a declaration, of weights that can be read as dense ones."""
    return declared is not None and _unsupported_reason(declared) is None


def dense_view(
    files: TensorFiles, declared: Mapping[str, Any] | None, dtype: torch.dtype | None
) -> DequantizedFiles | None:
    """The files as a dense checkpoint in `dtype` (default bfloat16), or None when they are dense already.

    Args:
        files: the stored files.
        declared: the `quantization_config`, after `check_readable`. Without one, float8 weights with a scale are
            dequantized too: some writers put the declaration into another file.
        dtype: of the dense tensors.

    Raises:
        ModelError: a quantized weight without its scale, or shapes that do not match.
        UnsupportedError: that other file declares a format that cannot be read.
    """
    if declared is None:
        declared = _modelopt_file(files)
        check_readable(declared, str(files.folder))
    block = _block(declared or {})
    weights: dict[str, StoredWeight] = {}
    for key, stored in files.tensors.items():
        if stored.dtype in _ELEMENT_OF and len(stored.shape) > 1:
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
    hidden = {f"{_stem(name)}.{leaf}" for name in weights for leaf in _AUXILIARY_SUFFIXES}
    return DequantizedFiles(files, weights, hidden, dtype or torch.bfloat16, _describe(files, weights))


def _unsupported_reason(declared: Mapping[str, Any]) -> str | None:
    """What is declared, if it cannot be read; else None."""
    method = _method(declared)
    if method in ("fp8", "fbgemm_fp8"):
        return f"{method} with experts in fp4" if declared.get("expert_dtype") == "fp4" else None
    if method == "mxfp4":
        return None
    if method == "modelopt":
        algorithm = str(declared.get("quant_algo") or dict(declared.get("quantization") or {}).get("quant_algo"))
        return None if algorithm.upper() in _MODELOPT else f"modelopt {algorithm}"
    if method == "compressed-tensors":
        return _compressed_tensors_reason(declared)
    bits = declared.get("bits", declared.get("w_bit"))
    return f"{method or 'quant_method not given'}{f', {bits} bits' if bits else ''}"


def _compressed_tensors_reason(declared: Mapping[str, Any]) -> str | None:
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
    """The declared size of two-dimensional blocks; None for none or several."""
    found = {tuple(size) for size in (declared.get("weight_block_size"),) if size}
    for group in dict(declared.get("config_groups") or {}).values():
        size = dict(group.get("weights") or {}).get("block_structure")
        found |= {tuple(int(n) for n in size.split("x")) if isinstance(size, str) else tuple(size)} if size else set()
    sizes = [size for size in found if len(size) == 2]
    return (int(sizes[0][0]), int(sizes[0][1])) if len(sizes) == 1 else None


def _modelopt_file(files: TensorFiles) -> dict[str, Any] | None:
    """The declaration in ModelOpt's own file next to config.json."""
    file = files.folder / "hf_quant_config.json"
    if not file.is_file():
        return None
    return {"quant_method": "modelopt", **read_object(check_inside(files.folder, file))}


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
