"""Mixture-of-experts weights as linear layers.

Transformers 5 stores the experts of a block as 3-D parameters (`gate_up_proj` [E, 2I, H], `down_proj` [E, H, I]).
Quantizers, formats and runtimes know linear layers, so such a module is replaced by `LinearExperts`, whose children
"0", "1", ... each hold `gate_proj`, `up_proj` and `down_proj`, and whose numbers and signature are the same.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn

from auto_round.modeling.blocks import is_linear, weight_2d
from auto_round.modeling.conversions import USUAL_LEAVES, ExpertLeaves


@dataclass(frozen=True)
class ExpertPiece:
    """Where a tensor of one expert lies inside a fused 3-D parameter (2-D for biases).

    Attributes:
        param: name of the fused parameter in its module, such as `gate_up_proj`.
        expert: index in its first dimension.
        part: "gate" or "up" half of `gate_up_proj`, or "all".
        transposed: the fused weight is [in, out] per expert.
        interleaved: gate and up alternate instead of following each other.
    """

    param: str
    expert: int
    part: str
    transposed: bool
    interleaved: bool

    def cut(self, one: torch.Tensor) -> torch.Tensor:
        """The piece [out, in] or [out] of this expert's fused tensor `one`; a view where the layout allows."""
        weight = one.dim() == 2
        if self.part != "all":
            axis = 1 if weight and self.transposed else 0
            if self.interleaved:
                index = [slice(None)] * axis + [slice(int(self.part == "up"), None, 2)]
                one = one[tuple(index)]
            else:
                one = one.chunk(2, dim=axis)[int(self.part == "up")]
        if weight and self.transposed:
            one = one.t()
        return one.contiguous()

    def paste(self, one: torch.Tensor, part: torch.Tensor) -> None:
        """The inverse of `cut`: write `part` [out, in] or [out] into this expert's fused tensor `one`, in place."""
        if part.dim() == 2 and self.transposed:
            part = part.t()
        if self.part != "all":
            axis = 1 if one.dim() == 2 and self.transposed else 0
            if self.interleaved:
                index = [slice(None)] * axis + [slice(int(self.part == "up"), None, 2)]
                one = one[tuple(index)]
            else:
                one = one.chunk(2, dim=axis)[int(self.part == "up")]
        one.copy_(part)


class ExpertMLP(nn.Module):
    """The linear layers of one expert. `LinearExperts` runs them."""

    def __init__(self, hidden: int, intermediate: int, *, gate: bool, bias: bool, **factory: Any) -> None:
        super().__init__()
        if gate:
            self.gate_proj = nn.Linear(hidden, intermediate, bias=bias, **factory)
        self.up_proj = nn.Linear(hidden, intermediate, bias=bias, **factory)
        self.down_proj = nn.Linear(intermediate, hidden, bias=bias, **factory)


class ExpertsTogether(Protocol):
    """Runs the layers of all experts in one go."""

    def holds(self) -> bool:
        """Whether it still does what the layers would."""

    def __call__(self, x: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
        """x [rows, H] sorted by `chosen`, int64 [rows] -> [rows, H]; zeros where `chosen` is no expert."""


class LinearExperts(nn.Module):
    """Experts as linear layers, with the call and the numbers of the fused module that it replaces.

    The fused module's class decides how gate and up are combined; its empty shell is kept for that.

    Attributes:
        together: what runs all experts instead of their layers, one after the other, where no gradient is wanted.
    """

    _shell: Any
    together: ExpertsTogether | None = None

    def __init__(self, fused: nn.Module) -> None:
        super().__init__()
        down = fused.down_proj
        assert isinstance(down, torch.Tensor)
        self.transposed = bool(getattr(fused, "is_transposed", False))
        self.interleaved = not getattr(fused, "is_concatenated", True)
        self.has_gate = bool(getattr(fused, "has_gate", True))
        self.has_bias = bool(getattr(fused, "has_bias", False))
        self.num_experts = int(down.shape[0])
        self.leaves = [USUAL_LEAVES] * self.num_experts
        first, second = int(down.shape[1]), int(down.shape[2])
        self.hidden_dim, self.intermediate_dim = (second, first) if self.transposed else (first, second)
        for index in range(self.num_experts):
            expert = ExpertMLP(
                self.hidden_dim,
                self.intermediate_dim,
                gate=self.has_gate,
                bias=self.has_bias,
                device="meta",
                dtype=down.dtype,
            )
            self.add_module(str(index), expert)
        if not down.is_meta:
            self._take(fused)
        self.train(fused.training)
        # The shell must not be a child: it has no tensors left, and its name would show in the module tree.
        for name in list(fused._parameters):
            del fused._parameters[name]
        self.__dict__["_shell"] = fused

    def call_leaves(self, index: int, leaves: ExpertLeaves) -> None:
        """Give the linear layers of an expert the names that a checkpoint has for them."""
        expert = self.get_submodule(str(index))
        layers = [expert._modules.pop(old, None) for old in self.leaves[index]]
        for name, layer in zip(leaves, layers, strict=True):
            if layer is not None:
                expert.add_module(name, layer)
        self.leaves[index] = leaves

    def usual_names(self) -> dict[str, str]:
        """By the name under this module of every linear layer, the name that it has in a module just made."""
        return {
            f"{index}.{leaf}": f"{index}.{usual}"
            for index, leaves in enumerate(self.leaves)
            for leaf, usual in zip(leaves, USUAL_LEAVES, strict=True)
            if self.has_gate or usual != USUAL_LEAVES.gate
        }

    def _take(self, fused: nn.Module) -> None:
        """Fill the linear layers with views of the fused parameters."""
        for name, piece in self.pieces().items():
            whole = getattr(fused, piece.param)
            owner, _, leaf = name.rpartition(".")
            part = nn.Parameter(piece.cut(whole.detach()[piece.expert]), requires_grad=whole.requires_grad)
            self.get_submodule(owner)._parameters[leaf] = part

    def pieces(self) -> dict[str, ExpertPiece]:
        """For every parameter name under this module, where it lies in the fused parameters."""
        places = (("gate_up_proj", "gate"), ("gate_up_proj", "up"), ("down_proj", "all"))
        if not self.has_gate:
            places = (("", ""), ("up_proj", "all"), ("down_proj", "all"))
        suffixes = [("weight", ""), ("bias", "_bias")] if self.has_bias else [("weight", "")]
        return {
            f"{index}.{layer}.{leaf}": ExpertPiece(param + suffix, index, part, self.transposed, self.interleaved)
            for index, leaves in enumerate(self.leaves)
            for layer, (param, part) in zip(leaves, places, strict=True)
            for leaf, suffix in suffixes
            if param
        }

    def fused_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the fused parameters that this module replaced, by name."""
        inner = self.intermediate_dim * (2 if self.has_gate else 1)
        first = "gate_up_proj" if self.has_gate else "up_proj"
        shapes: dict[str, tuple[int, ...]] = {}
        for name, out, columns in (
            (first, inner, self.hidden_dim),
            ("down_proj", self.hidden_dim, self.intermediate_dim),
        ):
            shapes[name] = (self.num_experts, *((columns, out) if self.transposed else (out, columns)))
            if self.has_bias:
                shapes[f"{name}_bias"] = (self.num_experts, out)
        return shapes

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """[tokens, H] from hidden_states [tokens, H], top_k_index int64 [tokens, K] and top_k_weights [tokens, K].

        Only experts with tokens run. An index of `num_experts` or above means "none" and adds nothing. The K results of
        a token are summed at once, in a fixed order, so that the outcome does not depend on the order of the experts.
        """
        tokens, slots = top_k_index.shape
        chosen, order = torch.sort(top_k_index.reshape(-1), stable=True)
        rows = order // slots
        if self._runs_together(hidden_states):
            assert self.together is not None
            results = self.together(hidden_states[rows], chosen)
        else:
            outputs = self._one_by_one(hidden_states, chosen, rows)
            if not outputs:
                return torch.zeros_like(hidden_states)
            results = torch.cat(outputs)
        back = torch.empty_like(order)
        back[order] = torch.arange(order.numel(), device=order.device)
        joined = results[back].view(tokens, slots, -1)
        return (joined * top_k_weights.unsqueeze(-1)).sum(dim=1).to(hidden_states.dtype)

    def _runs_together(self, hidden: torch.Tensor) -> bool:
        if self.together is None or hidden.numel() == 0 or (hidden.requires_grad and torch.is_grad_enabled()):
            return False
        if not torch.compiler.is_compiling() and not self.together.holds():
            self.together = None
        return self.together is not None

    def _one_by_one(self, hidden: torch.Tensor, chosen: torch.Tensor, rows: torch.Tensor) -> list[torch.Tensor]:
        """[rows, H] in the order of `chosen` [rows], in pieces; `rows`: which token each is. Nothing if no expert is
        chosen."""
        counts = torch.bincount(chosen.clamp(max=self.num_experts), minlength=self.num_experts + 1).tolist()
        outputs: list[torch.Tensor] = []
        start = 0
        for index, count in enumerate(counts[: self.num_experts]):
            if count:
                outputs.append(self.run_expert(index, hidden[rows[start : start + count]]))
                start += count
        if outputs and start < len(rows):
            outputs.append(outputs[0].new_zeros(len(rows) - start, outputs[0].shape[-1]))
        return outputs

    def run_expert(self, index: int, hidden: torch.Tensor) -> torch.Tensor:
        """What one expert makes of its tokens, [rows, H] from [rows, H], without the routing's weights."""
        gate, up, down = self.leaves[index]
        expert = self.get_submodule(str(index))
        above = getattr(expert, up)(hidden)
        return getattr(expert, down)(self.combine(getattr(expert, gate)(hidden) if self.has_gate else None, above))

    def combine(self, gate: torch.Tensor | None, up: torch.Tensor) -> torch.Tensor:
        """What the down projection gets, [rows, I], from gate (None where the family has none) and up."""
        return self._shell.act_fn(up) if gate is None else self._combine(gate, up)

    def _combine(self, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        """Gate and up [rows, I] combined as the family of the fused module does it."""
        own = getattr(self._shell, "_apply_gate", None)
        if own is None or own.__name__ == "_default_apply_gate":
            return self._shell.act_fn(gate) * up
        return own(torch.stack((gate, up), dim=-1).flatten(-2) if self.interleaved else torch.cat((gate, up), dim=-1))

    def extra_repr(self) -> str:
        return f"experts={self.num_experts}, hidden={self.hidden_dim}, intermediate={self.intermediate_dim}"


def is_fused_experts(module: nn.Module) -> bool:
    """Whether `module` is a 3-D experts module whose layout Transformers declares and `LinearExperts` can take over."""
    if not hasattr(module, "is_transposed") or getattr(module, "has_post_expert_norm", False):
        return False
    names = ("gate_up_proj" if getattr(module, "has_gate", True) else "up_proj", "down_proj")
    return all(isinstance(p := module._parameters.get(name), torch.Tensor) and p.dim() == 3 for name in names)


def unfuse_experts(model: nn.Module) -> list[str]:
    """Replace every fused experts module under `model` by `LinearExperts`, in place; returns their names.

    Works on meta parameters; real ones are taken over as views, without a copy where the layout allows. Calling it
    again finds nothing to do. Routers are not touched.
    """
    names = [name for name, module in model.named_modules() if is_fused_experts(module)]
    for name in names:
        parent, _, leaf = name.rpartition(".")
        owner = model.get_submodule(parent)
        setattr(owner, leaf, LinearExperts(getattr(owner, leaf)))
    return names


def usual_expert_names(model: nn.Module) -> dict[str, str]:
    """By its name in `model`, what a layer of an expert is called where checkpoints do not say otherwise."""
    return {
        f"{prefix}.{name}": f"{prefix}.{usual}"
        for prefix, module in model.named_modules()
        if isinstance(module, LinearExperts)
        for name, usual in module.usual_names().items()
    }


def router_names(model: nn.Module) -> set[str]:
    """Names of the linear layers that choose experts or weigh shared ones.

    They lie right beside an `experts` module, or in a `router` or `gate` there, and have one output an expert or a
    single one. They are tiny, and an error in them sends tokens to other experts.
    """
    found: set[str] = set()
    for name, module in model.named_modules():
        experts = getattr(module, "experts", None)
        if not isinstance(experts, (LinearExperts, nn.ModuleList)):
            continue
        widths = (1, sum(1 for _ in experts.children()))
        for leaf, layer in module.named_modules():
            first, _, rest = leaf.partition(".")
            beside = not rest or first in ("router", "gate")
            if beside and is_linear(layer) and weight_2d(layer).shape[0] in widths:
                found.add(f"{name}.{leaf}" if name else leaf)
    return found


def other_fused_experts(model: nn.Module) -> list[str]:
    """Names of modules with 3-D expert weights that stay as they are, because their layout is not known."""
    return [
        name
        for name, module in model.named_modules()
        if "expert" in name.rpartition(".")[2].lower()
        and any(p.dim() == 3 for p in module.parameters(recurse=False))
        and not is_fused_experts(module)
    ]
