"""Describe how fused MoE parameters store the experts, and detect the layout of a module.

Most families declare their layout through the attributes that Transformers' `use_experts_implementation` sets.
The few classes that declare nothing are rows of `UNDECLARED`; a test compares the outputs of each with the
module's own.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import torch
from torch import nn


@dataclass(frozen=True)
class ExpertPiece:
    """Location of a tensor of one expert inside a fused parameter (3-D for weights, 2-D for biases).

    Attributes:
        param: name of the fused parameter in its module, such as `gate_up_proj`.
        expert: index in its first dimension.
        part: "gate" or "up" half of `gate_up_proj`, or "all".
        transposed: the fused weight is [in, out] per expert.
        interleaved: gate and up rows alternate instead of being two halves.
        rows: rows per expert if the parameter is 2-D with the experts concatenated along rows; 0 otherwise.
    """

    param: str
    expert: int
    part: str
    transposed: bool
    interleaved: bool
    rows: int = 0

    def slot(self, whole: torch.Tensor) -> torch.Tensor:
        """A view of this expert's part of the fused parameter."""
        return whole[self.expert * self.rows : (self.expert + 1) * self.rows] if self.rows else whole[self.expert]

    def cut(self, one: torch.Tensor) -> torch.Tensor:
        """The piece [out, in] or [out] of this expert's fused tensor `one`; a view if the layout allows."""
        one = self._half(one)
        if one.dim() == 2 and self.transposed:
            one = one.t()
        return one.contiguous()

    def paste(self, one: torch.Tensor, part: torch.Tensor) -> None:
        """The inverse of `cut`: write `part` [out, in] or [out] into this expert's fused tensor `one`, in place."""
        if part.dim() == 2 and self.transposed:
            part = part.t()
        self._half(one).copy_(part)

    def _half(self, one: torch.Tensor) -> torch.Tensor:
        if self.part == "all":
            return one
        axis, second = int(one.dim() == 2 and self.transposed), int(self.part == "up")
        if self.interleaved:
            return one[tuple([slice(None)] * axis + [slice(second, None, 2)])]
        return one.chunk(2, dim=axis)[second]


@dataclass(frozen=True)
class ExpertLayout:
    """Names and layout of the fused parameters of an experts module, and its call signature.

    Attributes:
        gate, up, down: parameter of each projection; gate and up have the same name if joined (gate first). "" for a
            missing gate; with `up` "" the module is one projection per expert.
        transposed, down_transposed: weights of gate and up, and of down, are [in, out] per expert.
        interleaved: joined gate and up alternate row by row.
        flat: parameters are 2-D with the experts concatenated along rows.
        bias: suffix of bias parameter names, "" if there are none.
        act: dotted attribute with the activation function.
        call: "routed" (hidden states, chosen experts, their weights), "every" (hidden states of all experts
            concatenated along rows), "shared" (every token is processed by every expert, with a factor for each) or
            "sorted" (tokens sorted by expert, with the number of tokens of each).
        identity: experts beyond the last return their input (LongCat's zero-computation experts).
    """

    gate: str = "gate_up_proj"
    up: str = "gate_up_proj"
    down: str = "down_proj"
    transposed: bool = False
    down_transposed: bool = False
    interleaved: bool = False
    flat: bool = False
    bias: str = ""
    act: str = "act_fn"
    call: str = "routed"
    identity: bool = False

    @property
    def weights(self) -> tuple[str, ...]:
        """Names of the weight parameters, each once."""
        return tuple(dict.fromkeys(name for name in (self.gate, self.up, self.down) if name))


# Classes of Transformers 5.24 that declare no layout. `_fits` detects a class that another version changed.
UNDECLARED: dict[str, ExpertLayout] = {
    "Llama4TextExperts": ExpertLayout(transposed=True, down_transposed=True, call="every"),
    "LongcatFlashExperts": ExpertLayout(identity=True),
    "Step3p7Experts": ExpertLayout(),
    "DbrxExperts": ExpertLayout("mlp.w1", "mlp.v1", "mlp.w2", down_transposed=True, flat=True, act="mlp.activation_fn"),
    "InklingSharedExperts": ExpertLayout("gate_proj", "up_proj", "down_proj", call="shared"),
    "JetMoeParallelExperts": ExpertLayout("", "", "weight", call="sorted"),
}


def expert_layout(module: nn.Module) -> ExpertLayout | None:
    """The layout of an experts module; None if `module` is not one, or its layout is unknown."""
    layout: ExpertLayout | None
    if hasattr(module, "is_transposed"):  # set by Transformers' `use_experts_implementation`
        gated, transposed = bool(getattr(module, "has_gate", True)), bool(module.is_transposed)
        first = "gate_up_proj" if gated else "up_proj"
        layout = ExpertLayout(
            gate=first if gated else "", up=first, transposed=transposed, down_transposed=transposed,
            interleaved=not getattr(module, "is_concatenated", True),
            bias="_bias" if getattr(module, "has_bias", False) else "",
        )  # fmt: skip
    else:
        layout = next((UNDECLARED[c.__name__] for c in type(module).__mro__ if c.__name__ in UNDECLARED), None)
    return layout if layout is not None and _fits(module, layout) else None


def fused_params(module: nn.Module) -> dict[str, nn.Parameter]:
    """All matrices under `module` by dotted name, and the biases of the module itself."""
    own = dict(module.named_parameters(recurse=False))
    below = {n: p for n, p in module.named_parameters() if n not in own and p.dim() > 1}
    return own | below


def expert_count(module: nn.Module, layout: ExpertLayout) -> int:
    """Number of experts with weights."""
    down = fused_params(module)[layout.down]
    if not layout.flat:
        return int(down.shape[0])
    return int(getattr(module, "num_experts", 0) or 0)


def expert_sizes(module: nn.Module, layout: ExpertLayout) -> tuple[int, int]:
    """(input width of gate and up = output width of down, output width of gate = input width of down)."""
    down = fused_params(module)[layout.down]
    rows = int(down.shape[0]) // max(1, expert_count(module, layout)) if layout.flat else int(down.shape[1])
    columns = int(down.shape[-1])
    return (columns, rows) if layout.down_transposed else (rows, columns)


def _fits(module: nn.Module, layout: ExpertLayout) -> bool:
    """Whether the parameters of `module` are exactly those of the layout, with consistent sizes.

    A further parameter, or a persistent buffer (a scale per expert, say), would be part of its computation.
    """
    params = fused_params(module)
    names = {name + suffix for name in layout.weights for suffix in {"", layout.bias}}
    if set(params) != names or set(module._buffers) - module._non_persistent_buffers_set:
        return False
    if any(params[name].dim() != (2 if layout.flat else 3) for name in layout.weights):
        return False
    experts = expert_count(module, layout)
    if experts < 1 or (layout.flat and params[layout.down].shape[0] % experts):
        return False
    hidden, inner = expert_sizes(module, layout)
    wanted: dict[str, tuple[int, ...]] = {}
    for name in layout.weights:
        out, columns = (hidden, inner) if name == layout.down else (inner, hidden)
        out *= 2 if name == layout.gate == layout.up else 1
        transposed = layout.down_transposed if name == layout.down else layout.transposed
        one = (columns, out) if transposed else (out, columns)
        wanted[name] = (experts * one[0], one[1]) if layout.flat else (experts, *one)
        if layout.bias:
            wanted[name + layout.bias] = (experts, out)
    for name, shape in wanted.items():
        given = tuple(params[name].shape)
        # Identity experts have unused rows.
        if given != shape and not (layout.identity and given[1:] == shape[1:] and given[0] >= shape[0]):
            return False
    return prod(params[layout.down].shape) > 0
