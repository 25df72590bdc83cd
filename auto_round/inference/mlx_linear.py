"""A linear layer in the MLX layout, in plain PyTorch on any device."""

from __future__ import annotations

import torch

from auto_round.errors import ModelError
from auto_round.export.packing.mlx import mlx_words, mlx_zero_points, unpack_mlx
from auto_round.inference.config_reader import LayerFormat
from auto_round.inference.packed_linear import PackedLinear

# Weights dequantized at once: bounds the temporary copies.
_CHUNK = 1 << 22


class MlxLinear(PackedLinear):
    """y = x W^T + bias with W = scales * code + biases.

    Buffers: `weight` uint32 [out, in*bits/32], `scales` and `biases` [out, groups] in the file's dtypes, `bias` [out]
    in the model's dtype.
    """

    words: str = "weight"
    kept: tuple[str, ...] = ("scales", "biases")
    weight: torch.Tensor
    scales: torch.Tensor
    biases: torch.Tensor

    def __init__(
        self, in_features: int, out_features: int, fmt: LayerFormat, *, bias: bool = False,
        dtype: torch.dtype = torch.float32, scale_dtype: torch.dtype = torch.float16,
        biases_dtype: torch.dtype = torch.float16, device: torch.device | str | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.in_features, self.out_features, self.format = in_features, out_features, fmt
        self.bits, self.dtype = fmt.bits, dtype
        shapes = mlx_shapes(in_features, out_features, fmt)
        self.register_buffer("weight", torch.zeros(shapes["weight"], dtype=torch.uint32, device=device))
        self.register_buffer("scales", torch.zeros(shapes["scales"], dtype=scale_dtype, device=device))
        self.register_buffer("biases", torch.zeros(shapes["biases"], dtype=biases_dtype, device=device))
        self.register_buffer("bias", torch.zeros(out_features, dtype=dtype, device=device) if bias else None)

    @torch.no_grad()
    def prepare(self, name: str = "") -> None:
        if not bool(torch.isfinite(self.scales).all() & torch.isfinite(self.biases).all()):
            raise ModelError(f"{name or 'layer'}: a scale or bias is NaN or Inf; fetch the files again")

    def unpack(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return unpack_mlx(self.weight, self.bits), self.scales, mlx_zero_points(self.scales, self.biases)

    @torch.no_grad()
    def _dense(self, dtype: torch.dtype) -> torch.Tensor:
        dense = torch.empty(self.out_features, self.in_features, dtype=dtype, device=self.weight.device)
        step = max(1, _CHUNK // self.in_features)
        groups = self.scales.shape[1]
        for start in range(0, self.out_features, step):
            rows = slice(start, start + step)
            values = unpack_mlx(self.weight[rows], self.bits).view(-1, groups, self.in_features // groups).float()
            values.mul_(self.scales[rows].float().unsqueeze(-1)).add_(self.biases[rows].float().unsqueeze(-1))
            dense[rows] = values.view(-1, self.in_features)
        return dense.T


def mlx_shapes(in_features: int, out_features: int, fmt: LayerFormat) -> dict[str, tuple[int, ...]]:
    """Shapes of `weight`, `scales` and `biases`. Raises UnsupportedError when a row does not fill whole words."""
    groups = in_features // fmt.group_size
    return {
        "weight": (out_features, mlx_words(in_features, fmt.bits)),
        "scales": (out_features, groups),
        "biases": (out_features, groups),
    }


def mlx_packable(in_features: int, fmt: LayerFormat) -> str | None:
    """None when a layer of this width can be stored in `fmt`, or the reason why not."""
    if fmt.group_size <= 0 or in_features % fmt.group_size:
        return f"in_features={in_features} is not a multiple of the group size {fmt.group_size}"
    return None if in_features * fmt.bits % 32 == 0 else f"in_features={in_features} does not fill whole words"
