"""Small float types as element and scale rule: exact codes, and fake quantization with straight-through gradients.

A weight w in a tile of stored scale s becomes `f * nearest(w / f)`, where f = s, or s / global_scale for NVFP4, all in
float32. Codes and fake-quantized values come from the same expressions, so they are equal bit for bit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from auto_round.data_type.elements import Element
from auto_round.data_type.float_scales import BlockScale, ScaleRule, global_scale_of
from auto_round.data_type.register import QuantFunc, register_dtype
from auto_round.data_type.tiles import as_tiles, from_tiles, tile_extremes, tile_largest, tile_rows, whole_largest
from auto_round.errors import UnsupportedError
from auto_round.schemes import GroupSize

_CHUNK = 1 << 18  # values in flight: a few float32 buffers of them stay in the cache
_GPU_CHUNK = 1 << 26


class Encoded(NamedTuple):
    """Codes uint8 [out, in]; scale float32 [out, groups], [1, 1] per tensor or [out/M, in/N] for blocks; global scale,
    a float32 scalar or None. `dequantize_elements` makes the values of them."""

    codes: torch.Tensor
    scale: torch.Tensor
    global_scale: torch.Tensor | None


@dataclass(frozen=True)
class FloatFamily:
    """One small float type: what its elements are and how they share scales."""

    rule: ScaleRule

    @property
    def element(self) -> Element:
        return self.rule.element

    @property
    def has_global_scale(self) -> bool:
        return isinstance(self.rule, BlockScale)

    def global_scale(self, tensor: torch.Tensor, given: torch.Tensor | None) -> torch.Tensor | None:
        """The one given, or computed from the tensor; None for types without."""
        if not self.has_global_scale:
            return None
        if given is not None:
            return given.detach().float().reshape(()).to(tensor.device)
        return global_scale_of(whole_largest(tensor))


def factor_of(scale: torch.Tensor, global_scale: torch.Tensor | None) -> torch.Tensor:
    """What the elements' values are multiplied with."""
    return scale if global_scale is None else scale / global_scale


def encode(
    tensor: torch.Tensor, family: FloatFamily, group_size: GroupSize, *, scale: torch.Tensor | None = None,
    v: torch.Tensor | None = None, global_scale: torch.Tensor | None = None,
) -> Encoded:  # fmt: skip
    """The exact codes of a weight.

    Args:
        tensor: [out, in], any float dtype; computed in float32, a few rows at a time.
        group_size: see `QuantizationScheme`; a last group or block that is not full is as if filled with zeros.
        scale: stored scales to use, shaped as they are returned; None takes the rule's.
        v: offsets [R, M, C, N] (see `data_type.tiles`) in units of the element's step at each weight.
        global_scale: for types that have one; None computes it from the tensor.
    """
    with torch.no_grad():
        out, columns = int(tensor.shape[0]), int(tensor.shape[1])
        tiles = as_tiles(tensor, group_size)
        r, m, c, n = tiles.shape
        given = family.global_scale(tensor, global_scale)
        stored = torch.empty(r, 1, c, 1, device=tensor.device) if scale is None else scale.float().view(r, 1, c, 1)
        codes = torch.empty(r, m, c, n, dtype=torch.uint8, device=tensor.device)
        whole = r == c == 1 and m > 1  # one scale for rows that are taken a few at a time
        if scale is None and whole:
            stored.copy_(family.rule.scale(whole_largest(tiles).view(1, 1, 1, 1), given))
        for rows, inner in tile_rows(tiles, _CHUNK if tensor.device.type == "cpu" else _GPU_CHUNK):
            part = tiles[rows, inner].float()
            if scale is None and not whole:
                stored[rows] = family.rule.scale(tile_largest(part), given)
            ratio = part / factor_of(stored[rows], given)
            if v is not None:
                ratio = shifted(ratio, v[rows, inner], family.element)
            codes[rows, inner] = family.element.encode(ratio)
        return Encoded(from_tiles(codes, (out, columns)).contiguous(), stored.view(r, c), given)


def shifted(ratio: torch.Tensor, v: torch.Tensor, element: Element) -> torch.Tensor:
    """`ratio + v * step`, where step is how far apart the element's values lie at `ratio`."""
    return element.step(ratio).mul_(v).add_(ratio)


class _StraightThrough(torch.autograd.Function):
    """`f * nearest(x / f)`. Inside the element's range dW/dx = 1 and dW/df = q - x/f; outside they are 0 and q
    (LSQ, arXiv 1902.08153, equation 3)."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, factor: torch.Tensor, element: Element) -> torch.Tensor:
        ratio = x / factor
        values = element.nearest(ratio)
        if ctx.needs_input_grad[1]:
            ctx.save_for_backward(ratio, values, factor)
        elif ctx.needs_input_grad[0]:
            ctx.save_for_backward(ratio.abs_() < element.saturation)
        ctx.element = element
        return values.mul_(factor) if not ctx.needs_input_grad[1] else values * factor

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None, None]:
        (grad,) = grad_outputs
        if not ctx.needs_input_grad[1]:
            return grad * ctx.saved_tensors[0], None, None
        ratio, values, factor = ctx.saved_tensors
        inside = ratio.abs() < ctx.element.saturation
        grad_x = grad * inside if ctx.needs_input_grad[0] else None
        slope = (values - ratio * inside).mul_(grad)
        return grad_x, slope.sum_to_size(factor.shape), None


def quantize_float(
    tensor: torch.Tensor, family: FloatFamily, group_size: GroupSize, v: torch.Tensor | float = 0.0,
    min_scale: torch.Tensor | float = 1.0, max_scale: torch.Tensor | float = 1.0,
    global_scale: torch.Tensor | None = None, scale: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, None]:  # fmt: skip
    """Quantize and dequantize, by the contract of data types.

    Args:
        tensor: [..., in].
        v: added to `tensor`, in its units and shape.
        min_scale, max_scale: factors on each group's smallest and largest value; a number or one value a group.
        global_scale: for types that have one; None computes it from the tensor.
        scale: the scale to use, a scalar, for static activations.

    Returns:
        (dequantized tensor of the same shape and dtype, stored scale float32 [rows, groups], None). Gradients pass
        straight through the rounding of values and scales to `tensor`, `v`, `min_scale` and `max_scale`; the extremes
        themselves count as fixed.
    """
    flat = tensor.reshape(-1, tensor.shape[-1]).float()
    tiles = as_tiles(flat, group_size)
    given = family.global_scale(flat, global_scale)
    if scale is not None:
        stored = scale.detach().to(flat).reshape(1, 1, 1, 1)
        factor = factor_of(stored, given)
    else:
        largest = _largest(tiles.detach(), min_scale, max_scale)
        fixed = largest.detach()
        stored = family.rule.scale(fixed, given)
        factor = factor_of(stored, given)
        if largest.requires_grad:  # the scale is taken to be in proportion to the extreme
            factor = factor * torch.where(fixed > 0, largest / fixed, 1.0)
    if isinstance(v, torch.Tensor):
        tiles = tiles + as_tiles(v.reshape(flat.shape).float(), group_size)
    elif v:
        tiles = tiles + v
    values = _StraightThrough.apply(tiles, factor, family.element)
    result = from_tiles(values, (flat.shape[0], flat.shape[1])).reshape(tensor.shape).to(tensor.dtype)
    return result, stored.reshape(stored.shape[0], stored.shape[2]), None


def _largest(tiles: torch.Tensor, min_scale: torch.Tensor | float, max_scale: torch.Tensor | float) -> torch.Tensor:
    """[R, 1, C, 1]: the larger of maximum * max_scale and -minimum * min_scale."""
    r, _, c, _ = tiles.shape
    factors = [
        f.reshape(r, 1, c, 1).float() if isinstance(f, torch.Tensor) and f.numel() > 1 else f
        for f in (min_scale, max_scale)
    ]
    if (
        not isinstance(factors[0], torch.Tensor)
        and not isinstance(factors[1], torch.Tensor)
        and factors[0] == factors[1]
    ):
        largest = tile_largest(tiles)
        return largest if factors[0] == 1 else largest * factors[0]
    low, high = tile_extremes(tiles)
    return torch.maximum(high * factors[1], -low * factors[0])


FLOAT_FAMILIES: dict[str, Mapping[int, FloatFamily]] = {}


def register_float(
    names: Sequence[str], families: Mapping[int, FloatFamily], usual_group_size: GroupSize = 32
) -> QuantFunc:
    """Register a data type function for families of small floats, chosen by bits, as the type of weights.

    Args:
        names: of the data type.
        families: by bits.
        usual_group_size: what the function takes when none is given.
    """
    FLOAT_FAMILIES.update(dict.fromkeys(names, families))
    return register_dtype(names)(float_function(names[0], families, usual_group_size))


def float_function(name: str, families: Mapping[int, FloatFamily], usual_group_size: GroupSize) -> QuantFunc:
    """The function of `register_float`, registered nowhere."""
    only = next(iter(families)) if len(families) == 1 else None

    def quant_tensor_float(
        tensor: torch.Tensor, bits: int | None = None, group_size: GroupSize = usual_group_size,
        v: torch.Tensor | float = 0.0, min_scale: torch.Tensor | float = 1.0, max_scale: torch.Tensor | float = 1.0,
        scale_dtype: torch.dtype | None = None, q_scale_thresh: float = 0.0, imatrix: torch.Tensor | None = None,
        global_scale: torch.Tensor | None = None, **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor, None]:  # fmt: skip
        return quantize_float(
            tensor, pick(families, name, bits or only), group_size, v, min_scale, max_scale, global_scale
        )

    quant_tensor_float.__doc__ = quantize_float.__doc__
    quant_tensor_float.__qualname__ = f"quant_tensor_float[{name}]"
    return quant_tensor_float


def pick(families: Mapping[int, FloatFamily], name: str, bits: int | None) -> FloatFamily:
    """The family of that many bits. Raises UnsupportedError when there is none."""
    family = None if bits is None else families.get(bits)
    if family is None:
        raise UnsupportedError(
            f"data type {name!r} with {bits} bits is not available in this version; bits there are: "
            f"{', '.join(map(str, families))}"
        )
    return family


def float_family(data_type: str, bits: int) -> FloatFamily | None:
    """The family whose codes a layer of this data type stores, None for types that are no small floats.

    Raises:
        UnsupportedError: the type has no such width.
    """
    families = FLOAT_FAMILIES.get(data_type)
    return None if families is None else pick(families, data_type, bits)
