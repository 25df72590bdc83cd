"""The rows of `family_facts` against Transformers' own mappings, and checkpoints understood by their names."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from auto_round.errors import ModelError, UnsupportedError
from auto_round.export.expert_names import EXPERT_NAMES
from auto_round.modeling.block_weights import block_weights
from auto_round.modeling.blocks import linear_names
from auto_round.modeling.checkpoint_source import CheckpointSource
from auto_round.modeling.family_facts import FAMILIES, family_facts
from auto_round.modeling.routers import router_names
from auto_round.modeling.skeleton_source import SkeletonSource

STACKS = {"MergeModulelist", "Concatenate"}


def mappings() -> dict[str, list[Any]]:
    """Transformers' conversions of every causal language model that has some."""
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return {t: found for t in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if (found := get_checkpoint_conversion_mapping(t))}


def test_every_family_with_conversions_has_a_row() -> None:
    found = mappings()
    assert len(found) > 40
    assert sorted(set(found) - set(FAMILIES)) == []


def test_families_whose_matrices_are_split_are_refused() -> None:
    for family, entries in mappings().items():
        steps = {type(op).__name__ for entry in entries for op in getattr(entry, "operations", ())}
        joined = [p for e in entries if getattr(e, "operations", ()) for p in e.source_patterns if "experts" not in p]
        if steps - STACKS or joined:
            assert family_facts(family).refused, family
        elif steps and not family_facts(family).refused:
            assert family_facts(family).fused_experts, family


def test_renames_give_the_names_that_transformers_gives() -> None:
    stored = {
        "mixtral": "model.layers.3.block_sparse_moe.gate.weight",
        "phimoe": "model.layers.3.block_sparse_moe.gate.weight",
        "granitemoe": "model.layers.3.block_sparse_moe.input_linear.weight",
        "gpt_neox": "embed_out.weight",
        "ernie4_5_moe": "model.layers.1.mlp.moe_statics.e_score_correction_bias",
        "exaone_moe": "model.layers.1.mlp.e_score_correction_bias",
        "mimo_v2_flash": "model.layers.1.self_attn.attention_sink_bias",
        "gemma3": "language_model.model.layers.0.mlp.up_proj.weight",
        "gemma3n_text": "model.language_model.layers.0.mlp.up_proj.weight",
    }
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping
    from transformers.core_model_loading import WeightRenaming, rename_source_key

    for family, name in stored.items():
        key = "GPTNeoXForCausalLM" if family == "gpt_neox" else family
        entries = [e for e in get_checkpoint_conversion_mapping(key) if isinstance(e, WeightRenaming)]
        wanted = rename_source_key(name, entries, [], None, None)[0]
        assert family_facts(family).module_name(name) in (
            wanted,
            wanted.replace("model.language_model.model.", "model.language_model."),
        )


@pytest.mark.parametrize("family", sorted(set(EXPERT_NAMES) - {"kimi_linear"}))
def test_names_of_experts_are_the_inverse_of_what_is_written(family: str) -> None:
    from auto_round.export.model_rules import renamed

    for leaf in ("gate_proj", "up_proj", "down_proj"):
        name = f"model.layers.0.mlp.experts.7.{leaf}.weight"
        if family == "lfm2_moe":
            name = name.replace(".mlp.", ".feed_forward.")
        assert family_facts(family).module_name(renamed(name, EXPERT_NAMES[family])) == name


def test_float32_lists_are_those_of_the_classes() -> None:
    import transformers

    names = {"deepseek_v3": "DeepseekV3", "glm4_moe": "Glm4Moe", "dots1": "Dots1", "ernie4_5_moe": "Ernie4_5_Moe",
             "gpt_oss": "GptOss", "exaone_moe": "ExaoneMoe", "mimo_v2_flash": "MiMoV2Flash", "solar_open": "SolarOpen",
             "llama": "Llama", "mixtral": "Mixtral", "qwen3_moe": "Qwen3Moe"}  # fmt: skip
    for family, prefix in names.items():
        kind = getattr(transformers, f"{prefix}PreTrainedModel")
        facts = family_facts(family)
        assert set(filter(None, re.split(r"\|", facts.float32.replace("\\", "")))) == set(
            kind._keep_in_fp32_modules_strict or ()
        ), family
        assert set(filter(None, facts.float32_in_float16.replace("\\", "").split("|"))) == set(
            kind._keep_in_fp32_modules or ()
        ), family


FAMILY_NAMES = (
    "llama", "llama-tied", "qwen2", "qwen3", "opt", "gpt2", "gemma3", "phi", "mistral", "falcon-alibi", "falcon-rotary",
    "mixtral", "qwen2-moe", "qwen3-moe", "gpt-oss", "qwen3-next",
)  # fmt: skip


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_a_checkpoint_is_understood_as_its_class_does(family: str, tiny_folder: Callable[..., Path]) -> None:
    by_class, by_name = CheckpointSource(tiny_folder(family)), SkeletonSource(tiny_folder(family))
    assert by_name.blocks == by_class.blocks and by_name.dtype == by_class.dtype
    assert by_name.tied() == by_class.tied()
    assert set(by_name.tensor_names()) == set(by_class.tensor_names())
    for name in by_class.tensor_names():
        assert by_name.tensor_meta(name) == by_class.tensor_meta(name)
        assert torch.equal(by_name.read(name), by_class.read(name))
    dense = router_names(by_name.model) | router_names(by_class.model)
    assert set(linear_names(by_name.model)) - dense == set(linear_names(by_class.model)) - dense
    embeddings = [
        {n for n, m in source.model.named_modules() if isinstance(m, torch.nn.Embedding)}
        for source in (by_class, by_name)
    ]
    assert embeddings[0] == embeddings[1]


def test_what_names_cannot_tell_is_refused(tiny_folder: Callable[..., Path]) -> None:
    with pytest.raises(UnsupportedError, match="'olmo_hybrid': its files hold matrices joined or apart"):
        SkeletonSource(tiny_folder("olmo-hybrid"))


def test_a_checkpoint_without_some_blocks(tiny_folder: Callable[..., Path], tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    source = tiny_folder("llama")
    tensors = load_file(source / "model.safetensors")
    for cut, words in ((".layers.2.", "config.json says 3 layers, and its files hold 2"), (".layers.1.", "layers")):
        save_file({k: v for k, v in tensors.items() if cut not in k}, tmp_path / "model.safetensors")
        (tmp_path / "config.json").write_text((source / "config.json").read_text())
        with pytest.raises(ModelError, match=words):
            SkeletonSource(tmp_path)


def test_names_with_head_or_output_inside_are_ordinary_layers(tmp_path: Path) -> None:
    """Exact segments decide, not substrings."""
    import json

    from safetensors.torch import save_file

    tensors = {"model.embed_tokens.weight": torch.randn(64, 32), "lm_head.weight": torch.randn(64, 32)}
    for block in range(2):
        for name in ("attention.output.dense", "attention.head_proj", "mlp.embed_up", "mlp.gate_down"):
            tensors[f"model.layers.{block}.{name}.weight"] = torch.randn(32, 32)
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "unheard_of", "num_hidden_layers": 2}))
    source = SkeletonSource(tmp_path)
    assert len(linear_names(source.model)) == 9 and router_names(source.model) == set()
    assert block_weights(source.model, source.blocks).dense == ()
