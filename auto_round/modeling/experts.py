"""Replace fused mixture-of-experts modules by linear layers with the same outputs.

Transformers 5 stores the experts of a block as 3-D parameters (`gate_up_proj` [E, 2I, H], `down_proj` [E, H, I]).
Quantizers, formats and runtimes work on linear layers, so `LinearExperts` replaces such a module.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce
from operator import attrgetter
from typing import Any, NamedTuple, Protocol

import torch
from torch import nn


class ExpertLayerNames(NamedTuple):
    """Names of the matrices of one expert."""

    gate: str
    up: str
    down: str


DEFAULT_EXPERT_NAMES = ExpertLayerNames("gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class ExpertPiece:
    """Location of a tensor of one expert inside a fused parameter (3-D for weights, 2-D for biases)."""

    param: str  # name of the fused parameter in its module, such as `gate_up_proj`
    expert: int
    part: str  # "gate" or "up" half of `gate_up_proj`, or "all"
    transposed: bool  # the fused weight is [in, out] per expert
    interleaved: bool  # gate and up rows alternate instead of being two halves
    rows: int = 0  # per expert, if the parameter is 2-D with the experts concatenated along rows

    def slot(self, whole: torch.Tensor) -> torch.Tensor:
        """A view of this expert's part of the fused parameter."""
        return whole[self.expert * self.rows : (self.expert + 1) * self.rows] if self.rows else whole[self.expert]

    def cut(self, one: torch.Tensor) -> torch.Tensor:
        """The piece [out, in] or [out] of this expert's fused tensor `one`; a view if the layout allows."""
        one = self._half(one)
        return (one.t() if one.dim() == 2 and self.transposed else one).contiguous()

    def paste(self, one: torch.Tensor, part: torch.Tensor) -> None:
        """The inverse of `cut`: write `part` [out, in] or [out] into this expert's fused tensor `one`, in place."""
        self._half(one).copy_(part.t() if part.dim() == 2 and self.transposed else part)

    def _half(self, one: torch.Tensor) -> torch.Tensor:
        if self.part == "all":
            return one
        axis, second = int(one.dim() == 2 and self.transposed), int(self.part == "up")
        if self.interleaved:
            return one[tuple([slice(None)] * axis + [slice(second, None, 2)])]
        return one.chunk(2, dim=axis)[second]


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
    """

    _original: Any

    def __init__(self, fused: FusedExperts) -> None:
        super().__init__()
        original, params = fused.module, fused.params
        self.layout, self.num_experts, self.has_gate = fused.layout, fused.number, bool(fused.layout.gate)
        self.hidden_dim, self.intermediate_dim = fused.hidden, fused.inner
        self.leaves = [DEFAULT_EXPERT_NAMES] * self.num_experts  # names of the layers of each expert
        self.fused_shapes = {name: tuple(p.shape) for name, p in params.items()}  # of the replaced parameters
        down = params[self.layout.down]
        for index in range(self.num_experts):
            self.add_module(str(index), self._expert(device="meta", dtype=down.dtype))
        for name, piece in self.pieces().items() if not down.is_meta else ():
            whole = params[piece.param]  # of which the linear layers get views
            owner, _, leaf = name.rpartition(".")
            part = nn.Parameter(piece.cut(piece.slot(whole.detach())), requires_grad=whole.requires_grad)
            self.get_submodule(owner)._parameters[leaf] = part
        self.train(original.training)
        for name in self.fused_shapes:
            owner, _, leaf = name.rpartition(".")
            del original.get_submodule(owner)._parameters[leaf]
        for name, child in original.named_children():
            if next(child.parameters(), None) is not None or next(child.buffers(), None) is not None:
                self.add_module(name, child)  # a norm, say: its tensors keep their names
        self.__dict__["_original"] = original  # not a child, or its name would appear in the module tree

    def __getitem__(self, index: int) -> nn.Module:
        """The layers of one expert."""
        if not 0 <= index < self.num_experts:
            raise IndexError(f"expert {index} of {self.num_experts} experts")
        return self.get_submodule(str(index))

    def _expert(self, **factory: Any) -> nn.Module:
        """The linear layers of one expert."""
        into, back = (self.hidden_dim, self.intermediate_dim), (self.intermediate_dim, self.hidden_dim)
        sizes = {"gate_proj": into, "up_proj": into, "down_proj": back}
        names = DEFAULT_EXPERT_NAMES if self.has_gate else DEFAULT_EXPERT_NAMES[1:]
        bias = bool(self.layout.bias)
        return nn.ModuleDict({name: nn.Linear(*sizes[name], bias=bias, **factory) for name in names})

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
        own = [name for index, leaves in enumerate(self.leaves) for name in self._layer_names(index, leaves)]
        usual = [n for index in range(self.num_experts) for n in self._layer_names(index, DEFAULT_EXPERT_NAMES)]
        return {name: default for name, default in zip(own, usual, strict=True) if name}

    def _layer_names(self, index: int, leaves: ExpertLayerNames) -> tuple[str, str, str]:
        """Names under this module of gate, up and down of an expert; "" for none."""
        return f"{index}.{leaves.gate}" if self.has_gate else "", f"{index}.{leaves.up}", f"{index}.{leaves.down}"

    def pieces(self) -> dict[str, ExpertPiece]:
        """For every parameter name under this module, its location in the fused parameters."""
        layout = self.layout
        halves = ("gate", "up") if layout.gate == layout.up else ("all", "all")
        projections = (
            (layout.gate, halves[0], layout.transposed),
            (layout.up, halves[1], layout.transposed),
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
        own: Any = getattr(self._original, "_apply_gate", None)
        if gate is None:
            return attrgetter(self.layout.act)(self._original)(up)
        if own is None or own.__name__ == "_default_apply_gate":
            return attrgetter(self.layout.act)(self._original)(gate) * up
        joined = torch.stack((gate, up), dim=-1).flatten(-2) if self.layout.interleaved else torch.cat((gate, up), -1)
        return own(joined)

    def finish(self, results: torch.Tensor) -> torch.Tensor:
        """The output of an expert, [rows, H], from the output of its down projection."""
        has_norm = getattr(self._original, "has_post_expert_norm", False)
        return self._original.post_expert_norm(results) if has_norm else results

    def extra_repr(self) -> str:
        return f"experts={self.num_experts}, hidden={self.hidden_dim}, intermediate={self.intermediate_dim}"


class RoutedExperts(LinearExperts):
    """Experts that are called with the tokens, the experts chosen for each and their weights."""

    batched: BatchedExperts | None = None  # runs all experts in one call when no gradient is needed

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """[tokens, H] from hidden_states [tokens, H], top_k_index int64 [tokens, K] and top_k_weights [tokens, K].

        An index of `num_experts` or above means "none" and adds nothing (the token itself if the layout says so). The K
        results of a token are summed in a fixed order, so that the result does not depend on the order of the experts.
        """
        shape, hidden_states = hidden_states.shape, hidden_states.reshape(-1, hidden_states.shape[-1])
        tokens, slots = top_k_index.shape
        chosen, order = torch.sort(top_k_index.reshape(-1), stable=True)
        rows = order // slots
        batchable = hidden_states.numel() > 0 and not (hidden_states.requires_grad and torch.is_grad_enabled())
        if batchable and self.batched and not torch.compiler.is_compiling() and not self.batched.is_valid():
            self.batched = None
        if batchable and self.batched is not None:
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
        parts: list[torch.Tensor] = []
        for index, (gate, up, down) in enumerate(self.leaves):
            expert = self.get_submodule(str(index))
            inner = self.combine(getattr(expert, gate)(hidden_states), getattr(expert, up)(hidden_states))
            parts.append(getattr(expert, down)(inner * gammas[..., index, None]).float())
        return reduce(torch.add, parts).to(hidden_states.dtype)


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


@dataclass(frozen=True)
class ExpertLayout:
    """Names and layout of the fused parameters of an experts module, and its call signature."""

    # Parameter of each projection; gate and up have the same name if joined (gate first). "" for a missing gate; with
    # `up` "" the module is one projection per expert.
    gate: str = "gate_up_proj"
    up: str = "gate_up_proj"
    down: str = "down_proj"
    transposed: bool = False  # weights of gate and up are [in, out] per expert
    down_transposed: bool = False
    interleaved: bool = False  # joined gate and up alternate row by row
    flat: bool = False  # parameters are 2-D with the experts concatenated along rows
    bias: str = ""  # suffix of the names of biases, "" if there are none
    act: str = "act_fn"  # dotted attribute with the activation function
    kind: type[LinearExperts] = RoutedExperts  # the class that has the same signature
    identity: bool = False  # experts beyond the last return their input (LongCat's zero-computation experts)

    @property
    def weights(self) -> tuple[str, ...]:
        """Names of the weight parameters, each once."""
        return tuple(dict.fromkeys(name for name in (self.gate, self.up, self.down) if name))


# Classes of Transformers 5.24 that declare no layout. `fused_experts` detects a class that another version changed.
UNDECLARED: dict[str, ExpertLayout] = {
    "Llama4TextExperts": ExpertLayout(transposed=True, down_transposed=True, kind=EveryTokenExperts),
    "LongcatFlashExperts": ExpertLayout(identity=True),
    "Step3p7Experts": ExpertLayout(),
    "DbrxExperts": ExpertLayout("mlp.w1", "mlp.v1", "mlp.w2", down_transposed=True, flat=True, act="mlp.activation_fn"),
    "InklingSharedExperts": ExpertLayout("gate_proj", "up_proj", "down_proj", kind=SharedExperts),
    "JetMoeParallelExperts": ExpertLayout("", "", "weight", kind=ExpertProjection),
}


class FusedExperts(NamedTuple):
    """A module with fused parameters of a known layout: `inner` is the input width of down, `hidden` its output."""

    module: nn.Module
    layout: ExpertLayout
    params: dict[str, nn.Parameter]
    number: int
    hidden: int
    inner: int


def fused_experts(module: nn.Module) -> FusedExperts | None:
    """Measure a fused experts module; None if `module` is not one, or its layout is unknown.

    Its parameters must be exactly those of the layout, with consistent sizes: a further one, or a persistent buffer (a
    scale per expert, say), would be part of its computation.
    """
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
    if layout is None:
        return None
    params = dict(module.named_parameters(recurse=False))
    params |= {n: p for n, p in module.named_parameters() if n not in params and p.dim() > 1}
    names = {name + suffix for name in layout.weights for suffix in ("", layout.bias)}
    if set(params) != names or set(module._buffers) - module._non_persistent_buffers_set:
        return None
    down = params[layout.down]
    if any(params[name].dim() != (2 if layout.flat else 3) for name in layout.weights) or down.numel() == 0:
        return None
    count = int(getattr(module, "num_experts", 0) or 0) if layout.flat else down.shape[0]
    if count < 1 or (layout.flat and down.shape[0] % count):
        return None
    rows, columns = down.shape[0] // count if layout.flat else down.shape[1], down.shape[-1]
    hidden, inner = (columns, rows) if layout.down_transposed else (rows, columns)
    for name in layout.weights:
        is_down = name == layout.down
        out, wide = (hidden, inner) if is_down else (inner * (2 if name == layout.gate == layout.up else 1), hidden)
        one = (wide, out) if (layout.down_transposed if is_down else layout.transposed) else (out, wide)
        wanted = {name: (count * one[0], one[1]) if layout.flat else (count, *one)}
        if layout.bias:
            wanted[name + layout.bias] = (count, out)
        for param, shape in wanted.items():
            given = tuple(params[param].shape)
            # Identity experts have unused rows.
            if given != shape and not (layout.identity and given[1:] == shape[1:] and given[0] >= shape[0]):
                return None
    return FusedExperts(module, layout, params, count, hidden, inner)


def is_fused_experts(module: nn.Module) -> bool:
    """Whether `module` is a fused experts module of a known layout."""
    return fused_experts(module) is not None


def unfuse_experts(model: nn.Module) -> list[str]:
    """Replace every fused experts module under `model` by `LinearExperts`, in place; returns their names.

    Works on meta parameters; real ones become views, without a copy if the layout allows.
    """
    names = [name for name, module in model.named_modules() if is_fused_experts(module)]
    for name in names:
        parent, _, leaf = name.rpartition(".")
        fused = fused_experts(model.get_submodule(name))  # again, or the parameters of all would stay in memory
        assert fused is not None
        setattr(model.get_submodule(parent), leaf, fused.layout.kind(fused))
    return names


def default_expert_names(model: nn.Module) -> dict[str, str]:
    """By the name in `model` of every expert layer, its default name in checkpoints."""
    return {
        f"{prefix}.{name}": f"{prefix}.{default}"
        for prefix, module in model.named_modules()
        if isinstance(module, LinearExperts)
        for name, default in module.default_names().items()
    }
