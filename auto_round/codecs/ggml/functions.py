"""Data types `int_asym_dq`, `int_sym_dq`, `int_asym_float_zp`: differentiable fake quantization to ggml types."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from auto_round.codecs.ggml.search import search_blocks
from auto_round.codecs.ggml.types import GGML_TYPES, GgmlType, code_limits, divisor_of
from auto_round.codecs.registry import FP16_MAX, QuantFunc, clamp_to_float16, register_dtype, round_ste
from auto_round.errors import ConfigError
from auto_round.schemes import GroupSize

Factor = Tensor | float

_TYPES: dict[str, dict[int, str]] = {
    "int_sym_dq": {3: "Q3_K", 6: "Q6_K"},
    "int_asym_dq": {2: "Q2_K", 4: "Q4_K", 5: "Q5_K"},
    "int_asym_float_zp": {4: "Q4_1", 5: "Q5_1"},
}


def _scaled(d: Tensor, factor: Factor, integers: Tensor | None, kind: GgmlType) -> Tensor:
    """[out, groups, 1]: float16 d or dmin times a factor (the mean of those of groups), times the groups' integers."""
    per = kind.block // kind.group
    if isinstance(factor, Tensor) and factor.numel() > 1:
        rows = factor.float().reshape(d.shape[0], -1)
        rows = torch.nn.functional.pad(rows, (0, d.shape[1] * per - rows.shape[1]), value=1.0)
        factor = rows.view(*d.shape, -1).mean(-1)
    wanted = d.float() * factor
    half = wanted.clamp(-FP16_MAX, FP16_MAX).half().float()
    stored = wanted + (half - wanted).detach()
    if integers is not None:
        stored = stored.repeat_interleave(per, dim=1) * integers.float()
    return stored.unsqueeze(-1)


def _quant_function(name: str) -> QuantFunc:
    def quant_tensor_ggml(
        tensor: Tensor, bits: int = 4, group_size: GroupSize = 32, v: Factor = 0.0, min_scale: Factor = 1.0,
        max_scale: Factor = 1.0, imatrix: Tensor | None = None, **kwargs: Any,
    ) -> tuple[Tensor, Tensor, Tensor | float]:  # fmt: skip
        """Quantize and dequantize a tensor [..., in], cut into zero-padded blocks, as a ggml type, with the steps and
        minima of the importance-weighted search, times `max_scale` and `min_scale`; returns (values like `tensor`,
        steps float32 [out, groups], minima likewise, or the code of zero). Raises ConfigError for bits and a group size
        that no type has."""
        if bits not in _TYPES[name]:
            known = ", ".join(str(number) for number in _TYPES[name])
            raise ConfigError(f"data type {name!r} has no type of {bits} bits; give bits={known}")
        kind = GGML_TYPES[_TYPES[name][bits]]
        if group_size != kind.group:
            raise ConfigError(
                f"{kind.name} has groups of {kind.group} weights, not {group_size}; give group_size={kind.group}"
            )
        columns = int(tensor.shape[-1])
        flat = tensor.reshape(-1, columns)
        pad = lambda t: torch.nn.functional.pad(t, (0, -columns % kind.block))  # noqa: E731
        importance = torch.ones(columns, device=flat.device) if imatrix is None else imatrix.reshape(-1)
        blocks = search_blocks(pad(clamp_to_float16(flat.detach())), kind.name, pad(importance))
        groups = (flat.shape[0], -1, kind.group)
        weight = pad(flat.float()).view(groups)
        step = _scaled(blocks.d, max_scale, blocks.scales, kind)
        minimum: Factor = 0.0
        if blocks.dmin is not None:
            minimum = _scaled(blocks.dmin, min_scale, blocks.mins, kind) * kind.min_sign
        if isinstance(v, Tensor):
            v = pad(v.float().reshape(flat.shape)).view(groups)
        shifted = weight - minimum
        shifted = shifted + v if isinstance(v, Tensor) or v else shifted
        codes = round_ste(shifted / divisor_of(step)).clamp(*code_limits(kind))
        qdq = (codes * step + minimum).view(flat.shape[0], -1)[:, :columns].reshape(tensor.shape)
        zero = minimum.detach().squeeze(-1) if isinstance(minimum, Tensor) else float(kind.zero)
        return qdq.to(tensor.dtype), step.detach().squeeze(-1), zero

    quant_tensor_ggml.__qualname__ = f"quant_tensor_ggml[{name}]"
    return quant_tensor_ggml


for _name in _TYPES:
    register_dtype(_name)(_quant_function(_name))
