"""Replace fused mixture-of-experts modules by linear layers with the same outputs.

Transformers 5 stores the experts of a block as 3-D parameters (`gate_up_proj` [E, 2I, H], `down_proj` [E, H,
I]). Quantizers, formats and runtimes work on linear layers, so such a module is replaced by `LinearExperts`,
whose children "0", "1", ... each hold `gate_proj`, `up_proj` and `down_proj`, and whose outputs and signature
are the same.
"""

from __future__ import annotations

from operator import attrgetter
from typing import Any, Protocol

import torch
from torch import nn

from auto_round.modeling.conversions import DEFAULT_EXPERT_NAMES, ExpertLayerNames
from auto_round.modeling.expert_layouts import ExpertPiece, expert_count, expert_layout, expert_sizes, fused_params


class ExpertMLP(nn.Module):
    """The linear layers of one expert, run by `LinearExperts`."""

    def __init__(self, hidden: int, intermediate: int, *, gate: bool, bias: bool, **factory: Any) -> None:
        super().__init__()
        if gate:
            self.gate_proj = nn.Linear(hidden, intermediate, bias=bias, **factory)
        self.up_proj = nn.Linear(hidden, intermediate, bias=bias, **factory)
        self.down_proj = nn.Linear(intermediate, hidden, bias=bias, **factory)


class BatchedExperts(Protocol):
    """Runs the layers of all experts in one call."""

    def is_valid(self) -> bool:
        """Whether it still computes what the layers would."""

    def __call__(self, x: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
        """x [rows, H] sorted by `chosen`, int64 [rows] -> [rows, H]; zeros if `chosen` is not an expert."""


class LinearExperts(nn.Module):
    """Experts as linear layers, children "0", "1", ..., that replace a module with fused parameters.

    Subclasses have the signature and the outputs of the replaced module. Its class decides how gate and up are
    combined, so the module is kept, without its parameters.

    Attributes:
        layout: how the replaced module stored its experts.
        fused_shapes: shapes of the parameters that this module replaces, by name.
        leaves: names of the layers of each expert.
    """

    _original: Any

    def __init__(self, fused: nn.Module) -> None:
        super().__init__()
        layout = expert_layout(fused)
        assert layout is not None
        params = fused_params(fused)
        self.layout, self.num_experts = layout, expert_count(fused, layout)
        self.has_gate = bool(layout.gate)
        self.leaves = [DEFAULT_EXPERT_NAMES] * self.num_experts
        self.hidden_dim, self.intermediate_dim = expert_sizes(fused, layout)
        self.fused_shapes = {name: tuple(p.shape) for name, p in params.items()}
        down = params[layout.down]
        for index in range(self.num_experts):
            self.add_module(str(index), self._expert(device="meta", dtype=down.dtype))
        for name, piece in self.pieces().items() if not down.is_meta else ():
            whole = params[piece.param]  # of which the linear layers get views
            owner, _, leaf = name.rpartition(".")
            part = nn.Parameter(piece.cut(piece.slot(whole.detach())), requires_grad=whole.requires_grad)
            self.get_submodule(owner)._parameters[leaf] = part
        self.train(fused.training)
        for name in self.fused_shapes:
            owner, _, leaf = name.rpartition(".")
            del fused.get_submodule(owner)._parameters[leaf]
        for name, child in fused.named_children():
            if next(child.parameters(), None) is not None or next(child.buffers(), None) is not None:
                self.add_module(name, child)  # a norm, say: its tensors keep their names
        self.__dict__["_original"] = fused  # not a child, or its name would appear in the module tree

    def __getitem__(self, index: int) -> nn.Module:
        """The layers of one expert."""
        if not 0 <= index < self.num_experts:
            raise IndexError(f"expert {index} of {self.num_experts} experts")
        return self.get_submodule(str(index))

    def _expert(self, **factory: Any) -> nn.Module:
        bias = bool(self.layout.bias)
        return ExpertMLP(self.hidden_dim, self.intermediate_dim, gate=self.has_gate, bias=bias, **factory)

    def rename_layers(self, index: int, leaves: ExpertLayerNames) -> None:
        """Give the linear layers of an expert the names that a checkpoint has for them."""
        expert = self.get_submodule(str(index))
        layers = [expert._modules.pop(old, None) for old in self.leaves[index]]
        for name, layer in zip(leaves, layers, strict=True):
            if layer is not None:
                expert.add_module(name, layer)
        self.leaves[index] = leaves

    def default_names(self) -> dict[str, str]:
        """By the current name of every linear layer under this module, its default name."""
        found: dict[str, str] = {}
        for index, leaves in enumerate(self.leaves):
            names = zip(self._layer_names(index, leaves), self._layer_names(index, DEFAULT_EXPERT_NAMES), strict=True)
            found |= {name: default for name, default in names if name}
        return found

    def _layer_names(self, index: int, leaves: ExpertLayerNames) -> tuple[str, str, str]:
        """Names under this module of gate, up and down of an expert; "" if it has no such layer."""
        return f"{index}.{leaves.gate}" if self.has_gate else "", f"{index}.{leaves.up}", f"{index}.{leaves.down}"

    def pieces(self) -> dict[str, ExpertPiece]:
        """For every parameter name under this module, its location in the fused parameters."""
        layout = self.layout
        joined = layout.gate == layout.up
        projections = (
            (layout.gate, "gate" if joined else "all", layout.transposed),
            (layout.up, "up" if joined else "all", layout.transposed),
            (layout.down, "all", layout.down_transposed),
        )
        suffixes = {"weight": "", "bias": layout.bias} if layout.bias else {"weight": ""}
        found: dict[str, ExpertPiece] = {}
        for index, leaves in enumerate(self.leaves):
            for layer, (param, part, transposed) in zip(self._layer_names(index, leaves), projections, strict=True):
                for leaf, suffix in suffixes.items() if layer and param else ():
                    rows = self.fused_shapes[param][0] // self.num_experts if layout.flat else 0
                    piece = ExpertPiece(param + suffix, index, part, transposed, layout.interleaved, rows)
                    found[f"{layer}.{leaf}"] = piece
        return found

    def run_expert(self, index: int, hidden: torch.Tensor) -> torch.Tensor:
        """Run one expert on its tokens, [rows, H] to [rows, H], without the routing weights."""
        gate, up, down = self.leaves[index]
        expert = self.get_submodule(str(index))
        up_states = getattr(expert, up)(hidden)
        inner = self.combine(getattr(expert, gate)(hidden) if self.has_gate else None, up_states)
        return self.finish(getattr(expert, down)(inner))

    def combine(self, gate: torch.Tensor | None, up: torch.Tensor) -> torch.Tensor:
        """Combine gate (None if the family has none) and up, [rows, I], to the input of the down projection."""
        activation = attrgetter(self.layout.act)
        own: Any = getattr(self._original, "_apply_gate", None)
        made: torch.Tensor
        if gate is None:
            made = activation(self._original)(up)
        elif own is None or own.__name__ == "_default_apply_gate":
            made = activation(self._original)(gate) * up
        elif self.layout.interleaved:
            made = own(torch.stack((gate, up), dim=-1).flatten(-2))
        else:
            made = own(torch.cat((gate, up), dim=-1))
        return made

    def finish(self, results: torch.Tensor) -> torch.Tensor:
        """The output of an expert, [rows, H], from the output of its down projection."""
        if not getattr(self._original, "has_post_expert_norm", False):
            return results
        normed: torch.Tensor = self._original.post_expert_norm(results)
        return normed

    def extra_repr(self) -> str:
        return f"experts={self.num_experts}, hidden={self.hidden_dim}, intermediate={self.intermediate_dim}"


class RoutedExperts(LinearExperts):
    """Experts that are called with the tokens, the experts chosen for each and their weights.

    Attributes:
        batched: runs all experts in one call when no gradient is needed; None runs their layers expert by expert.
    """

    batched: BatchedExperts | None = None

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """[tokens, H] from hidden_states [tokens, H], top_k_index int64 [tokens, K] and top_k_weights [tokens, K].

        Only experts with tokens run. An index of `num_experts` or above means "none" and adds nothing (the token itself
        if the layout says so). The K results of a token are summed in a fixed order, so that the result does not depend
        on the order of the experts.
        """
        shape, hidden_states = hidden_states.shape, hidden_states.reshape(-1, hidden_states.shape[-1])
        tokens, slots = top_k_index.shape
        chosen, order = torch.sort(top_k_index.reshape(-1), stable=True)
        rows = order // slots
        if self._runs_batched(hidden_states):
            assert self.batched is not None
            results = self.finish(self.batched(hidden_states[rows], chosen))
        else:
            counts = torch.bincount(chosen.clamp(max=self.num_experts), minlength=self.num_experts + 1).tolist()
            parts = zip(range(self.num_experts), rows.split(counts), strict=False)
            outputs = [self.run_expert(index, hidden_states[part]) for index, part in parts if len(part)]
            if not outputs and not self.layout.identity:
                return torch.zeros_like(hidden_states).view(shape)
            outputs.append((outputs[0] if outputs else hidden_states).new_zeros(counts[-1], hidden_states.shape[-1]))
            results = torch.cat(outputs)
        if self.layout.identity:
            results = torch.where((chosen >= self.num_experts)[:, None], hidden_states[rows].to(results.dtype), results)
        back = torch.empty_like(order)
        back[order] = torch.arange(order.numel(), device=order.device)
        joined = results[back].view(tokens, slots, -1)
        return (joined * top_k_weights.unsqueeze(-1)).sum(dim=1).to(hidden_states.dtype).view(shape)

    def _runs_batched(self, hidden: torch.Tensor) -> bool:
        if self.batched is None or hidden.numel() == 0 or (hidden.requires_grad and torch.is_grad_enabled()):
            return False
        if not torch.compiler.is_compiling() and not self.batched.is_valid():
            self.batched = None
        return self.batched is not None


class EveryTokenExperts(LinearExperts):
    """Experts that are called with the hidden states of all experts concatenated along rows (Llama 4)."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """[experts * tokens, H] from the same shape."""
        parts = hidden_states.reshape(self.num_experts, -1, self.hidden_dim)
        return torch.cat([self.run_expert(index, part) for index, part in enumerate(parts)])


class SharedExperts(LinearExperts):
    """Experts that all process every token, each with a factor for its inner activations (Inkling)."""

    def forward(self, hidden_states: torch.Tensor, gammas: torch.Tensor) -> torch.Tensor:
        """[..., H] from hidden_states [..., H] and gammas, one factor per token and expert."""
        gammas = gammas.reshape(*hidden_states.shape[:-1], self.num_experts)
        total: torch.Tensor | None = None
        for index, (gate, up, down) in enumerate(self.leaves):
            expert = self.get_submodule(str(index))
            inner = self.combine(getattr(expert, gate)(hidden_states), getattr(expert, up)(hidden_states))
            part = getattr(expert, down)(inner * gammas[..., index, None]).float()
            total = part if total is None else total + part
        assert total is not None
        return total.to(hidden_states.dtype)


class ExpertProjection(LinearExperts):
    """One linear layer per expert, called with tokens sorted by expert (JetMoE)."""

    def _expert(self, **factory: Any) -> nn.Module:
        return nn.Linear(self.intermediate_dim, self.hidden_dim, bias=bool(self.layout.bias), **factory)

    def _layer_names(self, index: int, leaves: ExpertLayerNames) -> tuple[str, str, str]:
        return "", "", str(index)

    def forward(self, inputs: torch.Tensor, expert_size: list[int]) -> torch.Tensor:
        """[rows, out] from inputs [rows, in]; `expert_size`: number of rows of each expert."""
        parts = inputs.split(expert_size, dim=0)
        return torch.cat([self.get_submodule(str(index))(part) for index, part in enumerate(parts)])


_CALLS: dict[str, type[LinearExperts]] = {
    "routed": RoutedExperts, "every": EveryTokenExperts, "shared": SharedExperts, "sorted": ExpertProjection,
}  # fmt: skip


def is_fused_experts(module: nn.Module) -> bool:
    """Whether `module` is a fused experts module of a known layout."""
    return not isinstance(module, LinearExperts) and expert_layout(module) is not None


def unfuse_experts(model: nn.Module) -> list[str]:
    """Replace every fused experts module under `model` by `LinearExperts`, in place; returns their names.

    Works on meta parameters; real ones become views, without a copy if the layout allows. A second call finds none.
    Routers are not changed.
    """
    found = {name: module for name, module in model.named_modules() if is_fused_experts(module)}
    for name, module in found.items():
        parent, _, leaf = name.rpartition(".")
        layout = expert_layout(module)
        assert layout is not None
        setattr(model.get_submodule(parent), leaf, _CALLS[layout.call](module))
    return list(found)


def default_expert_names(model: nn.Module) -> dict[str, str]:
    """By the name in `model` of every expert layer, its default name in checkpoints."""
    return {
        f"{prefix}.{name}": f"{prefix}.{default}"
        for prefix, module in model.named_modules()
        if isinstance(module, LinearExperts)
        for name, default in module.default_names().items()
    }
