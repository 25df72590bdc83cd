"""Widths that the kernels which read a format ask for, as data.

Only what makes a file unusable keeps a layer dense. What costs a fast kernel alone is in `FASTER`, and no layer is kept
dense for it: vLLM then takes another kernel of the same format.

| rule | where it is asked |
|---|---|
| AWQ: inputs of whole groups, outputs of whole words of 8 | AutoAWQ `awq/modules/linear/gemm.py`, vLLM `awq.py` |
| AWQ: outputs a multiple of the group size, groups of 32 at least | vLLM and AutoAWQ `gemm_kernels.cu`, `awq_gemm` |
| GPTQ: inputs of whole groups, both widths multiples of 32 | GPTQModel `nn_modules/qlinear`, vLLM `gptq.py` |
| Marlin: outputs a multiple of 64, inputs of 128 | vLLM `marlin_utils.py`, GPTQ_MARLIN_MIN_THREAD_N and _K |
| compressed-tensors: inputs of whole groups | compressed-tensors `quantization/lifecycle/forward.py` |
| MLX: inputs of whole groups of 32, 64 or 128, outputs multiples of 8 | MLX `mlx/ops.cpp`, `quantized.metal` |
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class SizeRule:
    """What a kernel asks of a layer.

    Attributes:
        inputs, outputs: the widths are multiples of these.
        whole_groups: the group size divides the inputs.
        outputs_by_group: it divides the outputs too.
    """

    inputs: int = 1
    outputs: int = 1
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
        if self.whole_groups and in_features % group_size:
            return f"in_features={in_features} is not a multiple of group_size {group_size}; choose one that divides it"
        if self.outputs_by_group and out_features % group_size:
            return (
                f"out_features={out_features} is not a multiple of group_size {group_size}, which AWQ's kernels ask "
                "for; choose one that divides it"
            )
        return None


GPTQ = SizeRule(32, 32)
AWQ = SizeRule(32, 32, outputs_by_group=True)
FASTER: dict[str, SizeRule] = {"Marlin": SizeRule(128, 64)}
