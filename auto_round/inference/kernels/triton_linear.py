"""Packed integer weights on a GPU, through Triton programs.

**Layout.** A word (int32) contains 32 / bits codes of one output; the words of a row are contiguous over the outputs,
as in GPTQ's `qweight`: a warp reads whole lines, 16 bytes per lane, and products are summed within a lane. Unlike in
GPTQ, the codes of a word are `width` inputs apart (16 or 32): the codes at position j of `width` consecutive words are
`width` consecutive inputs. So inputs are read in runs, all codes at one position share a scale (groups are multiples of
16), and a whole tile of codes is converted to floats without moving data between lanes. 3-bit codes use 4-bit fields.

**Programs.** One or two rows: vector products, bound by reading the weights (`triton_programs.matvec`). Up to 511 rows:
tiles that dequantize in registers and multiply in the matrix units. More rows: the weight is dequantized to memory once
in the inputs' dtype and multiplied by the vendor's library, which is faster than dequantizing it for every tile of
rows. With few columns, programs split the inputs, and a second pass adds their sums in a fixed order.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from auto_round.inference.kernels import IntegerWeight, JoinedKernels, LayerSpec, LinearKernel
from auto_round.inference.kernels.triton_launch import Form, Packed, interpreting, triton_experts, triton_linear

_FIELD = {2: 2, 3: 4, 4: 4, 8: 8}
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class TritonLinear(LinearKernel):
    """y = x W^T on cuda and xpu; on a CPU only in Triton's interpreter (TRITON_INTERPRET=1), for tests.

    Buffers: `words` int32 [rows of words, padded out], `scales` [groups, padded out] in the file's dtype, and `zeros`
    uint8 of the same shape, None when all zero points are equal.
    """

    words: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor | None

    def __init__(self, weight: IntegerWeight) -> None:
        super().__init__(weight)
        self.form = form_of(weight)
        self.register_buffer("words", pack_words(weight.codes, self.form), persistent=False)
        self.register_buffer("scales", _pad_rows(weight.scales, self.form), persistent=False)
        zeros = _pad_rows(weight.zeros, self.form) if self.form.zero < 0 else None
        self.register_buffer("zeros", zeros, persistent=False)

    @classmethod
    def unsupported_reason(cls, spec: LayerSpec) -> str | None:
        if spec.group_size != spec.in_features and spec.group_size % 16:
            return f"needs groups of a multiple of 16 or whole rows, not {spec.group_size}"
        if spec.in_features % 2:
            return f"needs an even number of inputs, not {spec.in_features}"
        if spec.device == "cpu":
            return None if interpreting() else "runs on cuda and xpu (on a CPU only with TRITON_INTERPRET=1, for tests)"
        if not getattr(torch, spec.device).is_available():
            return f"no {spec.device} device was found"
        if spec.device == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability() < (8, 0):
            return "needs a GPU of compute capability 8.0 or later"
        return None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows, dtype = _as_rows(x)
        y = triton_linear(rows, self.words, self.scales, self.zeros, *self.form)
        return y.view(*x.shape[:-1], self.spec.out_features).to(dtype)

    def codes(self) -> torch.Tensor:
        return unpack_words(self.words, self.form)

    @classmethod
    def join(cls, kernels: Sequence[LinearKernel]) -> JoinedKernels | None:
        own = [kernel for kernel in kernels if isinstance(kernel, TritonLinear)]
        return TritonExperts(own) if own and len({kernel.form for kernel in own}) == 1 else None


class TritonExperts:
    """All experts of a mixture in one launch. The kernels' tensors become views of the joined ones, without a copy."""

    def __init__(self, kernels: Sequence[TritonLinear]) -> None:
        self.form = kernels[0].form
        self.packed = Packed(
            _stack_buffers(kernels, "words"),
            _stack_buffers(kernels, "scales"),
            _stack_buffers(kernels, "zeros") if self.form.zero < 0 else None,
        )

    def __call__(self, x: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
        """x [rows, in] sorted by expert; offsets int32 [experts + 2], on the device: see `triton_experts`."""
        rows, dtype = _as_rows(x)
        return triton_experts(rows, *self.packed, offsets, *self.form).to(dtype)


def _stack_buffers(kernels: Sequence[TritonLinear], name: str) -> torch.Tensor:
    first = kernels[0].get_buffer(name)
    whole = first.new_empty(len(kernels), *first.shape)
    for one, kernel in zip(whole, kernels, strict=True):
        one.copy_(kernel.get_buffer(name))
        setattr(kernel, name, one)
    return whole


def _as_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.dtype]:
    """`x` as [rows, in] in a supported dtype with an even row stride, and its original dtype."""
    rows = x.reshape(-1, x.shape[-1])
    if rows.dtype not in _DTYPES:
        rows = rows.float()
    if rows.stride(1) != 1 or rows.stride(0) % 2:
        rows = rows.contiguous()
    return rows, x.dtype


def form_of(weight: IntegerWeight) -> Form:
    """The packing of a weight: blocks of 32 rows of words if the groups allow it without much padding, else of 16."""
    spec = weight.spec
    bits = _FIELD[spec.bits]
    group = 0 if spec.group_size >= spec.in_features else spec.group_size
    block = 32 // bits * 32
    waste = -spec.in_features % block
    width = 32 if group % 32 == 0 and waste * 20 <= spec.in_features else 16
    first = int(weight.zeros.flatten()[0])
    equal = bool((weight.zeros == first).all())
    return Form(bits, width, group, first if equal else -1, spec.in_features, spec.out_features)


def _padded(out_features: int) -> int:
    return -(-out_features // 32) * 32


def pack_words(codes: torch.Tensor, form: Form) -> torch.Tensor:
    """uint8 [out, in] to int32 [blocks * width, padded out]. Word r of a block has at position j the code of the
    block's input j * width + r; padding is zero."""
    whole = codes.new_zeros(form.blocks * form.block, _padded(form.out_features))
    whole[: form.in_features, : form.out_features] = codes.T
    fields = whole.view(form.blocks, form.per, form.width, -1)
    words = torch.zeros(form.blocks, form.width, whole.shape[1], dtype=torch.int32, device=codes.device)
    for field in range(form.per):
        words |= fields[:, field].to(torch.int32) << (field * form.bits)
    return words.view(-1, whole.shape[1])


def unpack_words(words: torch.Tensor, form: Form) -> torch.Tensor:
    """The inverse of `pack_words`."""
    blocks = words.view(form.blocks, form.width, -1)
    mask = (1 << form.bits) - 1
    fields = [((blocks >> (field * form.bits)) & mask).to(torch.uint8) for field in range(form.per)]
    whole = torch.stack(fields, dim=1).view(form.blocks * form.block, -1)
    return whole[: form.in_features, : form.out_features].T.contiguous()


def _pad_rows(values: torch.Tensor, form: Form) -> torch.Tensor:
    """[out, groups] to [groups of whole blocks, padded out], padded with zeros."""
    groups = -(-form.blocks * form.block // form.group) if form.group else 1
    whole = values.new_zeros(groups, _padded(form.out_features))
    whole[: values.shape[1], : form.out_features] = values.T
    return whole
