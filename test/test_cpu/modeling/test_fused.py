from __future__ import annotations

from auto_round.modeling.layer_rules import fused_groups


def test_groups_by_parent_and_suffix() -> None:
    layer = "model.layers.0"
    names = [f"{layer}.self_attn.{p}_proj" for p in "qkvo"] + [f"{layer}.mlp.{p}_proj" for p in ("gate", "up", "down")]
    assert fused_groups(names) == [tuple(names[:3]), tuple(names[4:6])]


def test_experts_of_a_block_are_one_tensor_per_side() -> None:
    names = [f"l.0.mlp.experts.{e}.{p}_proj" for e in range(3) for p in ("gate", "up", "down")]
    names += ["l.0.mlp.shared_expert.gate_proj", "l.0.mlp.shared_expert.up_proj", "l.1.mlp.experts.0.down_proj"]
    first, second, shared = fused_groups(names)
    assert first == tuple(n for n in names[:9] if "down" not in n)
    assert second == tuple(n for n in names[:9] if "down" in n)
    assert shared == tuple(names[9:11]), "a lone layer is no group"


def test_layers_of_different_blocks_do_not_meet() -> None:
    assert fused_groups(["l.0.q_proj", "l.1.k_proj", "fc1", "fc2"]) == []


def test_each_expert_by_itself() -> None:
    experts = [f"mlp.experts.{i}.{leaf}" for i in range(2) for leaf in ("gate_proj", "up_proj", "down_proj")]
    assert fused_groups(experts, across_experts=False) == [tuple(experts[:2]), tuple(experts[3:5])]
    assert len(fused_groups(experts)) == 2
