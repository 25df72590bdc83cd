"""Kernels from other packages for packed integer weights: PyTorch's own, for machines without a C compiler, those of
auto-round-lib ("ark") and of GPTQModel (Marlin, ExLlamaV2, GEMM, torch), and Gaudi's.

Packages are imported when a layer first needs them; GPTQModel's CUDA kernels are compiled with nvcc at their first use.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
import re
import weakref
from typing import Any

import torch
from torch import nn

from auto_round.errors import UnsupportedError, first_line
from auto_round.inference.kernels import IntegerWeight, LayerSpec, LinearKernel
from auto_round.layouts.bit_stream import pack_rows, pack_words, unpack_rows
from auto_round.layouts.integers import AWQ, GPTQ_V2, GptqLayout, signed_values, stored_codes

_GROUP_SIZES = (32, 64, 128, 256)
# ExLlamaV2's scratch memory on each device, shared by its layers and freed with the last of them.
_scratch: weakref.WeakValueDictionary[torch.device, Any] = weakref.WeakValueDictionary()
# GPTQModel's errors for an unsupported machine or layer: a missing module, an unsupported value, an extension that does
# not compile.
_UNSUPPORTED_ERRORS = (ImportError, ValueError, RuntimeError)


def _aligned(rows: torch.Tensor) -> torch.Tensor:
    """`rows` as bfloat16, contiguous and aligned to 64 bytes: the kernels of PyTorch 2.6 crash on other addresses."""
    rows = rows.to(torch.bfloat16).contiguous()
    return rows if rows.data_ptr() % 64 == 0 else rows.clone()


def _missing(operation: str) -> str | None:
    return None if hasattr(torch.ops.aten, operation) else f"this version of PyTorch has no {operation}"


class CpuInt4(LinearKernel):
    """Weights of 2, 3 and 4 bits through `_weight_int4pack_mm_for_cpu`, which computes scale * (code - 8) + offset in
    bfloat16. The offset, scale * (8 - zero), is zero for symmetric weights, and for 2 and 3 bits, where code - zero + 8
    fits into 4 bits and is stored instead of the code."""

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
    try:
        return importlib.import_module("auto_round_kernel")
    except (ImportError, OSError) as error:
        return f"auto-round-lib cannot be imported ({error}): pip install auto-round-lib, with torch 2.8 or newer"


class ArkKernel(LinearKernel):
    """Weights of 2, 4 and 8 bits through auto-round-lib; on Intel GPUs (untested) symmetric ones, with float16
    scales."""

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

    words: torch.Tensor  # int32 [in, out/8]; nibble i of word w is for output 8w + i
    zeros: torch.Tensor  # int32 [groups, out/8], likewise
    scales: torch.Tensor  # [groups, out]

    def __init__(self, weight: IntegerWeight) -> None:
        super().__init__(weight)
        words, zeros = (pack_words(array, 4).T.contiguous() for array in (weight.codes, weight.zeros))
        self.hold(words=words, zeros=zeros, scales=weight.scales.T.to(torch.bfloat16).contiguous())

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


class GptqmodelLinear(LinearKernel):
    """x -> x W^T by a module of GPTQModel, in half precision: inputs are rounded to the model's dtype."""

    backend: str  # GPTQModel's names of the kernel, of the method and of the checkpoint's format
    method: str = "gptq"
    layout: str = "gptq_v2"
    words: GptqLayout = GPTQ_V2  # packs the codes, with zero points without an offset
    in_place: bool = False  # whether the module keeps the codes in this layout; else there is a copy on the CPU
    marlin: bool = False  # compiled at its first use, and takes scales in the model's dtype only
    unit: int = 1  # `out_features` must be a multiple of it

    def __init__(self, weight: IntegerWeight) -> None:
        super().__init__(weight)
        spec, device = weight.spec, weight.codes.device
        if spec.sym and bool((weight.zeros != 1 << (spec.bits - 1)).any()):
            raise UnsupportedError("its config says symmetric, but some zero points are not 2**(bits - 1)")
        qweight, qzeros = self.words.words(weight.codes, weight.zeros, spec.bits)
        self._saved = None if self.in_place else pack_rows(weight.codes, spec.bits).cpu()
        # float16 scales keep their dtype in a bfloat16 model, which would round them.
        dtype = torch.float16 if weight.scales.dtype == torch.float16 and not self.marlin else spec.dtype
        try:
            kind, size = self._kind(spec)
            module = kind(
                bits=spec.bits, group_size=size, sym=spec.sym, desc_act=False, bias=False,
                in_features=spec.in_features, out_features=spec.out_features, pack_dtype=torch.int32,
                register_buffers=True, dtype=spec.dtype,
            )  # fmt: skip
            order = torch.arange(spec.in_features, dtype=torch.int32, device=device) // spec.group_size
            scales = weight.scales.T.to(dtype).contiguous()
            for name, tensor in (("qweight", qweight), ("qzeros", qzeros), ("scales", scales), ("g_idx", order)):
                if name in module._parameters:
                    setattr(module, name, nn.Parameter(tensor, requires_grad=False))
                elif name in module._buffers:
                    setattr(module, name, tensor)
            self._scratch = None  # memory that must live as long as the module
            if "scratch_space" in inspect.signature(module.post_init).parameters:
                size = module.temp_dq_size() + 256  # slices are rounded up to 128 bytes
                self._scratch = _scratch.get(device)
                if self._scratch is None or self._scratch.scratch_bytes < size:
                    exllama = importlib.import_module("gptqmodel.utils.exllamav2")
                    self._scratch = _scratch[device] = exllama.ScratchSpace(size, device)
                module.post_init(scratch_space=self._scratch)
            else:
                module.post_init()
        except _UNSUPPORTED_ERRORS as error:
            raise UnsupportedError(f"GPTQModel says: {_message(error)}") from error
        self._module = [module.eval()]  # not a submodule: it raises an error in training mode

    @classmethod
    def unsupported_reason(cls, spec: LayerSpec) -> str | None:
        if spec.in_features % spec.group_size:
            return f"needs groups of one size: {spec.in_features} inputs are no multiple of {spec.group_size}"
        if spec.out_features % cls.unit:
            return f"needs outputs in multiples of {cls.unit}, not {spec.out_features}"
        error: object = None
        try:
            cls._kind(spec)
        except _UNSUPPORTED_ERRORS as raised:
            error = raised
        if error is None and cls.marlin:
            module = importlib.import_module("gptqmodel.utils.marlin")
            error = None if module.marlin_runtime_available(spec.dtype) else module.marlin_runtime_error(spec.dtype)
        return None if error is None else f"GPTQModel says: {_message(error)}"

    @classmethod
    def _kind(cls, spec: LayerSpec) -> tuple[Any, int]:
        """GPTQModel's class and the group size to give it, or -1 for one group per row. Raises GPTQModel's errors."""
        refused: Exception | None = None
        for size in (-1, spec.group_size) if spec.group_size == spec.in_features else (spec.group_size,):
            try:
                kind = _select_kernel(
                    cls.backend, cls.method, cls.layout, size, spec.bits, spec.sym, spec.dtype, spec.device
                )
                ok, reason = kind.validate(
                    bits=spec.bits, group_size=size, desc_act=False, sym=spec.sym, in_features=spec.in_features,
                    out_features=spec.out_features, pack_dtype=torch.int32, dtype=spec.dtype,
                )  # fmt: skip
                if ok:
                    return kind, size
            except _UNSUPPORTED_ERRORS as error:
                reason = error
            refused = refused or reason
        raise refused or ValueError("refused")

    @torch.no_grad()
    def multiply(self, rows: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self._module[0](rows.to(self.spec.dtype).contiguous())
        return y

    def codes(self) -> torch.Tensor:
        module, spec = self._module[0], self.spec
        if self._saved is None:
            return self.words.codes(module.qweight, spec.bits)
        return unpack_rows(self._saved, spec.bits, spec.in_features).to(module.scales.device)


def _kernel(name: str, backend: str, **attributes: Any) -> type[GptqmodelLinear]:
    awq = {"method": "awq", "layout": "gemm", "words": AWQ} if name.startswith("Awq") else {}
    return type(name, (GptqmodelLinear,), {"backend": backend, **attributes, **awq})


# Dequantize, then multiply: any device.
Torch, AwqTorch = _kernel("Torch", "torch", in_place=True), _kernel("AwqTorch", "torch", in_place=True)
# PyTorch's product for CPUs with 4-bit weights.
TorchAten = _kernel("TorchAten", "gptq_torch_aten", unit=16)
AwqTorchAten = _kernel("AwqTorchAten", "awq_torch_aten", unit=16)
# Fused products for CUDA; Marlin in GPTQ layout has symmetric 4 and 8 bits.
Marlin = _kernel("Marlin", "marlin", layout="gptq", marlin=True)
AwqMarlin = _kernel("AwqMarlin", "marlin", marlin=True)
ExllamaV2, AwqExllamaV2 = _kernel("ExllamaV2", "exllama_v2"), _kernel("AwqExllamaV2", "exllama_v2")
AwqGemm = _kernel("AwqGemm", "gemm", in_place=True)


@functools.lru_cache(maxsize=256)
def _select_kernel(
    backend: str, method: str, layout: str, group_size: int, bits: int, sym: bool, dtype: torch.dtype, device: str
) -> Any:
    """GPTQModel's class for a kernel. Cached, because GPTQModel logs each choice."""
    return importlib.import_module("gptqmodel.utils.importer").hf_select_quant_linear_v2(
        bits=bits, group_size=group_size, desc_act=False, sym=sym, format=layout, quant_method=method, dtype=dtype,
        pack=False, device_map={"": device}, backend=backend,
    )  # fmt: skip


def _message(error: object) -> str:
    """The first line of an error, with classes written by name."""
    return re.sub(r"<class '(?:\w+\.)*(\w+)'>", r"\1", first_line(error))
