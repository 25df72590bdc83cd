"""Which layers of a model choose experts, or weigh their outputs: found by names, classes and widths.

An error in them sends tokens to other experts, and they are tiny. Names and shapes are enough, so that a model and the
tree made from its checkpoint's names give the same answer; classes find what a family calls otherwise.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from torch import nn

from auto_round.modeling.blocks import is_linear, weight_2d
from auto_round.modeling.experts import LinearExperts

_ROUTER = re.compile(r"(^|_)router(_|$)")  # a segment of a name: `router`, `modality_router`, `router_mlp`
_ROUTER_CLASS = re.compile(r"Router|TopKGat(e|ing)$|M[oO][eE]Gat(e|ing)$")
_GATE_CLASS = re.compile(r"Gat(e|ing)(V?\d+)?$")  # a router where it lies beside experts
_BESIDE = frozenset({"gate", "router", "gating", "wg"})  # names of routers that are only telling beside experts
# Directly beside experts, these are the projections of an MLP or an attention, however wide they are.
_MLP = re.compile(
    r"^(gate_proj|up_proj|down_proj|gate_up_proj|fc\d*|fc_in|fc_out|w\d|dense\w*|[qkvo]_proj|\w*output_linear|"
    r"\w*input_linear|c_fc|c_proj|per_layer_\w+|in_proj|out_proj)$"
)


def router_names(model: nn.Module) -> set[str]:
    """Names of the linear layers that choose experts or weigh shared ones, those of a router's MLP included."""
    modules = dict(model.named_modules())
    roots = set(_router_roots(modules))
    found = {name for name, module in modules.items() if is_linear(module) and _inside(name, roots)}
    return found | set(_by_width(modules))


def router_modules(model: nn.Module) -> set[str]:
    """Names of the modules that are routers as a whole, whatever they hold."""
    return set(_router_roots(dict(model.named_modules())))


def is_moe(module: nn.Module) -> bool:
    """Whether `module` holds the experts of a mixture directly."""
    return any(True for _ in _expert_counts(module))


def _router_roots(modules: dict[str, nn.Module]) -> Iterator[str]:
    for name, module in modules.items():
        parent, _, leaf = name.rpartition(".")
        if isinstance(module, (LinearExperts, nn.ModuleList)):
            continue
        if not name or next(module.parameters(), None) is None:
            continue
        kind = type(module).__name__
        beside = leaf in _BESIDE or _GATE_CLASS.search(kind)
        if _ROUTER.search(leaf) or _ROUTER_CLASS.search(kind) or (beside and is_moe(modules[parent])):
            yield name


def _by_width(modules: dict[str, nn.Module]) -> Iterator[str]:
    """Linear layers right beside experts with one output per expert, or a single one (gates of shared experts)."""
    for name, module in modules.items():
        widths = {1, *_expert_counts(module)}
        if widths == {1}:
            continue
        for leaf, layer in module.named_children():
            if is_linear(layer) and not _MLP.match(leaf) and weight_2d(layer).shape[0] in widths:
                yield f"{name}.{leaf}" if name else leaf


def _expert_counts(module: nn.Module) -> Iterator[int]:
    """How many experts each mixture directly under `module` has."""
    for leaf, child in module.named_children():
        if isinstance(child, LinearExperts):
            if child.layout.call in ("routed", "every", "sorted"):
                yield child.num_experts
        elif "expert" in leaf.lower() and "shared" not in leaf.lower():
            listed = sum(name.isdigit() for name, _ in child.named_children())
            stacked = [int(p.shape[0]) for p in child.parameters(recurse=False) if p.dim() == 3]
            yield from [listed] if listed else stacked[:1]


def _inside(name: str, roots: set[str]) -> bool:
    parts = name.split(".")
    return any(".".join(parts[: n + 1]) in roots for n in range(len(parts)))
