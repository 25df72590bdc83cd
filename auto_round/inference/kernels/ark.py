"""Packed integer weights through auto-round-lib (`import auto_round_kernel`, "ark"), a package of its own with compiled
kernels. Only its public calls are used, and it is imported when the first layer asks for it."""

from __future__ import annotations

import functools
import importlib
from types import ModuleType

import torch

from auto_round.inference.kernels.kernel import IntegerWeight, LayerSpec, LinearKernel

_BITS = {"cpu": (2, 4, 8), "xpu": (4, 8)}
_DTYPES = {2: "int2", 4: "int4", 8: "int8"}
INSTALL = "needs auto-round-lib and torch 2.8 or newer: pip install auto-round-lib"


@functools.lru_cache(maxsize=1)
def package() -> ModuleType | str:
    """The package, or the reason why it is not here."""
    if tuple(int(part) for part in torch.__version__.split(".")[:2]) < (2, 8):
        return INSTALL
    try:
        return importlib.import_module("auto_round_kernel")
    except (ImportError, OSError) as error:
        missing = isinstance(error, ModuleNotFoundError) and error.name == "auto_round_kernel"
        return INSTALL if missing else f"auto-round-lib cannot be imported: {error}"


class ArkKernel(LinearKernel):
    """Weights of 2, 4 and 8 bits. On CPUs in float32: inputs are widened, nothing is rounded. On Intel GPUs symmetric
    weights only, with integer products and float16 scales; that part has not been run."""

    blob: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor
    unscaled: torch.Tensor

    def __init__(self, weight: IntegerWeight) -> None:
        super().__init__(weight)
        spec, middle = weight.spec, 1 << (weight.spec.bits - 1)
        self.on_cpu = spec.device == "cpu"
        # (K, N, group size, compute type, weight type, scale type, asymmetric) as the package asks for them
        asym = not bool((weight.zeros == middle).all())
        kind = (_compute(spec), _DTYPES[spec.bits], "fp32" if self.on_cpu else "fp16", asym)
        self.kind = (spec.out_features, spec.in_features, spec.group_size, *kind)
        dtype = torch.float32 if self.on_cpu else torch.float16
        codes = (weight.codes.T.to(torch.int16) - middle).to(torch.int8).contiguous()
        zeros = (weight.zeros.T.to(torch.int16) - middle).to(torch.int8).contiguous() if asym else _nothing(codes)
        scales = weight.scales.T.to(dtype).contiguous()
        blob = _package().repack_quantized_weight(codes, scales, zeros, spec.group_size, *kind)
        # To give the codes back: weights divided by scales, and the codes themselves where a scale is zero.
        self.register_buffer("blob", blob, persistent=False)
        self.register_buffer("scales", weight.scales, persistent=False)
        self.register_buffer("zeros", weight.zeros, persistent=False)
        self.register_buffer("unscaled", weight.codes[self._spread(weight.scales == 0)].clone(), persistent=False)

    @classmethod
    def refuses(cls, spec: LayerSpec) -> str | None:
        if spec.device not in _BITS:
            return f"runs on cpu and xpu, not {spec.device}"
        if spec.bits not in _BITS[spec.device]:
            return f"runs {', '.join(map(str, _BITS[spec.device]))} bits there, not {spec.bits}"
        if spec.in_features % spec.group_size or spec.group_size % 8:
            return f"needs groups of a multiple of 8 columns that fill the {spec.in_features}, not {spec.group_size}"
        if spec.device == "xpu" and not spec.sym:
            return "runs symmetric weights on xpu"
        found = package()
        return found if isinstance(found, str) else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if torch.compiler.is_compiling():
            return torch.ops.auto_round.ark_linear(self.blob, x, *self.kind)
        return multiply(self.blob, x, *self.kind)

    def codes(self) -> torch.Tensor:
        out, width, *rest = self.kind
        dense = _package().unpack_weight(self.blob, torch.float32, out, width, *rest)
        scales, zeros = self._spread(self.scales.float()), self._spread(self.zeros)
        unscaled = scales == 0
        codes = (dense / scales.masked_fill(unscaled, 1)).round().to(torch.int16) + zeros
        codes = codes.to(torch.uint8)
        codes[unscaled] = self.unscaled
        return codes

    def _spread(self, values: torch.Tensor) -> torch.Tensor:
        """[out, groups] to [out, in]."""
        return values.repeat_interleave(self.spec.group_size, 1)


def _compute(spec: LayerSpec) -> str:
    return "auto" if spec.device == "cpu" else "int8"


def _nothing(like: torch.Tensor) -> torch.Tensor:
    return torch.empty(0, dtype=torch.int8, device=like.device)


def _package() -> ModuleType:
    found = package()
    assert not isinstance(found, str), found
    return found


def multiply(
    blob: torch.Tensor, x: torch.Tensor, out: int, width: int, group_size: int, compute: str, kind: str, scale: str,
    asym: bool,
) -> torch.Tensor:  # fmt: skip
    """x [..., width] times the weight in `blob`: [..., out] in the dtype of `x`."""
    flat = x.reshape(-1, width).to(torch.float32 if x.device.type == "cpu" else torch.float16).contiguous()
    none = torch.empty(0, dtype=flat.dtype, device=flat.device)
    if not flat.shape[0]:
        return x.new_empty((*x.shape[:-1], out))
    y = _package().woqgemm(flat, blob, none, out, width, group_size, compute, kind, scale, asym)
    return y.to(x.dtype).view(*x.shape[:-1], out)


@torch.library.custom_op(
    "auto_round::ark_linear",
    mutates_args=(),
    schema="(Tensor blob, Tensor x, int out, int width, int group_size, str compute, str kind, str scale, bool asym) "
    "-> Tensor",
)
def _ark_linear(
    blob: torch.Tensor, x: torch.Tensor, out: int, width: int, group_size: int, compute: str, kind: str, scale: str,
    asym: bool,
) -> torch.Tensor:  # fmt: skip
    y = multiply(blob, x, out, width, group_size, compute, kind, scale, asym)
    return y.clone() if y.data_ptr() == x.data_ptr() else y


@_ark_linear.register_fake
def _(
    blob: torch.Tensor, x: torch.Tensor, out: int, width: int, group_size: int, compute: str, kind: str, scale: str,
    asym: bool,
) -> torch.Tensor:  # fmt: skip
    return x.new_empty((*x.shape[:-1], out))
