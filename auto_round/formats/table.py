"""Which sizes of layers the readers of each format accept, as data.

A layer stays unquantized only where its size would make the file unusable (`GPTQ_SIZES`, `AWQ_SIZES`, `MLX_SIZES`,
`COMPRESSED_TENSORS_SIZES`). Where a size only rules out a fast kernel (`FAST_KERNELS`), the plan warns once.

| rule | where it is checked |
|---|---|
| AWQ: inputs of whole groups, outputs of whole words of 8 | AutoAWQ `awq/modules/linear/gemm.py`, vLLM `awq.py` |
| AWQ: groups a multiple of 32 that divide the outputs | `awq_gemm`, vLLM `csrc/quantization/awq/gemm_kernels.cu` |
| GPTQ: inputs of whole groups, outputs of whole words | vLLM `quantization/gptq.py`, `create_weights` |
| GPTQ and AWQ: both widths multiples of 32 | this package's packing: 32 values of 3 bits fill whole words |
| compressed-tensors: inputs of whole groups | compressed-tensors `quantization/lifecycle/forward.py` |
| MLX: inputs of whole groups of 32, 64 or 128; 2 to 6 and 8 bits | MLX `mlx/ops.cpp`, `quantize` |
| fast, Marlin: outputs x 64, inputs x 128, groups of 32, 64, 128 or rows | vLLM `marlin_utils.py` |
| only without Marlin: AWQ's outputs a multiple of 64 | the same `awq_gemm`, cta_N |

GPTQModel's Torch kernels take any width (`SUPPORTS_OUT_FEATURES_DIVISIBLE_BY = [1]`). Since 2026 vLLM pads layers
that Marlin finds misaligned (`allow_tile_padding`) and uses `awq_gemm` only where there is no Marlin, so AWQ
layers need no multiple of 64 outputs. MLX's Metal kernels take any outputs; multiples of 8 are faster (`qmv`,
`quantized.cpp`).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from auto_round.schemes import GroupSize


@dataclass(frozen=True)
class SizeRule:
    """Sizes that a kernel accepts. One group a row is always accepted.

    Attributes:
        inputs, outputs: in_features and out_features must be multiples of these.
        whole_groups: the group size must divide in_features.
        groups: accepted group sizes; empty accepts all.
        group_multiple: the group size must be a multiple of this.
        outputs_by_group: the group size must divide out_features too.
    """

    inputs: int = 1
    outputs: int = 1
    groups: tuple[int, ...] = ()
    group_multiple: int = 1
    outputs_by_group: bool = False
    whole_groups: bool = True

    def problem(self, in_features: int, out_features: int, group_size: GroupSize) -> str | None:
        """Why the kernel rejects such a layer, or None. `group_size`: as in a scheme; of a block the columns count."""
        group_size = group_size[1] if isinstance(group_size, tuple) else group_size
        for what, size, multiple in (
            ("in_features", in_features, self.inputs),
            ("out_features", out_features, self.outputs),
        ):
            if size % multiple:
                return f"{what}={size} is not a multiple of {multiple}"
        if group_size <= 0:
            return None
        if self.groups and group_size not in self.groups:
            return f"group_size {group_size} is not one of {', '.join(map(str, self.groups))}"
        if group_size % self.group_multiple:
            return f"group_size {group_size} is not a multiple of {self.group_multiple}"
        if self.whole_groups and in_features % group_size:
            return f"in_features={in_features} is not a multiple of group_size {group_size}; choose one that divides it"
        if self.outputs_by_group and out_features % group_size:
            return (
                f"out_features={out_features} is not a multiple of group_size {group_size}, which AWQ's kernels "
                "require; choose one that divides it"
            )
        return None


# Kernels of every runtime that reads AutoRound's files work on tiles of 32, and 3-bit words need it.
AUTO_ROUND_SIZES = SizeRule(32, 32, whole_groups=False)
GPTQ_SIZES = SizeRule(32, 32)
AWQ_SIZES = SizeRule(32, 32, group_multiple=32, outputs_by_group=True)
MLX_SIZES = SizeRule(groups=(32, 64, 128))
COMPRESSED_TENSORS_SIZES = SizeRule()
_MARLIN = SizeRule(128, 64, groups=(32, 64, 128))
# By format: the name of the fast kernel, and its rule.
FAST_KERNELS: dict[str, tuple[str, SizeRule]] = {
    "auto_gptq": ("vLLM's Marlin kernels", _MARLIN),
    "gptqmodel": ("vLLM's Marlin kernels", _MARLIN),
    "auto_awq": ("vLLM's Marlin kernels", _MARLIN),
}


def slow_kernel_notes(formats: Iterable[str], layers: Iterable[tuple[str, int, int, int]]) -> list[str]:
    """One warning for each fast kernel that does not support the sizes of some layers.

    Args:
        formats: names of the formats.
        layers: (name, in_features, out_features, group size) of the quantized layers.
    """
    found: dict[str, str] = {}
    known = list(layers)
    for kernel, rule in (FAST_KERNELS[fmt] for fmt in formats if fmt in FAST_KERNELS):
        lost = [(name, why) for name, *sizes in known if (why := rule.problem(*sizes)) is not None]
        if lost:
            name, why = lost[0]
            found[kernel] = (
                f"{len(lost)} of {len(known)} quantized layers, such as {name} ({why}), do not fit {kernel}: the "
                "runtime pads them or uses a slower kernel"
            )
    return list(found.values())
