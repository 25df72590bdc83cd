"""Read FP8 and MXFP4 checkpoints as dense ones, tensor by tensor.

The tensors decide what is dequantized; the configuration only says what to expect. A value is `element * scale`,
computed in float32 and rounded once to the requested dtype.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from itertools import product
from math import prod
from typing import Any, NamedTuple

import torch

from auto_round.codecs.minifloat import MINIFLOATS, dequantize_minifloat
from auto_round.errors import ModelError, UnsupportedError
from auto_round.layouts.floats import unpack_codes, unpack_e8m0
from auto_round.modeling.config import QUANTIZATION_KEYS, read_value, text_config
from auto_round.modeling.files.folder import check_inside, read_object
from auto_round.modeling.files.safetensors import StoredTensor, TensorFiles, empty_mmap

_CHUNK_NUMEL = 1 << 20  # elements in float32 at a time
_FLOAT8 = {element.dtype: name for name, element in MINIFLOATS.items() if element.dtype is not None}
_E8M0 = getattr(torch, "float8_e8m0fnu", None)  # newer than the oldest torch supported
_BYTES = (torch.uint8, _E8M0)
READABLE = (
    "FP8 (quant_method fp8, fbgemm_fp8, modelopt; compressed-tensors float-quantized, naive-quantized and "
    "mxfp8-quantized) and MXFP4 (quant_method mxfp4; compressed-tensors mxfp4-pack-quantized)"
)
_MODELOPT = ("FP8", "FP8_PER_CHANNEL_PER_TOKEN", "FP8_PB_WO")
_COMPRESSED = ("float-quantized", "naive-quantized", "mxfp8-quantized", "mxfp4-pack-quantized", "dense")
# Name patterns of scales, which are all multiplied with the weight.
_SCALES = ("{name}_scale_inv", "{name}_scale", "{stem}.scale", "{stem}.qscale_weight")
# Other tensors of a quantized weight; a dense checkpoint has none of them.
_AUXILIARY_SUFFIXES = (
    "input_scale", "activation_scale", "output_scale", "qscale_act", "weight_shape", "input_global_scale",
    "weight_scale_2", "weight_zero_point", "input_zero_point",
)  # fmt: skip


def scale_block(
    weight: tuple[int, ...], scale: tuple[int, ...], block: tuple[int, int] | None = None
) -> tuple[int, int] | None:
    """Rows and columns of a weight of this shape [experts..., out, in] that share one scale; None for a wrong shape.

    A scale has one number, or one per expert; [out] or [out, 1]; [out/M, in/N] with truncated blocks at the edges.
    `block`: (M, N) of the checkpoint's config. Without it, or if it does not match, blocks of equal size are assumed.
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


def dequantize(
    codes: torch.Tensor, element: str, scale: torch.Tensor, block: tuple[int, int], out: torch.Tensor
) -> torch.Tensor:
    """Write `element * scale` to `out`, contiguous [..., out, in] in the target dtype, and return it.

    Args:
        codes: [..., out, in] in a float8 dtype, or uint8 [..., out, in/2] with two 4-bit codes a byte.
        element: name in `codecs.minifloat.MINIFLOATS`.
        scale: as stored: floats, or powers of two as uint8 or float8_e8m0fnu (OCP MX v1.0, 5.3.3 and 6.1).
        block: rows and columns that share a scale.
    """
    rows, columns = out.shape[-2:]
    dense, stored = out.view(-1, columns), codes.reshape(out.numel() // columns, -1)
    factors = unpack_e8m0(scale.view(torch.uint8)) if scale.dtype in _BYTES else scale.float()
    factors = factors.reshape(-1, -(-rows // block[0]), -(-columns // block[1]))
    factors = factors.expand(dense.shape[0] // rows, *factors.shape[1:])
    step = max(1, _CHUNK_NUMEL // columns)
    for start in range(0, dense.shape[0], step):
        part = unpack_codes(stored[start : start + step], element, columns)
        index = torch.arange(start, start + part.shape[0])
        own = factors[index // rows, index % rows // block[0]]
        dense[start : start + step] = dequantize_minifloat(part, MINIFLOATS[element], own, (1, block[1]))
    return out


class StoredWeight(NamedTuple):
    """One dense tensor that is stored quantized."""

    codes: str  # names of its two tensors in the files
    scale: str
    element: str  # name in `codecs.minifloat.MINIFLOATS`
    shape: tuple[int, ...]  # [..., out, in]
    block: tuple[int, int]  # rows and columns that share a scale
    transposed: bool = False  # dense it is [..., in, out] (MXFP4 experts, stored as [experts, out, in/32, 16] bytes)


class DequantizedFiles(TensorFiles):
    """Reads quantized tensors as dense ones in `dtype`, under the names of the dense checkpoint."""

    def __init__(self, files: TensorFiles, weights: Mapping[str, StoredWeight], dtype: torch.dtype) -> None:
        removed = {f"{name.rpartition('.')[0]}.{leaf}" for name in weights for leaf in _AUXILIARY_SUFFIXES}
        tensors, counts = dict(files.tensors), Counter[str]()
        for name, weight in weights.items():
            removed |= {weight.codes, weight.scale} - {name}
            shape = (*weight.shape[:-2], *weight.shape[:-3:-1]) if weight.transposed else weight.shape
            file, size = files.tensors[weight.codes].file, prod(shape) * dtype.itemsize
            tensors[name] = StoredTensor(file, dtype, shape, 0, size)  # the byte range gives only the size
            counts["MXFP4" if weight.element == "e2m1" else f"FP8 {weight.element}"] += 1
        super().__init__(files.folder, {name: stored for name, stored in tensors.items() if name not in removed})
        self.notes = files.notes
        self._stored, self.weights, self.dtype = files, dict(weights), dtype
        # How the weights are stored, in words.
        self.description = " and ".join(f"{count} tensors in {kind}" for kind, count in sorted(counts.items()))

    @property
    def stored(self) -> TensorFiles:
        return self._stored

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
        scale_shape = self.stored.tensors[weight.scale].shape
        scale = self.stored.read(weight.scale, row if scale_shape[:1] == weight.shape[:1] else None)
        out = empty_mmap(weight.shape if row is None else weight.shape[1:], self.dtype)
        dequantize(self.stored.read(weight.codes, row), weight.element, scale, weight.block, out)
        return out.mT.contiguous() if weight.transposed else out

    def equal(self, first: str, second: str) -> bool:
        one, two = self.weights.get(first), self.weights.get(second)
        if one is None or two is None:
            return one is two and self.stored.equal(first, second)
        alike = (one.element, one.transposed) == (two.element, two.transposed)
        return alike and self.stored.equal(one.codes, two.codes) and self.stored.equal(one.scale, two.scale)

    def inputs(self, key: str) -> tuple[str, ...]:
        weight = self.weights.get(key)
        return (key,) if weight is None else (weight.codes, weight.scale)


def quantization_of(config: Any) -> dict[str, Any] | None:
    """The quantization that a configuration, or its text part, declares, if any. Raises ModelError for no object."""
    for part, key in product((config, text_config(config)), QUANTIZATION_KEYS):
        values = read_value(part, key)
        if values is not None and not isinstance(values, Mapping) and not hasattr(values, "to_dict"):
            raise ModelError(f"config.json has {key}={values!r}, which is not an object; fetch it again")
        if values is not None:
            return dict(values if isinstance(values, Mapping) else values.to_dict())
    return None


def check_readable(declared: Mapping[str, Any] | None, name: str) -> None:
    """Raise UnsupportedError when checkpoints with this `quantization_config` cannot be read; `name` is the model's."""
    if declared is None:
        return
    try:
        reason = _unsupported_reason(declared)
        _declared_block(declared)
    except (TypeError, ValueError, AttributeError, KeyError) as error:
        problem = f"the quantization_config of {name} is malformed ({error!r}); fetch config.json again"
        raise ModelError(problem) from error
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

    `declared`: the `quantization_config`, after `check_readable`. Without one, float8 weights with a scale are
    dequantized too: some writers put the declaration into another file, which may raise as `check_readable`. Raises
    ModelError for a quantized weight without its scale, or shapes that do not match.
    """
    modelopt = files.folder / "hf_quant_config.json"
    if declared is None and modelopt.is_file():
        declared = {"quant_method": "modelopt", **read_object(check_inside(files.folder, modelopt))}
        check_readable(declared, str(files.folder))
    block = _declared_block(declared or {})
    weights: dict[str, StoredWeight] = {}
    for key, stored in files.tensors.items():
        stem = key.rpartition(".")[0]
        if stored.dtype in _FLOAT8 and len(stored.shape) > 1:
            names = [pattern.format(name=key, stem=stem) for pattern in _SCALES]
            scale = next((name for name in names if name in files), None)
            if scale is not None:
                found = scale_block(stored.shape, files.tensors[scale].shape, block)
                if found is None:
                    raise _mismatch(files, key, scale)
                weights[key] = StoredWeight(key, scale, _FLOAT8[stored.dtype], stored.shape, found)
            elif declared is not None:
                raise ModelError(
                    f"{stored.file}: the FP8 tensor {key!r} has no scale (looked for {', '.join(names)}); fetch the "
                    "files again"
                )
        elif key.endswith("_blocks") and len(stored.shape) == 4 and f"{key[:-7]}_scales" in files:
            weights[key[:-7]] = _mxfp4(files, key, f"{key[:-7]}_scales", stored.shape[:-1], transposed=True)
        elif key.endswith(".weight_packed") and stored.dtype == torch.uint8 and f"{stem}.weight_scale" in files:
            groups = (*stored.shape[:-1], stored.shape[-1] // 16)
            weights[f"{stem}.weight"] = _mxfp4(files, key, f"{stem}.weight_scale", groups, transposed=False)
    if not weights and declared is not None:
        raise ModelError(
            f"config.json in {files.folder} declares a quantization ({_method(declared)}), but no quantized tensor "
            "is in its files; fetch them again, or take quantization_config out of config.json"
        )
    return DequantizedFiles(files, weights, dtype or torch.bfloat16) if weights else None


def _mxfp4(files: TensorFiles, codes: str, scale: str, groups: tuple[int, ...], *, transposed: bool) -> StoredWeight:
    """A weight in groups of 32 elements, 16 bytes. `groups`: the shape of its scales, as its codes require it."""
    packed, scales = files.tensors[codes], files.tensors[scale]
    if {packed.dtype, scales.dtype} - set(_BYTES) or scales.shape != groups or prod(packed.shape) != 16 * prod(groups):
        raise _mismatch(files, codes, scale)
    return StoredWeight(codes, scale, "e2m1", (*groups[:-1], 32 * groups[-1]), (1, 32), transposed)


def _mismatch(files: TensorFiles, codes: str, scale: str) -> ModelError:
    one, two = files.tensors[codes], files.tensors[scale]
    return ModelError(
        f"{one.file}: tensor {codes!r} {list(one.shape)} {one.dtype} and its scale {scale!r} {list(two.shape)} "
        f"{two.dtype} do not match; fetch the files again"
    )


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
    if method != "compressed-tensors":
        bits = declared.get("bits", declared.get("w_bit"))
        return f"{method or 'quant_method not given'}{f', {bits} bits' if bits else ''}"
    groups = [g for g in dict(declared.get("config_groups") or {}).values() if isinstance(g, Mapping)]
    top = declared.get("format")
    unread = sorted(({str(group.get("format") or top) for group in groups} or {str(top)}) - set(_COMPRESSED))
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


def _declared_block(declared: Mapping[str, Any]) -> tuple[int, int] | None:
    """The declared size of two-dimensional blocks; None for none or several."""
    groups = dict(declared.get("config_groups") or {}).values()
    given = [declared.get("weight_block_size")]
    given += [dict(group.get("weights") or {}).get("block_structure") for group in groups]
    found = {tuple(map(int, size.split("x") if isinstance(size, str) else size)) for size in given if size}
    sizes = [(size[0], size[1]) for size in found if len(size) == 2]
    return sizes[0] if len(sizes) == 1 else None
