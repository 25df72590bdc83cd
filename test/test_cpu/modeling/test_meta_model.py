"""Checkpoints whose structure is read from Transformers' class, and from their names where it has none."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from auto_round.errors import ModelError, UnsupportedError
from auto_round.modeling.blocks import linear_names
from auto_round.modeling.checkpoint import CheckpointSource
from auto_round.modeling.layer_rules import block_weights, router_names
from auto_round.modeling.meta_model import MetaModelSource, open_meta_source

FAMILY_NAMES = (
    "llama", "llama-tied", "qwen2", "qwen3", "opt", "gpt2", "gemma3", "phi", "mistral", "falcon-alibi", "falcon-rotary",
    "mixtral", "qwen2-moe", "qwen3-moe", "gpt-oss", "qwen3-next", "olmo-hybrid",
)  # fmt: skip


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_a_known_family_is_read_by_its_class(family: str, tiny_folder: Callable[..., Path]) -> None:
    by_class, found = CheckpointSource(tiny_folder(family)), open_meta_source(tiny_folder(family))
    assert type(found.model) is type(by_class.model) and found.blocks == by_class.blocks
    assert found.tensor_names() == by_class.tensor_names()
    for name in by_class.tensor_names():
        assert torch.equal(found.read(name), by_class.read(name))


@pytest.mark.parametrize("family", ["llama", "llama-tied", "qwen3", "opt", "phi", "mistral", "falcon-rotary"])
def test_an_unknown_family_is_read_by_its_names(family: str, tiny_folder: Callable[..., Path], tmp_path: Path) -> None:
    """The same files under a model type that Transformers does not know."""
    by_class = CheckpointSource(tiny_folder(family))
    values = json.loads((tiny_folder(family) / "config.json").read_text()) | {"model_type": "unheard_of"}
    values.pop("architectures")
    (tmp_path / "config.json").write_text(json.dumps(values))
    save_file(load_file(tiny_folder(family) / "model.safetensors"), tmp_path / "model.safetensors")
    found = open_meta_source(tmp_path)
    assert isinstance(found, MetaModelSource) and found.blocks == by_class.blocks
    assert set(found.tensor_names()) == set(by_class.tensor_names())
    dense = router_names(found.model) | router_names(by_class.model)
    assert set(linear_names(found.model)) - dense == set(linear_names(by_class.model)) - dense


def test_an_unknown_family_whose_files_are_converted_is_refused(tmp_path: Path) -> None:
    """A type with a conversion mapping and without a class must not be taken for one whose files hold its modules."""
    from transformers import conversion_mapping
    from transformers.core_model_loading import WeightRenaming

    conversion_mapping.register_checkpoint_conversion_mapping(
        "invented_without_class", [WeightRenaming("stored_mlp", "mlp")], overwrite=True
    )
    values = {"model_type": "invented_without_class", "num_hidden_layers": 1}
    (tmp_path / "config.json").write_text(json.dumps(values))
    save_file({"model.layers.0.stored_mlp.up_proj.weight": torch.zeros(8, 8)}, tmp_path / "model.safetensors")
    with pytest.raises(UnsupportedError, match="converts the files of 'invented_without_class'"):
        open_meta_source(tmp_path)


def test_a_checkpoint_without_some_blocks(tiny_folder: Callable[..., Path], tmp_path: Path) -> None:
    source = tiny_folder("llama")
    tensors = load_file(source / "model.safetensors")
    values = json.loads((source / "config.json").read_text()) | {"model_type": "unheard_of"}
    (tmp_path / "config.json").write_text(json.dumps(values))
    for cut, words in ((".layers.2.", "config.json says 3 layers, and its files hold 2"), (".layers.1.", "layers")):
        save_file({k: v for k, v in tensors.items() if cut not in k}, tmp_path / "model.safetensors")
        with pytest.raises(ModelError, match=words):
            open_meta_source(tmp_path)


def test_names_with_head_or_output_inside_are_ordinary_layers(tmp_path: Path) -> None:
    """Exact segments decide, not substrings."""
    tensors = {"model.embed_tokens.weight": torch.randn(64, 32), "lm_head.weight": torch.randn(64, 32)}
    for block in range(2):
        for name in ("attention.output.dense", "attention.head_proj", "mlp.embed_up", "mlp.gate_down"):
            tensors[f"model.layers.{block}.{name}.weight"] = torch.randn(32, 32)
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "unheard_of", "num_hidden_layers": 2}))
    source = open_meta_source(tmp_path)
    assert len(linear_names(source.model)) == 9 and router_names(source.model) == set()
    assert block_weights(source.model, source.blocks).dense == ()
