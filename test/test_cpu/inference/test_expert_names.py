"""Mixtures whose checkpoints name experts otherwise than Transformers' modules: our files, older ones, others'."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from auto_round.errors import ModelError
from auto_round.eval.evaluate import load_model
from auto_round.inference.convert_model import StoredNames, read_names
from auto_round.inference.linear import QuantLinear
from auto_round.modeling.experts import unfuse_experts
from auto_round.modeling.files.safetensors import StoredTensor
from auto_round.modeling.tensor_map import DEFAULT_EXPERT_NAMES, Conversions, ExpertLayerNames
from auto_round.schemes import QuantizationScheme as Scheme

IDS = torch.tensor([[1, 5, 9, 2, 44, 17, 3, 8], [7, 7, 1, 0, 60, 31, 12, 2]])
W123_LEAVES = ExpertLayerNames("w1", "w3", "w2")
LEAVES = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}
FORMATS = ["auto_round", "auto_gptq", "auto_awq"]


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


def family_name(name: str) -> str:
    """A tensor's or layer's name as Mixtral's own checkpoints have it, spelled out here on its own."""
    name = name.replace(".mlp.", ".block_sparse_moe.")
    return re.sub(r"(experts\.\d+\.)(\w+_proj)", lambda m: m[1] + LEAVES[m[2]], name)


def rename_tensors(folder: Path, rename: Callable[[str], str]) -> None:
    tensors = load_file(folder / "model.safetensors")
    assert len({rename(name) for name in tensors}) == len(tensors)
    save_file(
        {rename(name): tensor for name, tensor in tensors.items()}, folder / "model.safetensors", {"format": "pt"}
    )


def edit_config(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    values = json.loads((folder / "config.json").read_text())
    change(values["quantization_config"])
    (folder / "config.json").write_text(json.dumps(values))


def names_in(folder: Path) -> set[str]:
    return set(load_file(folder / "model.safetensors"))


def save_and_open_again(model: Any, folder: Path, files: set[str]) -> dict[str, Any]:
    model.save_pretrained(folder)
    assert names_in(folder) == files
    assert torch.equal(logits(load_model(folder, dtype=torch.float32)), logits(model))
    return json.loads((folder / "config.json").read_text())["quantization_config"]


@pytest.fixture
def mixtral() -> Any:
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(3)
    config = MixtralConfig(
        vocab_size=96, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2, tie_word_embeddings=False,
    )  # fmt: skip
    model = MixtralForCausalLM(config).eval()
    unfuse_experts(model)
    return model


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("foreign", [True, False])
def test_both_namings_open_and_are_saved_as_they_were(
    fmt: str, foreign: bool, mixtral: Any, write_checkpoint: Callable[..., Any], tmp_path: Path
) -> None:
    """`write_checkpoint` names tensors by modules, as earlier files did; others name them as Mixtral does."""
    dense = {f"model.layers.1.self_attn.{leaf}_proj": Scheme(bits=16) for leaf in "qkv"}
    written = write_checkpoint(mixtral, Scheme(group_size=32), dense, fmt)
    if foreign:
        text = (written.folder / "config.json").read_text()
        (written.folder / "config.json").write_text(family_name(text))
        rename_tensors(written.folder, family_name)
        assert "model.layers.1.block_sparse_moe.experts.3.w2.qweight" in names_in(written.folder)
    model = load_model(written.folder, dtype=torch.float32)
    assert torch.allclose(logits(model), logits(written.fake), atol=1e-5)
    leaf = "w2" if foreign else "down_proj"
    packed = {name for name, module in model.named_modules() if isinstance(module, QuantLinear)}
    assert len(packed) == len(written.layers) and f"model.layers.1.mlp.experts.3.{leaf}" in packed
    saved = save_and_open_again(model, tmp_path / "again", names_in(written.folder))
    assert saved["quant_method"] == "auto-round" and saved["extra_config"].keys() >= dense.keys()


@pytest.mark.parametrize("fmt", ["auto_gptq", "auto_awq"])
def test_a_config_with_few_words(fmt: str, mixtral: Any, write_checkpoint: Callable[..., Any], tmp_path: Path) -> None:
    """As other writers leave it: the router by a part of its name, no block names, no provider."""
    written = write_checkpoint(mixtral, Scheme(group_size=32), None, fmt)
    rename_tensors(written.folder, family_name)
    words = {"bits": 4, "group_size": 32}
    if fmt == "auto_awq":
        words |= {"quant_method": "awq", "zero_point": True, "version": "gemm", "modules_to_not_convert": ["gate"]}
    else:
        words |= {"quant_method": "gptq", "desc_act": False, "sym": True, "dynamic": {r"-:.*\.gate$": {}}}
    edit_config(written.folder, lambda c: (c.clear(), c.update(words)))
    model = load_model(written.folder, dtype=torch.float32)
    assert torch.allclose(logits(model), logits(written.fake), atol=1e-5)
    save_and_open_again(model, tmp_path / "again", names_in(written.folder))


def test_rules_for_single_experts_in_the_familys_words(
    mixtral: Any, write_checkpoint: Callable[..., Any], tmp_path: Path
) -> None:
    """`dynamic` and `modules_in_block_to_quantize` name w1 to w3; saved again, `extra_config` does."""
    mixed = {
        "model.layers.0.mlp.experts.1.gate_proj": Scheme(bits=8, group_size=32),
        "model.layers.0.mlp.experts.2.down_proj": Scheme(bits=2, group_size=32),
    }
    written = write_checkpoint(mixtral, Scheme(group_size=32), mixed, "auto_gptq")
    rename_tensors(written.folder, family_name)
    rules = {
        r"+:^model\.layers\.0\.block_sparse_moe\.experts\.1\.w1$": {"bits": 8},
        r"+:.*layers\.0\..*experts\.2\.w2": {"bits": 2},
        r"-:.*gate": {},  # hits routers; no expert has such a name in these files
    }
    listed = [[f"block_sparse_moe.experts.{e}.w{i}" for e in range(4) for i in (1, 2, 3)]]
    listed[0] += [f"self_attn.{leaf}_proj" for leaf in "qkvo"]
    edit_config(written.folder, lambda c: c.update(dynamic=rules, modules_in_block_to_quantize=listed))
    model = load_model(written.folder, dtype=torch.float32)
    assert torch.allclose(logits(model), logits(written.fake), atol=1e-5)
    saved = save_and_open_again(model, tmp_path / "again", names_in(written.folder))
    bits = {name: entry["bits"] for name, entry in saved["extra_config"].items()}
    assert bits == {family_name(name): scheme.bits for name, scheme in mixed.items()}


def test_dense_experts_that_transformers_would_join_are_refused(
    mixtral: Any, write_checkpoint: Callable[..., Any]
) -> None:
    dense = {f"model.layers.1.mlp.experts.2.{leaf}": Scheme(bits=16) for leaf in LEAVES}
    written = write_checkpoint(mixtral, Scheme(group_size=32), dense)
    rename_tensors(written.folder, family_name)
    edit_config(written.folder, lambda c: c.update(extra_config={family_name(n): {"bits": 16} for n in dense}))
    with pytest.raises(
        ModelError, match=r"block_sparse_moe\.experts\.2\.w1 is stored dense next.*2\.gate_proj in the file"
    ):
        load_model(written.folder)


def test_files_that_cannot_be_seen_are_taken_for_the_familys(
    mixtral: Any, write_checkpoint: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    mixed = {"model.layers.0.mlp.experts.1.gate_proj": Scheme(bits=8, group_size=32)}
    written = write_checkpoint(mixtral, Scheme(group_size=32), mixed)
    rename_tensors(written.folder, family_name)
    edit_config(written.folder, lambda c: c.update(extra_config={family_name(n): {"bits": 8} for n in mixed}))
    monkeypatch.setattr("auto_round.inference.convert_model.checkpoint_tensors", lambda model: None)
    assert torch.allclose(logits(load_model(written.folder, dtype=torch.float32)), logits(written.fake), atol=1e-5)


def tiny(name: str, **values: Any) -> Any:
    """The skeleton of a family, on meta."""
    import transformers

    common = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    config = getattr(transformers, f"{name}Config")(**(common | heads | values))
    with torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(config)


FAMILIES = {
    "Mixtral": (dict(num_local_experts=2), "block_sparse_moe", "mlp", "gate", "gate"),
    "MiniMax": (dict(num_local_experts=2), "block_sparse_moe", "mlp", "gate", "gate"),
    "MiniMaxM2": (dict(num_local_experts=2, head_dim=16), "block_sparse_moe", "mlp", "gate", "gate"),
    "Phimoe": (dict(num_local_experts=2), "block_sparse_moe", "mlp", "gate", "router"),
    "Lfm2Moe": (
        dict(num_experts=2, num_experts_per_tok=1, moe_intermediate_size=32, num_dense_layers=1,
             layer_types=["full_attention", "full_attention"]),
        "feed_forward", "feed_forward", "gate", "gate",
    ),
}  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_written_is_what_transformers_finds(family: str) -> None:
    """Names in the family's words against what a file with them is read as."""
    values, there, here, gate_there, gate_here = FAMILIES[family]
    model = tiny(family, **values)
    unfuse_experts(model)
    layer = "model.layers.1"
    stored = {
        f"{layer}.{there}.experts.0.{theirs}.qweight": f"{layer}.{here}.experts.0.{theirs}.qweight"
        for theirs in LEAVES.values()
    } | {f"{layer}.{there}.{gate_there}.weight": f"{layer}.{here}.{gate_here}.weight"}
    names = read_names(model, {name: StoredTensor(Path("x"), torch.int32, (1,), 0, 0) for name in stored})
    assert names.tensors is not None and set(names.tensors) == set(stored.values())
    assert names.expert_names(f"{layer}.{here}.experts.0") == W123_LEAVES
    assert f"{layer}.{there}.{gate_there}" in names.config_names(f"{layer}.{here}.{gate_here}")
    assert names.config_names(f"{layer}.{here}.experts.0.w3")[0] == f"{layer}.{there}.experts.0.w3"


def test_names_without_a_family() -> None:
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    names = StoredNames({}, Conversions())
    assert names.config_names("model.layers.0.mlp.up_proj") == ("model.layers.0.mlp.up_proj",)
    assert names.expert_names("model.layers.0.mlp.experts.0") == DEFAULT_EXPERT_NAMES
    unseen = StoredNames(None, Conversions.of(get_checkpoint_conversion_mapping("mixtral")))
    assert unseen.expert_names("model.layers.0.mlp.experts.0") == W123_LEAVES
