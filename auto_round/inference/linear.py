"""Linear layers that keep their weight as stored in the checkpoint: `PackedLinear` of any `Layout`, in plain PyTorch,
`ScaledMmLinear` of FP8, in hardware, and `QuantLinear` of GPTQ and AWQ, by kernels; and `PackedExperts`: all experts of
a mixture by one grouped kernel call per projection, instead of three calls per expert.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from auto_round.codecs.activation import ActivationQuantizer
from auto_round.codecs.kinds import codec_of
from auto_round.codecs.quantized_layer import IntCodes, QuantizedLayer
from auto_round.errors import ModelError, UnsupportedError
from auto_round.inference.config import LayerFormat
from auto_round.inference.kernels import IntegerWeight, JoinedKernels, LinearKernel, kernel_class
from auto_round.layouts.integers import GptqLayout, dequantize_chunked
from auto_round.logger import warn_once
from auto_round.modeling.experts import RoutedExperts

# Private operators of PyTorch that tell whether the CPU has matrix instructions for a dtype.
_CPU_CHECKS = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}
TORCH_BACKEND = "torch"  # name of the group of backends in plain PyTorch
# Dtypes in which a file may store scales and biases, whatever the layout's own.
_WIDE = (torch.float32, torch.bfloat16, torch.float16)


@functools.lru_cache(maxsize=2)
def cpu_multiplies(dtype: torch.dtype) -> bool:
    """Whether this CPU has matrix instructions for a half-precision dtype, whose products are slow without them."""
    check = getattr(torch.ops.mkldnn, _CPU_CHECKS.get(dtype, ""), None)
    return bool(check()) if check is not None else False


def compute_dtype_for(device: torch.device | str, dtype: torch.dtype) -> torch.dtype:
    """`dtype`, or float32 (which holds all its values) for a half precision that the CPU has no instructions for."""
    exact = torch.device(device).type != "cpu" or dtype not in _CPU_CHECKS or cpu_multiplies(dtype)
    return dtype if exact else torch.float32


class PackedLinear(nn.Module):
    """y = q(x) W^T + bias, with W [out, in] packed in buffers that are named and shaped as in the checkpoint (`leaves`,
    the codes first), and q the quantization of inputs, if any. `backend` is the name of the table's row that runs it.
    All buffers but `bias` keep the file's dtype when the module is cast, which would damage every weight."""

    bias: torch.Tensor | None
    backend: str = TORCH_BACKEND

    def __init__(
        self, in_features: int, out_features: int, fmt: LayerFormat, *, bias: bool = False,
        dtype: torch.dtype = torch.float32, stored: Mapping[str, torch.dtype] | None = None,
        device: torch.device | str | None = None,
    ) -> None:  # fmt: skip
        """An empty layer. Raises UnsupportedError when the layout cannot hold a layer of this shape. `dtype` is the
        model's, `stored` are those of the file's tensors: scales may have another than the layout's."""
        super().__init__()
        problem = fmt.layout.mismatch(fmt.scheme, in_features, out_features)
        if problem is not None:
            raise UnsupportedError(f"a layer of {out_features} x {in_features} cannot be packed: {problem}")
        self.in_features, self.out_features, self.format, self.dtype = in_features, out_features, fmt, dtype
        specs = fmt.layout.specs(fmt.scheme, in_features, out_features, dtype)
        self.leaves = tuple(specs)
        for leaf, (shape, usual) in specs.items():
            kind = (stored or {}).get(leaf, usual)
            # Codes and scales of one byte are defined by their dtype.
            replaceable = leaf != self.leaves[0] and usual.is_floating_point and usual.itemsize > 1 and kind in _WIDE
            self.register_buffer(leaf, torch.zeros(shape, dtype=kind if replaceable else usual, device=device))
        self.register_buffer("bias", torch.zeros(out_features, dtype=dtype, device=device) if bias else None)

    @property
    def is_loaded(self) -> bool:
        """Whether the codes are in memory; offloaded layers are on meta until they run."""
        return not self.get_buffer(self.leaves[0]).is_meta

    @property
    def activation(self) -> ActivationQuantizer | None:
        """The quantizer of the inputs; None when they are not quantized."""
        scheme = self.format.scheme.activations
        if scheme is None:
            return None
        scalars = [self._buffers.get(f"input_{leaf}") for leaf in ("scale", "global_scale", "zero_point")]
        scale, above, zero = (None if scalar is None else scalar.float().reshape(()) for scalar in scalars)
        return ActivationQuantizer(scheme, scale, None if zero is None else int(zero), above)

    @torch.no_grad()
    def prepare(self, name: str = "") -> None:
        """Check the filled buffers. Raises ModelError, with the layer's `name`, when a scale is not finite."""
        for leaf in self.leaves[1:]:
            if not self.format.layout.is_finite(self.get_buffer(leaf)):
                raise ModelError(f"{name or 'layer'}: {leaf} holds NaN or Inf; fetch the files again")

    def layer(self, name: str = "") -> QuantizedLayer:
        """The quantized layer that the buffers hold, without the bias."""
        fmt, tensors = self.format, {leaf: self.get_buffer(leaf) for leaf in self.leaves}
        return fmt.layout.unpack(name, fmt.scheme, tensors, self.in_features, self.out_features)

    @torch.no_grad()
    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """W [out, in], computed in float32 and rounded once to `dtype`."""
        fmt, tensors = self.format, {leaf: self.get_buffer(leaf) for leaf in self.leaves}
        return fmt.layout.dequantize(fmt.scheme, tensors, self.in_features, self.out_features, dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # Bit for bit the product of `nn.Linear`: rounding the next layer's inputs to codes magnifies any difference.
        step = self.activation
        x = x if step is None else step(x)
        compute = compute_dtype_for(x.device, x.dtype)
        bias = None if self.bias is None else self.bias.to(compute)
        return nn.functional.linear(x.to(compute), self.dequantize(compute), bias).to(x.dtype)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> PackedLinear:
        before = {leaf: tensor for leaf in self.leaves if (tensor := self._buffers[leaf]) is not None}
        self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype
        super()._apply(fn, recurse)
        for leaf, tensor in before.items():
            after = self.get_buffer(leaf)
            if after.dtype != tensor.dtype:
                setattr(self, leaf, tensor.to(after.device))
        return self

    def extra_repr(self) -> str:
        scheme = self.format.scheme
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"bits={scheme.bits}, group_size={scheme.group_size}, sym={scheme.sym}, packing={self.format.packing}"
        )


class ScaledMmLinear(PackedLinear):
    """FP8 weights with scales per channel or tensor and static inputs, by `torch._scaled_mm` where the hardware can."""

    weight: torch.Tensor
    weight_scale: torch.Tensor
    input_scale: torch.Tensor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # The hardware works on tiles of 16.
        fits = x.device.type == "cuda" and self.in_features % 16 == 0 and self.out_features % 16 == 0 and x.numel() > 0
        return self.multiply(x) if fits else super().forward(x)

    @torch.no_grad()
    def multiply(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., in] -> [..., out] in the dtype of `x`. Scales are applied to the float32 sums."""
        top = torch.finfo(self.weight.dtype).max
        scale = self.input_scale.float().reshape(())
        codes = (x.reshape(-1, self.in_features).float() / scale).clamp_(-top, top).to(self.weight.dtype)
        one = torch.ones((), dtype=torch.float32, device=x.device)
        sums = torch._scaled_mm(codes, self.weight.t(), scale_a=scale, scale_b=one, out_dtype=torch.float32)
        sums.mul_(self.weight_scale.float().reshape(1, -1))
        if self.bias is not None:
            sums.add_(self.bias.float())
        return sums.to(x.dtype).view(*x.shape[:-1], self.out_features)


class QuantLinear(PackedLinear):
    """y = x W^T + bias with W [out, in] packed in GPTQ or AWQ layout, and `g_idx` int32 [in] where the file has one.
    With a kernel the codes are in its layout only, and `qweight` is None; the state dict always has the checkpoint's
    layout."""

    qweight: torch.Tensor | None
    qzeros: torch.Tensor
    scales: torch.Tensor
    g_idx: torch.Tensor | None

    def __init__(
        self, in_features: int, out_features: int, fmt: LayerFormat, *, g_idx: bool = False, **options: Any
    ) -> None:
        super().__init__(in_features, out_features, fmt, **options)
        assert isinstance(fmt.layout, GptqLayout)
        self.layout: GptqLayout = fmt.layout
        self.group_size = fmt.columns_per_scale(in_features)
        self.groups = -(-in_features // self.group_size)
        self.register_buffer("g_idx", self.default_g_idx(options.get("device")) if g_idx else None)
        self._in_order = not g_idx
        # "module:Class" of the kernel that the loader chose for this layer, and the kind of device that it runs on.
        self.kernel_path, self.kernel_device = "", ""
        self._loaded = False
        # In a list, not a submodule: its buffers are not in the checkpoint, and a move to another device rebuilds it.
        self._kernel: list[LinearKernel] = []
        self._order: torch.Tensor | None = None  # of the input columns in the kernel, where not the layer's own

    def default_g_idx(self, device: torch.device | str | None = None) -> torch.Tensor:
        """int32 [in]: the group of each input column when groups are contiguous."""
        return torch.arange(self.in_features, dtype=torch.int32, device=device) // self.group_size

    @torch.no_grad()
    def prepare(self, name: str = "") -> None:
        """Check whether groups are contiguous. Raises ModelError when `g_idx` points outside the groups."""
        if self.g_idx is None:
            return
        self._in_order = torch.equal(self.g_idx, self.default_g_idx(self.g_idx.device))
        if not self._in_order and not bool(((self.g_idx >= 0) & (self.g_idx < self.groups)).all()):
            raise ModelError(f"{name or 'layer'}: g_idx points outside the {self.groups} groups; fetch the files again")

    @property
    def kernel(self) -> LinearKernel | None:
        return self._kernel[0] if self._kernel else None

    @property
    def is_loaded(self) -> bool:
        return self.qweight is None or not self.qweight.is_meta

    def start_kernel(self, name: str = "") -> None:
        """Build the chosen kernel if the loaded layer is on its device, from now on also when it moves back there."""
        self._loaded = True
        if not self.kernel_path or self._kernel or self.scales.device.type != self.kernel_device:
            return
        try:
            self.use_kernel(kernel_class(self.kernel_path))
        except UnsupportedError as error:
            reason = f"with {self.backend}: {error}"
            warn_once("layers such as %s run in plain PyTorch, not %s", name or "one", reason, key=reason)
            self.kernel_path, self.backend = "", TORCH_BACKEND

    @torch.no_grad()
    def use_kernel(self, kind: type[LinearKernel]) -> None:
        """Move the codes to a kernel, after `prepare`. With `g_idx`, columns and later the inputs are sorted by group.
        Raises UnsupportedError, and changes nothing, when the kernel cannot run a layer with these values."""
        (codes, scales, zeros), order = self._arrays(), None
        if self.g_idx is not None and not self._in_order:
            order = torch.argsort(self.g_idx, stable=True)
            codes = codes[:, order].contiguous()
        spec = self.format.spec(self.in_features, self.out_features, self.dtype, self.scales.device.type)
        self._kernel = [kind(IntegerWeight(codes, scales, zeros, spec)).train(self.training)]
        self._order, self.qweight = order, None

    @torch.no_grad()
    def drop_kernel(self) -> None:
        if self._kernel:
            self.qweight, self._kernel, self._order = self._stored_words(), [], None

    def _arrays(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Codes uint8 [out, in], scales and zero points uint8 [out, groups]."""
        bits, scales = self.format.scheme.bits, self.scales.T.contiguous()
        zeros = self.layout.zeros(self.qzeros, bits)
        if self.qweight is not None:
            return self.layout.codes(self.qweight, bits), scales, zeros
        codes = self._kernel[0].codes()
        return (
            codes if self._order is None else torch.empty_like(codes).index_copy_(1, self._order, codes),
            scales,
            zeros,
        )

    def _stored_words(self) -> torch.Tensor:
        """`qweight` as the checkpoint has it, of a layer with a kernel."""
        codes, _, zeros = self._arrays()
        return self.layout.words(codes, zeros, self.format.scheme.bits)[0]

    def layer(self, name: str = "") -> QuantizedLayer:
        return QuantizedLayer(name, self.format.scheme, codec_of(self.format.scheme).codes(*self._arrays()))

    @torch.no_grad()
    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        codes, scales, zeros = self._arrays()
        if self.g_idx is None or self._in_order:
            return dequantize_chunked(IntCodes(codes, scales, zeros, self.group_size), dtype)
        owner = self.g_idx.long()
        return dequantize_chunked(IntCodes(codes, scales[:, owner], zeros[:, owner], 1), dtype)

    @property
    def weight(self) -> torch.Tensor:
        """W [out, in] in the model's dtype, dequantized at each access, for models that read it (GPT-2's set-up)."""
        return self.dequantize(self.dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # Kernels have no backward pass.
        if not self._kernel or (x.requires_grad and torch.is_grad_enabled()):
            return super().forward(x)
        # `forward` and `_buffers` directly: `__call__` and `__getattr__` cost as much as the product of a small layer.
        y = self._kernel[0].forward(x if self._order is None else x.index_select(-1, self._order))
        bias = self._buffers["bias"]
        return y if bias is None else y + bias.to(y.dtype)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> QuantLinear:
        source = self.scales.device
        target = fn(torch.empty(0, dtype=self.dtype, device=source)).device
        if target != source:
            if self.kernel_device and target.type not in (self.kernel_device, "meta"):
                warn_once(
                    "the model was loaded for %s and moved to %s, where its quantized layers run in plain PyTorch; "
                    "please avoid moving a quantized model: load it with device_map=%r",
                    self.kernel_device, target.type, target.type,
                    key=f"moved from {self.kernel_device} to {target.type}",
                )  # fmt: skip
            self.drop_kernel()
        super()._apply(fn, recurse)
        if target != source and self._loaded and self.is_loaded:
            self.start_kernel()
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self._kernel:
            destination[f"{prefix}qweight"] = self._stored_words()

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        self.drop_kernel()
        super()._load_from_state_dict(state_dict, prefix, *rest)


class PackedExperts:
    """Replaces the calls of single layers in `RoutedExperts` while the layers are unchanged (`is_valid`)."""

    def __init__(self, experts: RoutedExperts, projections: Mapping[str, list[QuantLinear]]) -> None:
        self.experts = experts
        self._products: dict[str, tuple[JoinedKernels, torch.Tensor | None]] = {}  # with biases, of each projection
        self._layers = []
        for usual, layers in projections.items():
            kernels = [layer._kernel[0] for layer in layers]
            biases = [layer.bias for layer in layers if layer.bias is not None]
            # The last row, of zeros, is for tokens without an expert.
            bias = torch.stack([*biases, torch.zeros_like(biases[0])]) if biases else None
            self._products[usual] = type(kernels[0]).join(kernels), bias
            for index, layer in enumerate(layers):
                owner, leaf = experts.get_submodule(str(index)), getattr(experts.leaves[index], usual)
                self._layers.append((owner._modules, leaf, layer, layer._kernel))

    def is_valid(self) -> bool:
        """Whether every layer is still in place, with the same kernel and without hooks."""
        return all(
            modules.get(leaf) is layer and layer.__dict__["_kernel"] is kernel
            and not layer._forward_hooks and not layer._forward_pre_hooks
            for modules, leaf, layer, kernel in self._layers
        )  # fmt: skip

    def __call__(self, x: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
        """x [rows, H] sorted by expert, chosen int64 [rows] -> [rows, H]; zeros where `chosen` is not an expert."""
        count = self.experts.num_experts
        chosen = chosen.clamp(max=count)
        offsets = torch.searchsorted(chosen, torch.arange(count + 2, device=chosen.device), out_int32=True)

        def project(usual: str, x: torch.Tensor) -> torch.Tensor:
            multiply, bias = self._products[usual]
            y = multiply(x, offsets)
            return y if bias is None else y + bias[chosen].to(y.dtype)

        up, gate = project("up", x), project("gate", x) if "gate" in self._products else None
        return project("down", self.experts.combine(gate, up))


def enable_grouped_experts(model: nn.Module) -> int:
    """Enable grouped calls in every `RoutedExperts` with equal kernels per projection; returns in how many."""
    found = 0
    for experts in model.modules():
        if isinstance(experts, RoutedExperts):
            projections = {}
            for usual in ("gate", "up", "down")[not experts.has_gate :]:
                named = enumerate(experts.leaves)
                layers = [getattr(experts.get_submodule(str(index)), getattr(leaves, usual)) for index, leaves in named]
                if all(isinstance(m, QuantLinear) and m.kernel is not None and m._order is None for m in layers):
                    if len({(type(m.kernel), m.kernel.spec, m.bias is None) for m in layers}) == 1:
                        projections[usual] = layers
            if len(projections) == 2 + experts.has_gate:
                experts.batched = PackedExperts(experts, projections)
                found += 1
    return found
