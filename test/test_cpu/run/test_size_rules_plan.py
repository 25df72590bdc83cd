"""Layers that a format cannot pack, and layers that are left unquantized with them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def test_what_engines_join_stays_dense_together(make: Callable[..., Any], packable_folder: Callable[..., str]) -> None:
    """k and v have 64 outputs, q has 128: with groups of 128, none of the three is packed; o_proj, gate and up are."""
    folder = packable_folder(
        "llama", hidden_size=128, intermediate_size=256, num_attention_heads=4, num_key_value_heads=2
    )
    plan = make(folder, scheme="W4A16", group_size=128, iters=0).plan("auto_awq")
    kept = {name.rpartition(".")[2]: layer.reason for name, layer in plan.layers.items() if layer.reason}
    assert set(kept) >= {"q_proj", "k_proj", "v_proj"} and not {"o_proj", "gate_proj", "up_proj"} & set(kept)
    assert "which engines fuse with it" in kept["q_proj"] and "out_features=64" in kept["k_proj"]
    assert make(folder, scheme="W4A16", group_size=64, iters=0).plan("auto_awq").quantized().keys() >= {
        "model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.k_proj"
    }  # fmt: skip


def test_a_lost_fast_kernel_is_one_note(make: Callable[..., Any], packable_folder: Callable[..., str]) -> None:
    """Widths of 64 inputs are not for Marlin: the layers are quantized all the same."""
    job = make(packable_folder("llama"), scheme="W4A16", group_size=32, iters=0).plan("auto_gptq,auto_awq")
    assert len([note for note in job.notes if "Marlin" in note]) == 1 and len(job.quantized()) == 14
    wide = packable_folder("llama", hidden_size=128, intermediate_size=256)
    assert not any("Marlin" in note for note in make(wide, scheme="W4A16", group_size=32, iters=0).plan("mlx").notes)
