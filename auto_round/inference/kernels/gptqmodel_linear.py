"""Kernels that run packed integer weights with GPTQModel's modules (Marlin, ExLlamaV2, GEMM, torch).

Importing it takes seconds, sets environment variables and prints a banner, so it is imported when one of these kernels
is checked for a layer. Its CUDA kernels are compiled with nvcc at their first use.
"""

from __future__ import annotations

import functools
import inspect
import re
import weakref
from importlib import import_module
from typing import Any

import torch
from torch import nn

from auto_round.errors import UnsupportedError, first_line
from auto_round.inference.kernels import IntegerWeight, LayerSpec, LinearKernel
from auto_round.layouts.bit_stream import pack_rows, unpack_rows
from auto_round.layouts.integers import AWQ, GPTQ_V2, GptqLayout

# ExLlamaV2's scratch memory on each device, shared by its layers and freed with the last of them.
_scratch: weakref.WeakValueDictionary[torch.device, Any] = weakref.WeakValueDictionary()
_SCRATCH_SPARE = 256  # bytes; slices are rounded up to 128

# GPTQModel's errors for an unsupported machine or layer: a missing module, an unsupported value, an extension that does
# not compile.
_UNSUPPORTED_ERRORS = (ImportError, ValueError, RuntimeError)


class GptqmodelLinear(LinearKernel):
    """x -> x W^T by a module of GPTQModel.

    Its kernels compute in half precision: inputs, and scales that are not float16, are rounded to the model's dtype.
    """

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
            self._scratch = _post_init(module, device)
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
            module = import_module("gptqmodel.utils.marlin")
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
    return import_module("gptqmodel.utils.importer").hf_select_quant_linear_v2(
        bits=bits, group_size=group_size, desc_act=False, sym=sym, format=layout, quant_method=method, dtype=dtype,
        pack=False, device_map={"": device}, backend=backend,
    )  # fmt: skip


def _post_init(module: Any, device: torch.device) -> Any:
    """Call the module's `post_init`. Returns scratch memory that must live as long as the module, or None."""
    if "scratch_space" not in inspect.signature(module.post_init).parameters:
        module.post_init()
        return None
    size = module.temp_dq_size()
    scratch = _scratch.get(device)
    if scratch is None or scratch.scratch_bytes < size + _SCRATCH_SPARE:
        scratch = import_module("gptqmodel.utils.exllamav2").ScratchSpace(size + _SCRATCH_SPARE, device)
        _scratch[device] = scratch
    module.post_init(scratch_space=scratch)
    return scratch


def _message(error: object) -> str:
    """The first line of an error, with classes written by name."""
    return re.sub(r"<class '(?:\w+\.)*(\w+)'>", r"\1", first_line(error))
