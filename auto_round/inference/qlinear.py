"""QuantLinear: a linear layer with packed integer weights in GPTQ or AWQ layout, which kernels may run.

Without a kernel it dequantizes the weight for each call, in plain PyTorch on any device; with one, the kernel stores
the codes in its own layout and computes the product.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from math import lcm
from typing import Any

import torch

from auto_round.codecs.kinds import codec_of
from auto_round.codecs.quantized_layer import IntCodes, QuantizedLayer
from auto_round.errors import ModelError, UnsupportedError
from auto_round.inference.config import LayerFormat
from auto_round.inference.kernels import IntegerWeight, LinearKernel, kernel_class
from auto_round.inference.linear import TORCH_BACKEND, PackedLinear
from auto_round.layouts.gptq import GptqLayout
from auto_round.logger import warn_once

# Weights dequantized at once: bounds the temporary copies, about 9 bytes per weight.
_CHUNK = 1 << 22


class QuantLinear(PackedLinear):
    """y = x W^T + bias with W [out, in] packed in GPTQ or AWQ layout.

    Buffers: `qweight` and `qzeros` int32, `scales` [groups, out] in the file's dtype, and `g_idx` int32 [in] where the
    file has one.

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
        self._order: torch.Tensor | None = None

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
        own, order = self.layer().codes_as(IntCodes), None
        codes, zeros = own.codes, own.zero_point
        assert isinstance(zeros, torch.Tensor)
        if self.g_idx is not None and not self._in_order:
            order = torch.argsort(self.g_idx, stable=True)
            codes = codes[:, order].contiguous()
        spec = self.format.spec(self.in_features, self.out_features, self.dtype, self.scales.device.type)
        self._kernel = [kind(IntegerWeight(codes, own.scale, zeros, spec)).train(self.training)]
        self._order, self.qweight = order, None

    @torch.no_grad()
    def drop_kernel(self) -> None:
        """Return to the checkpoint's layout and plain PyTorch."""
        if self._kernel:
            self.qweight, self._kernel, self._order = self._packed_codes(), [], None

    def layer(self, name: str = "") -> QuantizedLayer:
        if not self._kernel:
            return super().layer(name)
        codes = self._kernel[0].codes()
        if self._order is not None:
            codes = torch.empty_like(codes).index_copy_(1, self._order, codes)
        zeros = self.layout.zero_rows(self.qzeros, self.bits).T.contiguous()
        scheme, scales = self.format.scheme, self.scales.T.contiguous()
        return QuantizedLayer(name, scheme, codec_of(scheme).codes(codes, scales, zeros))

    def _packed_codes(self) -> torch.Tensor:
        """`qweight` as the checkpoint has it."""
        return self.layout.pack(self.layer())["qweight"] if self.qweight is None else self.qweight

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
            destination[f"{prefix}qweight"] = self._packed_codes()

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        self.drop_kernel()
        super()._load_from_state_dict(state_dict, prefix, *rest)

    @property
    def weight(self) -> torch.Tensor:
        """W [out, in] in the model's dtype, dequantized at each access.

        Some models read it: GPT-2 when it initialises missing tensors, others for its dtype.
        """
        return self.dequantize(self.dtype)

    @torch.no_grad()
    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """W [out, in], a view of a tensor [in, out], which is the order of the codes in the words."""
        dense = torch.empty(self.in_features, self.out_features, dtype=dtype, device=self.scales.device)
        codes = None if self.qweight is not None else self.layer().codes_as(IntCodes).codes
        zeros, scales = self.layout.zero_rows(self.qzeros, self.bits).float(), self.scales.float()
        columns, words = self.layout.row_period(self.bits)
        for start, stop in self._row_chunks(columns):
            target = dense[start:stop]
            values = target if dtype == torch.float32 else torch.empty_like(target, dtype=torch.float32)
            if codes is None:
                assert self.qweight is not None
                some_words = self.qweight[start // columns * words : stop // columns * words]
                values.copy_(self.layout.code_rows(some_words, self.bits))
            else:
                values.copy_(codes[:, start:stop].T)
            if self.groups == 1:
                values.sub_(zeros[0]).mul_(scales[0])
            elif self._in_order and start % self.group_size == 0 and (stop - start) % self.group_size == 0:
                first = start // self.group_size
                some = slice(first, first + (stop - start) // self.group_size)
                grouped = values.view(-1, self.group_size, self.out_features)
                grouped.sub_(zeros[some].unsqueeze(1)).mul_(scales[some].unsqueeze(1))
            else:
                rows = torch.arange(start, stop, device=dense.device) // self.group_size
                rows = rows if self.g_idx is None else self.g_idx[start:stop].long()
                values.sub_(zeros[rows]).mul_(scales[rows])
            if values is not target:
                target.copy_(values)
        return dense.T

    def _row_chunks(self, columns: int) -> Iterator[tuple[int, int]]:
        """Ranges of input columns that start at a word and, if possible, at a group. `columns`: those of a word."""
        unit = lcm(columns, self.group_size)
        if unit >= self.in_features or unit * self.out_features > 4 * _CHUNK:
            unit = columns
        step = max(_CHUNK // (unit * self.out_features), 1) * unit
        return ((start, min(start + step, self.in_features)) for start in range(0, self.in_features, step))
