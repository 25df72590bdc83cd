"""Layers that runtimes compute as one matrix: they should share one scheme, or the runtime refuses the checkpoint.

Serving engines merge q, k and v, then gate and up, and all experts of a block into single tensors. Found by name
suffix, which is what those engines go by too.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable

FUSED_SUFFIXES: tuple[frozenset[str], ...] = (
    frozenset({"q_proj", "k_proj", "v_proj"}),
    frozenset({"query", "key", "value"}),
    frozenset({"wq", "wk", "wv"}),
    frozenset({"gate_proj", "up_proj"}),
    frozenset({"w1", "w3"}),
    frozenset({"in_proj_qkv", "in_proj_z"}),
    frozenset({"in_proj_a", "in_proj_b"}),
    frozenset({"q_a_proj", "kv_a_proj_with_mqa"}),
)
_EXPERT = re.compile(r"^(?P<parent>.*\bexperts)\.\d+\.(?P<leaf>[^.]+)$")


def fused_groups(names: Iterable[str], across_experts: bool = True) -> list[tuple[str, ...]]:
    """Groups of two or more of the linear layers `names` that runtimes fuse, each in the order given.

    The layers of one group have the same parent, such as `model.layers.0.self_attn.{q,k,v}_proj`. All gate and up
    projections of the experts of one block are one group, their down projections another; with `across_experts=False`
    each expert is by itself.
    """
    groups: dict[tuple[str, str], list[str]] = defaultdict(list)
    for name in names:
        expert = _EXPERT.match(name) if across_experts else None
        parent, leaf = (expert["parent"] + ".*", expert["leaf"]) if expert else _split(name)
        for suffixes in FUSED_SUFFIXES:
            if leaf in suffixes:
                groups[parent, min(suffixes)].append(name)
                break
        else:
            if expert:
                groups[parent, leaf].append(name)
    return [tuple(group) for group in groups.values() if len(group) > 1]


def is_routed_expert(name: str) -> bool:
    """Whether the linear layer `name` belongs to one of many experts; shared experts run for every token and do not."""
    return _EXPERT.match(name) is not None


def _split(name: str) -> tuple[str, str]:
    parent, _, leaf = name.rpartition(".")
    return parent, leaf
