"""Names, rows and metadata of every family, against what llama.cpp's own converter made of the same tiny models.

`data/gguf_families.json` is recorded by `tools/referee_gguf.py --record`.
"""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from auto_round.errors import ModelError, UnsupportedError
from auto_round.gguf.conversion import Conversion, conversion_for
from auto_round.gguf.families.layer_norm import qkv_rows
from auto_round.gguf.families.shared import rotary_rows
from auto_round.gguf.family import FAMILIES
from auto_round.gguf.file_types import quantizable
from auto_round.gguf.metadata import general_metadata, size_label
from auto_round.modeling.blocks import is_conv1d
from auto_round.modeling.experts import unfuse_experts

gguf = pytest.importorskip("gguf")
ROOT = Path(__file__).resolve().parents[3]
EXPECTED: dict[str, Any] = json.loads((Path(__file__).parent / "data" / "gguf_families.json").read_text())
MOE = ("mixtral", "qwen2-moe", "qwen3-moe", "granite-moe", "deepseek-v3")


# Older Transformers build other models from the same settings and seed (or cannot build them), so that what was written
# down for these does not hold there.
NEWER = ("granite-moe", "granite-moe-shared", "olmo3", "phi3-long")


def newer_only(name: str) -> None:
    import transformers
    from packaging.version import Version

    if name in NEWER and Version(transformers.__version__) < Version("5.21"):
        pytest.skip(f"Transformers {transformers.__version__} builds another {name}")


@pytest.fixture(scope="module")
def referee() -> Any:
    """(tools/referee_gguf.py, tools/referee_gguf_models.py)"""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "tools"))
        yield importlib.import_module("referee_gguf"), importlib.import_module("referee_gguf_models")


def converted(model: torch.nn.Module, assemble: Any) -> tuple[Conversion, dict[str, np.ndarray]]:
    """The conversion of a model in memory, by its own names, and the file's tensors."""
    sources = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    conv1d = {f"{name}.weight" for name, module in model.named_modules() if is_conv1d(module)}
    shapes = {n: tuple(reversed(t.shape)) if n in conv1d else tuple(t.shape) for n, t in sources.items()}
    conversion = conversion_for(model.config, shapes)
    return conversion, assemble(conversion, sources, conv1d)


@pytest.mark.parametrize("name", sorted(EXPECTED))
def test_a_family_is_converted_as_llama_cpp_does(name: str, referee: Any) -> None:
    newer_only(name)
    tool, models = referee
    model = models.build(name)
    unfuse_experts(model)
    conversion, tensors = converted(model, tool.assemble)
    assert {n: tool.digest(a) for n, a in tensors.items()} == EXPECTED[name]["tensors"]
    ours = {key: value for key, value, *_ in conversion.metadata()}
    theirs = {k: v for k, v in EXPECTED[name]["metadata"].items() if k.startswith(f"{conversion.arch}.")}
    assert ours.keys() == theirs.keys()
    for key, value in theirs.items():
        assert ours[key] == (pytest.approx(value, rel=1e-6) if isinstance(value, float) else value), key


@pytest.mark.parametrize("name", MOE)
def test_fused_experts_are_the_same_experts(name: str, referee: Any) -> None:
    newer_only(name)
    tool, models = referee
    _, tensors = converted(models.build(name), tool.assemble)
    assert {n: tool.digest(a) for n, a in tensors.items()} == EXPECTED[name]["tensors"]


def test_every_family_is_compared(referee: Any) -> None:
    compared = {kind for kind, _, _ in referee[1].MODELS.values()}
    older = {"RefinedWeb", "RefinedWebModel", "stablelm_epoch"}  # names that Transformers no longer has
    assert compared == set(FAMILIES) - older
    assert set(EXPECTED) == set(referee[1].MODELS)


def settings(**values: Any) -> dict[str, Any]:
    return dict(
        model_type="llama", hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=32, vocab_size=96, max_position_embeddings=128, rms_norm_eps=1e-5, hidden_act="silu",
    ) | values  # fmt: skip


def places(model_type: str, name: str, **values: Any) -> list[tuple[str, int | None]]:
    conversion = conversion_for(settings(model_type=model_type, **values))
    return [(p.tensor, p.slot) for p in conversion.place(name)]


@pytest.mark.parametrize(
    ("model_type", "name", "expected"),
    [
        ("mixtral", "model.layers.1.block_sparse_moe.experts.3.w1.weight", [("blk.1.ffn_gate_exps.weight", 3)]),
        ("mixtral", "model.layers.1.mlp.experts.3.gate_proj.weight", [("blk.1.ffn_gate_exps.weight", 3)]),
        ("mixtral", "model.layers.0.block_sparse_moe.experts.0.w2.weight", [("blk.0.ffn_down_exps.weight", 0)]),
        ("mixtral", "model.layers.0.block_sparse_moe.experts.0.w3.weight", [("blk.0.ffn_up_exps.weight", 0)]),
        ("mixtral", "model.layers.0.block_sparse_moe.gate.weight", [("blk.0.ffn_gate_inp.weight", None)]),
        ("granitemoe", "model.layers.0.block_sparse_moe.router.layer.weight", [("blk.0.ffn_gate_inp.weight", None)]),
        ("granitemoe", "model.layers.0.block_sparse_moe.router.weight", [("blk.0.ffn_gate_inp.weight", None)]),
        ("granitemoe", "model.layers.0.block_sparse_moe.output_linear.weight", [("blk.0.ffn_down_exps.weight", None)]),
        ("llama", "model.layers.0.self_attn.rotary_emb.inv_freq", []),
        ("llama", "model.layers.2.mlp.up_proj.weight", []),
        ("llama", "lm_head.weight", [("output.weight", None)]),
    ],
)
def test_names_of_checkpoints_and_modules(model_type: str, name: str, expected: list[Any]) -> None:
    assert places(model_type, name) == expected


def test_a_tied_head_is_left_out() -> None:
    assert places("llama", "lm_head.weight", tie_word_embeddings=True) == []


@given(st.integers(1, 6), st.integers(1, 6))
def test_rotary_rows_undo_the_halves(heads: int, half: int) -> None:
    """llama.cpp's pair (2j, 2j + 1) of a head is Transformers' (j, j + half)."""
    rows = rotary_rows(heads * 2 * half, heads).reshape(heads, half, 2)
    for head in range(heads):
        for j in range(half):
            assert rows[head, j].tolist() == [head * 2 * half + j, head * 2 * half + j + half]


@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 5))
def test_falcon_rows_collect_queries_keys_and_values(groups: int, queries: int, width: int) -> None:
    labels = [
        ("qkv".index(part), group, head, i)
        for group in range(groups)
        for part, heads in (("q", queries), ("k", 1), ("v", 1))
        for head in range(heads)
        for i in range(width)
    ]
    got = [labels[row] for row in qkv_rows(groups * queries, groups, width)]
    assert got == sorted(labels)


def test_old_and_new_rotary_settings_say_the_same() -> None:
    new = {"rope_type": "linear", "factor": 4.0, "rope_theta": 5e5}
    old = dict(rope_theta=5e5, rope_scaling={"type": "linear", "factor": 4.0})
    assert conversion_for(settings(rope_parameters=new)).metadata() == conversion_for(settings(**old)).metadata()
    keys = {key: value for key, value, *_ in conversion_for(settings(**old)).metadata()}
    assert keys["llama.rope.freq_base"] == 5e5 and keys["llama.rope.scaling.factor"] == 4.0


def test_llama3_frequencies_keep_short_waves_and_stretch_long_ones() -> None:
    rope = {
        "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }  # fmt: skip
    factors = conversion_for(settings(rope_parameters=rope, head_dim=128)).extras()["rope_freqs.weight"]
    assert factors.dtype == torch.float32 and factors.shape == (64,)
    assert factors[0] == 1 and factors[-1] == 8 and (factors.diff() >= 0).all() and factors.unique().numel() > 4


@pytest.mark.parametrize(
    ("values", "what"),
    [
        (dict(hidden_act="gelu"), "activation function silu"),
        (dict(rope_parameters={"rope_type": "dynamic", "factor": 2.0}), "rotary embeddings"),
        (dict(rope_parameters={"rope_type": "default", "partial_rotary_factor": 0.5}), "part of each head"),
        (dict(model_type="qwen2", use_sliding_window=True), "use_sliding_window"),
        (dict(model_type="qwen3_moe", norm_topk_prob=False), "norm_topk_prob is false"),
        (dict(model_type="qwen2_moe", mlp_only_layers=[1]), "every layer"),
        (dict(model_type="smollm3", no_rope_layers=[1, 0]), "every fourth layer"),
        (dict(model_type="gemma2", hidden_act="gelu_pytorch_tanh"), "a separate head"),
        (dict(model_type="falcon", hidden_act="gelu", alibi=True), "alibi"),
        (dict(model_type="gpt2", hidden_act="gelu_new", scale_attn_by_inverse_layer_idx=True), "scale_attn"),
        (dict(model_type="granite", head_dim=32), "wide"),
        (dict(model_type="deepseek_v3", q_lora_rank=None), "low-rank"),
        (dict(model_type="deepseek_v3", q_lora_rank=8, rope_interleave=False), "neighbouring"),
    ],
)
def test_what_llama_cpp_would_run_otherwise_is_refused(values: dict[str, Any], what: str) -> None:
    with pytest.raises(UnsupportedError, match=what):
        conversion_for(settings(**values))


def test_an_unknown_family_is_refused_with_the_list() -> None:
    with pytest.raises(UnsupportedError, match=r"'opt'.*gemma2.*qwen3_moe"):
        conversion_for(settings(model_type="opt"))


def test_an_unknown_tensor_is_refused_by_name() -> None:
    with pytest.raises(UnsupportedError, match=r"model\.layers\.0\.self_attn\.gate_proj\.weight"):
        conversion_for(settings(), {"model.layers.0.self_attn.gate_proj.weight": (4, 4)})


def test_missing_experts_are_refused() -> None:
    name = "model.layers.0.block_sparse_moe.experts.{}.w1.weight"
    shapes = {name.format(i): (8, 64) for i in (0, 2)}
    with pytest.raises(ModelError, match="are incomplete"):
        conversion_for(settings(model_type="mixtral", num_local_experts=3), shapes)


def test_shapes() -> None:
    shapes = {
        "model.embed_tokens.weight": (96, 64),
        "model.layers.0.self_attn.q_proj.weight": (64, 64),
        "model.layers.0.input_layernorm.weight": (64,),
        "model.layers.0.block_sparse_moe.gate.weight": (2, 64),
        **{f"model.layers.0.block_sparse_moe.experts.{i}.w1.weight": (8, 64) for i in range(2)},
    }
    conversion = conversion_for(settings(model_type="mixtral", num_local_experts=2), shapes)
    assert conversion.tensors["blk.0.ffn_gate_exps.weight"] == (2, 8, 64)
    assert conversion.tensors["blk.0.attn_q.weight"] == (64, 64)
    assert {n for n, shape in conversion.tensors.items() if not quantizable(n, shape)} == {
        "blk.0.attn_norm.weight", "blk.0.ffn_gate_inp.weight",
    }  # fmt: skip


def test_rows_of_packed_weights_go_where_rows_of_weights_go() -> None:
    """Placing commutes with anything done row by row, which is what lets packed bytes be placed."""
    conversion = conversion_for(settings())
    (placement,) = conversion.place("model.layers.0.self_attn.q_proj.weight")
    weight = torch.randn(64, 64)
    packed = (weight * 7).to(torch.int8).view(torch.uint8)
    assert placement.edit is None
    assert torch.equal(placement.cut(packed), (placement.cut(weight) * 7).to(torch.int8).view(torch.uint8))


def test_every_key_is_one_that_the_format_knows() -> None:
    known = {
        value
        for room in vars(gguf.Keys).values()
        if isinstance(room, type)
        for value in vars(room).values()
        if isinstance(value, str)
    }
    asked = {f"{{arch}}.{key.name}" for family in FAMILIES.values() for key in family.keys}
    assert asked <= known
    assert {family.arch for family in FAMILIES.values()} <= set(gguf.MODEL_ARCH_NAMES.values())


def test_the_size_counts_experts_once() -> None:
    assert size_label({"token_embd.weight": (1000, 135_000)}) == "135M"
    shapes = {"token_embd.weight": (1000, 1_000_000), "blk.0.ffn_up_exps.weight": (8, 1000, 6_000_000)}
    assert size_label(shapes) == "8x7.0B"


def test_general_metadata_names_the_model(tmp_path: Path) -> None:
    folder = tmp_path / "0a1b2c"  # as a downloaded snapshot is called
    folder.mkdir()
    (folder / "README.md").write_text("---\nlicense: apache-2.0\ntags:\n- tiny\n---\n# Model\n")
    tensors = {"token_embd.weight": (1000, 7_000_000)}
    found = general_metadata("llama", tensors, 15, folder=folder, name="some-org/Tiny-Llama-7B-Chat")
    keys = {entry.key: entry.value for entry in found}
    assert keys["general.architecture"] == "llama" and keys["general.type"] == "model"
    assert keys["general.file_type"] == 15 and keys["general.quantization_version"] == 2
    assert keys["general.name"] == "Tiny Llama 7B Chat" and keys["general.size_label"] == "7B"
    assert keys["general.license"] == "apache-2.0" and keys["general.tags"] == ["tiny"]


def test_without_the_package_the_advice_is_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> Any:
        raise ImportError(name)

    monkeypatch.setattr(importlib, "import_module", absent)
    with pytest.raises(UnsupportedError, match=r"auto-round\[gguf\]"):
        conversion_for(settings())
