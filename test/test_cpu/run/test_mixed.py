"""W4A16_MIXED: routed experts 4 bits, everything else 8; and the warning about layers that runtimes join."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from auto_round.errors import UnsupportedError
from auto_round.run.plan import LayerRules
from auto_round.schemes import MIXED_PRESETS, PRESET_SCHEMES, QuantizationScheme, mixed_preset

NAMES = ["l.0.self_attn.q_proj", "l.0.mlp.experts.3.up_proj", "l.0.mlp.shared_expert.up_proj", "lm_head"]


def bits(ar: Any, fmt: str = "auto_round") -> dict[str, int]:
    return {name: plan.scheme.bits for name, plan in ar.plan(fmt).layers.items()}


def test_the_mixture_is_data() -> None:
    assert set(MIXED_PRESETS) <= set(PRESET_SCHEMES)
    assert mixed_preset("w4a16-mixed") is MIXED_PRESETS["W4A16_MIXED"]
    assert mixed_preset("W4A16") is None and mixed_preset(QuantizationScheme()) is None and mixed_preset({}) is None


def test_which_layer_gets_what() -> None:
    mixed, scheme, text = MIXED_PRESETS["W4A16_MIXED"], PRESET_SCHEMES["W4A16_MIXED"], SimpleNamespace()

    def defaults(mixed: Any, config: Any) -> dict[str, QuantizationScheme]:
        settings: Any = SimpleNamespace(mixed=mixed, scheme=scheme, layer_config={}, quant_lm_head=False)
        source: Any = SimpleNamespace(config=config)
        return LayerRules(settings, source).defaults(NAMES)

    found = defaults(mixed, text)
    assert {name: s.bits for name, s in found.items()} == {n: 8 for n in NAMES if "experts.3" not in n}
    assert all(s.with_overrides({"bits": 4}) == scheme for s in found.values())
    seeing = SimpleNamespace(vision_config=SimpleNamespace())
    assert {s.bits for s in defaults(mixed, seeing).values()} == {16}
    assert defaults(None, text) == {}


@pytest.mark.parametrize("family", ["qwen3-moe", "qwen2-moe", "mixtral", "gpt-oss"])
def test_experts_4_others_8(family: str, make: Callable[..., Any], logits: Any, tmp_path: Path, read_json: Any) -> None:
    ar = make(family, scheme="W4A16_MIXED", iters=0)
    found = bits(ar)
    assert {b for n, b in found.items() if ".experts." in n} == {4}
    assert {b for n, b in found.items() if "self_attn" in n or "shared_expert." in n} == {8}
    assert found["lm_head"] == 16
    _, folders = ar.quantize_and_save(tmp_path / "out", "auto_round,auto_round:auto_gptq,auto_round:mlx,fake")
    for folder in folders[:3]:
        assert float((logits(folder) - logits(folders[3])).norm() / logits(folders[3]).norm()) < 1e-5
    config = read_json(folders[0], "config.json")["quantization_config"]
    assert config["bits"] == 4 and config["extra_config"]["model.layers.0.self_attn.q_proj"] == {"bits": 8}
    report = read_json(folders[0], "report.json")
    assert report["job"]["scheme"] == "W4A16_MIXED"


def test_a_dense_model_gets_8_bits_and_a_note(make: Callable[..., Any], tmp_path: Path, read_json: Any) -> None:
    ar = make("llama", scheme="W4A16_MIXED", iters=0, quant_lm_head=True)
    assert set(bits(ar).values()) == {8}
    assert any("gives routed experts 4 bits, and this model has none" in note for note in ar.plan("auto_round").notes)
    ar.quantize_and_save(tmp_path / "out")
    assert read_json(tmp_path / "out", "quantization_config.json")["bits"] == 8


def test_the_users_own_layers_and_fields_come_first(make: Callable[..., Any]) -> None:
    config = {"k_proj": {"group_size": 64}, "v_proj": 3, "experts.1.": {"sym": False}, "lm_head": {"sym": False}}
    ar = make("qwen3-moe", scheme="W4A16_MIXED", bits=2, layer_config=config, ignore_layers="o_proj")
    plan = {name: layer.scheme.describe() for name, layer in ar.plan("auto_round").layers.items()}
    layer = "model.layers.0"
    assert plan[f"{layer}.self_attn.q_proj"] == "int8 g32 sym"
    assert plan[f"{layer}.self_attn.k_proj"] == "int8 g64 sym"
    assert plan[f"{layer}.self_attn.v_proj"] == "int3 g32 sym"
    assert plan[f"{layer}.self_attn.o_proj"] == "full precision"
    assert plan[f"{layer}.mlp.experts.0.up_proj"] == "int2 g32 sym"
    assert plan[f"{layer}.mlp.experts.1.up_proj"] == "int2 g32 asym"
    assert plan["lm_head"] == "int8 g32 asym"


def test_a_format_with_4_bits_only_is_refused(make: Callable[..., Any], tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="layer .*self_attn.q_proj.*4-bit weights, not 8.*formats that can"):
        make("qwen3-moe", scheme="W4A16_MIXED", iters=0).quantize_and_save(tmp_path / "out", "auto_round:auto_awq")


FUSED = {"layer_config": {"k_proj": {"bits": 8}}}


@pytest.mark.parametrize(("formats", "warned"), [
    ("auto_round", True), ("auto_round:auto_gptq", True), ("mlx", False), ("auto_round:mlx", False), ("fake", False),
    ("mlx,auto_round", True),
])  # fmt: skip
def test_joined_layers_are_reported_for_the_formats_whose_readers_join_them(
    formats: str, warned: bool, make: Callable[..., Any]
) -> None:
    notes = [n for n in make("llama", iters=0, **FUSED).plan(formats).notes if "fused" in n]
    assert bool(notes) == warned
    for note in notes:
        assert "q_proj and 2 more are fused by vLLM and SGLang" in note and "int4 g32 sym, int8 g32 sym" in note
        assert note.endswith("will refuse the files of auto_round" + (":auto_gptq" if ":auto_gptq" in formats else ""))


def test_one_scheme_for_what_is_joined_is_not_reported(make: Callable[..., Any]) -> None:
    ar = make("qwen3-moe", iters=0, layer_config={"self_attn": {"bits": 8}, "down_proj": {"bits": 3}})
    assert not any("fused" in note for note in ar.plan("auto_round").notes)
    ar = make("qwen3-moe", iters=0, layer_config={r"experts\.2\.up_proj": {"bits": 8}})
    assert any("mlp.experts.0.gate_proj and 7 more are fused" in note for note in ar.plan("auto_round").notes)


def test_routers_and_shared_gates_are_left_alone(make: Callable[..., Any]) -> None:
    job = make("qwen2-moe", iters=0, scheme="W8A16", layer_config={"mlp": {"bits": 4}}).plan("fake")
    gates = {n: layer for n, layer in job.layers.items() if n.endswith("shared_expert_gate")}
    assert gates and all(g.scheme.bits == 16 and g.reason == "it chooses experts" for g in gates.values())
    assert not any("shared_expert_gate" in note for note in job.notes)
