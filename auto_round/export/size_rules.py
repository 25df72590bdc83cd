"""Widths that the kernels which read a format ask for, as data.

Only what makes a file unusable keeps a layer dense: `GPTQ`, `AWQ`, `MLX` and `COMPRESSED_TENSORS`. What costs a fast
kernel alone is in `FASTER`: the plan says so once, and the layer is quantized. With where each is asked:

| rule | where it is asked |
|---|---|
| AWQ: inputs of whole groups, outputs of whole words of 8 | AutoAWQ `awq/modules/linear/gemm.py`, vLLM `awq.py` |
| AWQ: groups a multiple of 32 that divide the outputs | `awq_gemm` in vLLM `csrc/quantization/awq/gemm_kernels.cu` |
| GPTQ: inputs of whole groups, outputs of whole words | vLLM `quantization/gptq.py`, `create_weights` |
| GPTQ and AWQ: both widths multiples of 32 | this package's packing: 32 values of 3 bits fill whole words |
| compressed-tensors: inputs of whole groups | compressed-tensors `quantization/lifecycle/forward.py` |
| MLX: inputs of whole groups of 32, 64 or 128; 2 to 6 and 8 bits | MLX `mlx/ops.cpp`, `quantize` |
| faster, Marlin: outputs a multiple of 64, inputs of 128, groups of 32, 64, 128 or rows | vLLM `marlin_utils.py` |
| asked where there is no Marlin: AWQ's outputs a multiple of 64 | the same `awq_gemm`, cta_N |

GPTQModel's Torch kernels take any width (`SUPPORTS_OUT_FEATURES_DIVISIBLE_BY = [1]`). vLLM pads what Marlin finds
misaligned since 2026 (`allow_tile_padding`) and takes `awq_gemm` only where there is no Marlin, which is why 64 outputs
keep no AWQ layer dense. MLX's Metal kernels take any outputs; multiples of 8 are faster (`qmv` in `quantized.cpp`).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class SizeRule:
    """What a kernel asks of a layer.

    Attributes:
        inputs, outputs: the widths are multiples of these.
        groups: the group sizes that it takes, where it takes some only; one group a row is always taken.
        group_multiple: the group size is a multiple of this.
        whole_groups: the group size divides the inputs.
        outputs_by_group: it divides the outputs too.
    """

    inputs: int = 1
    outputs: int = 1
    groups: tuple[int, ...] = ()
    group_multiple: int = 1
    whole_groups: bool = True
    outputs_by_group: bool = False

    def problem(self, in_features: int, out_features: int, group_size: int) -> str | None:
        """Why the kernel does not take such a layer, or None. `group_size`: -1 is one group a row."""
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
                f"out_features={out_features} is not a multiple of group_size {group_size}, which AWQ's kernels ask "
                "for; choose one that divides it"
            )
        return None


GPTQ = SizeRule(32, 32)
AWQ = SizeRule(32, 32, group_multiple=32, outputs_by_group=True)
MLX = SizeRule(groups=(32, 64, 128))
COMPRESSED_TENSORS = SizeRule()
_MARLIN = SizeRule(128, 64, groups=(32, 64, 128))
# By format: the fast kernel, who has it, and its rule.
FASTER: dict[str, tuple[str, SizeRule]] = {
    "auto_gptq": ("vLLM's Marlin kernels", _MARLIN),
    "gptqmodel": ("vLLM's Marlin kernels", _MARLIN),
    "auto_awq": ("vLLM's Marlin kernels", _MARLIN),
}


def slower(formats: Iterable[str], layers: Iterable[tuple[str, int, int, int]]) -> list[str]:
    """One line for each fast kernel that does not take some of the layers as they are.

    Args:
        formats: names.
        layers: (name, inputs, outputs, group size) of the quantized ones.
    """
    found: dict[str, str] = {}
    known = list(layers)
    for kernel, rule in (FASTER[fmt] for fmt in formats if fmt in FASTER):
        lost = [(name, why) for name, *sizes in known if (why := rule.problem(*sizes)) is not None]
        if lost:
            name, why = lost[0]
            found[kernel] = (
                f"{len(lost)} of {len(known)} quantized layers, such as {name} ({why}), are not for {kernel} as they "
                "are: the runtime pads them or takes a slower kernel"
            )
    return list(found.values())
