"""`QuantLinear`: a linear layer with packed integers in GPTQ or AWQ layout, which kernels may run, and `PackedExperts`:
all experts of a mixture by one grouped kernel call per projection, instead of three calls per expert.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from auto_round.codecs.kinds import codec_of
from auto_round.codecs.quantized_layer import IntCodes, QuantizedLayer
from auto_round.errors import ModelError, UnsupportedError
from auto_round.inference.config import LayerFormat
from auto_round.inference.kernels import IntegerWeight, LinearKernel, kernel_class
from auto_round.inference.linear import TORCH_BACKEND, PackedLinear
from auto_round.layouts.integers import GptqLayout, dequantize_chunked
from auto_round.logger import warn_once
from auto_round.modeling.experts import RoutedExperts


class QuantLinear(PackedLinear):
    """y = x W^T + bias with W [out, in] packed in GPTQ or AWQ layout, and `g_idx` int32 [in] where the file has one.

    With a kernel (`use_kernel`) the codes are stored in the kernel's layout only, and `qweight` is None; the state dict
    always has the checkpoint's layout.
    """

    qweight: torch.Tensor | None
    qzeros: torch.Tensor
    scales: torch.Tensor
    g_idx: torch.Tensor | None

    def __init__(
        self, in_features: int, out_features: int, fmt: LayerFormat, *, bias: bool = False, g_idx: bool = False,
        dtype: torch.dtype = torch.float32, stored: Mapping[str, torch.dtype] | None = None,
        device: torch.device | str | None = None,
    ) -> None:  # fmt: skip
        super().__init__(in_features, out_features, fmt, bias=bias, dtype=dtype, stored=stored, device=device)
        assert isinstance(fmt.layout, GptqLayout)
        self.layout: GptqLayout = fmt.layout
        self.group_size = fmt.columns_per_scale(in_features)
        self.groups = -(-in_features // self.group_size)
        self.register_buffer("g_idx", self.default_g_idx(device) if g_idx else None)
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
        """The kernel that runs the layer, None for plain PyTorch."""
        return self._kernel[0] if self._kernel else None

    @property
    def in_order(self) -> bool:
        """Whether the kernel takes input columns in the layer's order, without a permutation."""
        return self._order is None

    @property
    def is_loaded(self) -> bool:
        return self.qweight is None or not self.qweight.is_meta

    def start_kernel(self, name: str = "") -> None:
        """Build the kernel that was chosen for the loaded layer, if the layer is on the kernel's device. From now on it
        is rebuilt whenever the layer moves back to that device."""
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

        Raises UnsupportedError, and changes nothing, when the kernel cannot run a layer with these values.
        """
        (codes, scales, zeros), order = self._arrays(), None
        if self.g_idx is not None and not self._in_order:
            order = torch.argsort(self.g_idx, stable=True)
            codes = codes[:, order].contiguous()
        spec = self.format.spec(self.in_features, self.out_features, self.dtype, self.scales.device.type)
        self._kernel = [kind(IntegerWeight(codes, scales, zeros, spec)).train(self.training)]
        self._order, self.qweight = order, None

    @torch.no_grad()
    def drop_kernel(self) -> None:
        """Return to the checkpoint's layout and plain PyTorch."""
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


class Projection:
    """The gate, up or down layers of all experts, which have equal sizes and kernels of one class."""

    def __init__(self, layers: list[QuantLinear], kernels: list[LinearKernel]) -> None:
        self.layers, self.multiply = layers, type(kernels[0]).join(kernels)
        biases = [layer.bias for layer in layers if layer.bias is not None]
        # The last row, of zeros, is for tokens without an expert.
        self.bias = torch.stack([*biases, torch.zeros_like(biases[0])]) if biases else None

    @classmethod
    def of(cls, experts: RoutedExperts, usual: str) -> Projection | None:
        """The projection `usual` of experts, or None when they cannot run together."""
        named = enumerate(experts.leaves)
        modules = [getattr(experts.get_submodule(str(index)), getattr(leaves, usual)) for index, leaves in named]
        layers = [m for m in modules if isinstance(m, QuantLinear) and m.in_order]
        kernels = [kernel for layer in layers if (kernel := layer.kernel) is not None]
        alike = {(type(kernel), kernel.spec) for kernel in kernels}
        if len(kernels) < len(modules) or len(alike) != 1 or len({layer.bias is None for layer in layers}) != 1:
            return None
        return cls(layers, kernels)

    def __call__(self, x: torch.Tensor, chosen: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
        """x [rows, in] sorted by expert -> [rows, out]; `offsets` as in `JoinedKernels`."""
        y = self.multiply(x, offsets)
        return y if self.bias is None else y + self.bias[chosen].to(y.dtype)


class PackedExperts:
    """Replaces the calls of single layers in `RoutedExperts` while the layers are unchanged (`is_valid`)."""

    def __init__(self, experts: RoutedExperts, projections: dict[str, Projection]) -> None:
        self.experts, self.projections = experts, projections
        self._layers = [
            (experts.get_submodule(str(index))._modules, getattr(experts.leaves[index], usual), layer, layer._kernel)
            for usual, projection in projections.items()
            for index, layer in enumerate(projection.layers)
        ]

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
        up = self.projections["up"](x, chosen, offsets)
        gate = self.projections["gate"](x, chosen, offsets) if "gate" in self.projections else None
        return self.projections["down"](self.experts.combine(gate, up), chosen, offsets)


def enable_grouped_experts(model: nn.Module) -> int:
    """Enable grouped calls in every `RoutedExperts` of `model` whose layers support it; returns how many do.

    All experts of a projection must have kernels of one class and equal sizes, without a column permutation.
    """
    found = 0
    for experts in model.modules():
        if isinstance(experts, RoutedExperts):
            named = ("gate", "up", "down")[not experts.has_gate :]
            projections = {usual: part for usual in named if (part := Projection.of(experts, usual)) is not None}
            if len(projections) == len(named):
                experts.batched = PackedExperts(experts, projections)
                found += 1
    return found
