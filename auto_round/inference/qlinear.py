"""QuantLinear: a linear layer with packed integer weights in GPTQ or AWQ layout.

Without a kernel it dequantizes the weight for each call, in plain PyTorch on any device; with one, the kernel
stores the codes in its own layout and computes the product.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from math import lcm
from typing import Any

import torch

from auto_round.codecs.quantized_layer import group_count
from auto_round.errors import ModelError, UnsupportedError
from auto_round.inference.config import LayerFormat
from auto_round.inference.kernels import IntegerWeight, LayerSpec, LinearKernel, kernel_class
from auto_round.inference.linear import TORCH_BACKEND, PackedLinear
from auto_round.layouts.awq import pack_awq, unpack_awq, unpack_awq_rows
from auto_round.layouts.bit_stream import packs_evenly, period, unpack_words, words_needed
from auto_round.layouts.gptq import pack_gptq, unpack_gptq, unpack_gptq_zeros
from auto_round.logger import warn_once

# Weights dequantized at once: bounds the temporary copies, about 9 bytes per weight.
_CHUNK = 1 << 22


class QuantLinear(PackedLinear):
    """y = x W^T + bias with W [out, in] packed in GPTQ or AWQ layout.

    Buffers: `qweight` and `qzeros` int32, `scales` [groups, out] in the file's dtype, and `g_idx` int32 [in] where the
    file has one.

    With a kernel (`use_kernel`) the codes are stored in the kernel's layout only, and `qweight` is None; the state dict
    always has the checkpoint's layout.

    Raises UnsupportedError when the shape does not fill whole words.
    """

    words: str = "qweight"
    uncast_buffers: tuple[str, ...] = ("scales",)
    qweight: torch.Tensor | None
    qzeros: torch.Tensor
    scales: torch.Tensor
    g_idx: torch.Tensor | None

    def __init__(
        self, in_features: int, out_features: int, fmt: LayerFormat, *, bias: bool = False, g_idx: bool = False,
        dtype: torch.dtype = torch.float32, scale_dtype: torch.dtype = torch.float16,
        device: torch.device | str | None = None,
    ) -> None:  # fmt: skip
        dtypes = {"qweight": torch.int32, "qzeros": torch.int32, "scales": scale_dtype}
        shapes = expected_shapes(in_features, out_features, fmt)
        buffers = {leaf: (shapes[leaf], kind) for leaf, kind in dtypes.items()}
        super().__init__(in_features, out_features, fmt, bias=bias, dtype=dtype, device=device, buffers=buffers)
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

    def spec(self) -> LayerSpec:
        """The properties of the layer that decide whether a kernel can run it."""
        return self.format.spec(self.in_features, self.out_features, self.dtype, self.scales.device.type)

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
        codes, scales, zeros = self.unpack()
        order = None
        if self.g_idx is not None and not self._in_order:
            order = torch.argsort(self.g_idx, stable=True)
            codes = codes[:, order].contiguous()
        self._kernel = [kind(IntegerWeight(codes, scales, zeros, self.spec())).train(self.training)]
        self._order, self.qweight = order, None

    @torch.no_grad()
    def drop_kernel(self) -> None:
        """Return to the checkpoint's layout and plain PyTorch."""
        if self._kernel:
            self.qweight, self._kernel, self._order = self._packed_codes(), [], None

    def unpack(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return self._codes(), self.scales.T.contiguous(), self._zero_rows().T.contiguous()

    def _codes(self) -> torch.Tensor:
        """uint8 [out, in], in the layer's column order."""
        if self._kernel:
            codes = self._kernel[0].codes()
            if self._order is None:
                return codes
            target = torch.empty_like(codes)
            target[:, self._order] = codes
            return target
        assert self.qweight is not None
        if self.format.layout == "awq":
            return unpack_awq(self.qweight, self.qzeros)[0]
        return unpack_gptq(self.qweight, self.qzeros, self.bits, self.format.zero_offset)[0]

    def _packed_codes(self) -> torch.Tensor:
        """`qweight` as the checkpoint has it."""
        if self.qweight is not None:
            return self.qweight
        codes, zeros = self._codes(), self._zero_rows().T.contiguous()
        if self.format.layout == "awq":
            return pack_awq(codes, zeros)[0]
        return pack_gptq(codes, zeros, self.bits, self.format.zero_offset)[0]

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

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return self._dense(dtype).T

    @torch.no_grad()
    def _dense(self, dtype: torch.dtype) -> torch.Tensor:
        dense = torch.empty(self.in_features, self.out_features, dtype=dtype, device=self.scales.device)
        codes = self._codes() if self._kernel else None
        zeros, scales = self._zero_rows().float(), self.scales.float()
        for start, stop in self._row_chunks():
            target = dense[start:stop]
            values = target if dtype == torch.float32 else torch.empty_like(target, dtype=torch.float32)
            values.copy_(self._code_rows(start, stop) if codes is None else codes[:, start:stop].T)
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
        return dense

    def _row_chunks(self) -> Iterator[tuple[int, int]]:
        """Ranges of input rows that start at a word and, if possible, at a group."""
        word = 1 if self.format.layout == "awq" else period(self.bits)[0]
        unit = lcm(word, self.group_size)
        if unit >= self.in_features or unit * self.out_features > 4 * _CHUNK:
            unit = word
        step = max(_CHUNK // (unit * self.out_features), 1) * unit
        return ((start, min(start + step, self.in_features)) for start in range(0, self.in_features, step))

    def _code_rows(self, start: int, stop: int) -> torch.Tensor:
        """uint8 [stop - start, out]."""
        assert self.qweight is not None
        if self.format.layout == "awq":
            return unpack_awq_rows(self.qweight[start:stop])
        values, words = period(self.bits)
        return unpack_words(self.qweight[start // values * words : stop // values * words], self.bits)

    def _zero_rows(self) -> torch.Tensor:
        """uint8 [groups, out]."""
        if self.format.layout == "awq":
            return unpack_awq_rows(self.qzeros)
        return unpack_gptq_zeros(self.qzeros, self.bits, self.format.zero_offset).T


def shape_problem(in_features: int, out_features: int, fmt: LayerFormat) -> str | None:
    """None when a layer of this shape can be stored in `fmt`, or the reason why not."""
    unit = period(fmt.bits)[0]
    if fmt.layout == "awq":
        if fmt.bits != 4:
            return f"the AWQ layout has no {fmt.bits}-bit form"
        return None if out_features % unit == 0 else f"out_features={out_features} is not a multiple of {unit}"
    for what, size in (("in_features", in_features), ("out_features", out_features)):
        if not packs_evenly(size, fmt.bits):
            return f"{what}={size} is not a multiple of {unit}"
    return None


def expected_shapes(in_features: int, out_features: int, fmt: LayerFormat) -> dict[str, tuple[int, ...]]:
    """Shapes of `qweight`, `qzeros` and `scales`. Raises UnsupportedError when the layer does not fill whole words."""
    reason = shape_problem(in_features, out_features, fmt)
    if reason is not None:
        raise UnsupportedError(f"a layer of {out_features} x {in_features} cannot be packed: {reason}")
    groups = group_count(in_features, fmt.group_size)
    out_words = words_needed(out_features, fmt.bits)
    weight = (in_features, out_words) if fmt.layout == "awq" else (words_needed(in_features, fmt.bits), out_features)
    return {"qweight": weight, "qzeros": (groups, out_words), "scales": (groups, out_features)}
