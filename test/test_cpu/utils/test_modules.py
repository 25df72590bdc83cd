"""The helpers that scripts import from auto_round.utils."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from auto_round import formats, utils
from auto_round.errors import ConfigError, DeviceError, ModelError, UnsupportedError


@pytest.fixture
def model(packable_model: Callable[..., torch.nn.Module]) -> torch.nn.Module:
    return packable_model("llama")


def test_modules_by_name(model: torch.nn.Module) -> None:
    name = "model.layers.0.self_attn.q_proj"
    assert utils.get_module(model, name) is model.get_submodule(name)
    assert utils.get_module(model, "model.layers.9") is None
    new = torch.nn.Linear(2, 2)
    utils.set_module(model, name, new)
    assert model.get_submodule(name) is new
    utils.set_module(model, "no.such.place", new)
    utils.set_module(model, "head", new)
    assert model.head is new


def test_attributes_by_name(model: torch.nn.Module) -> None:
    assert utils.get_attr(model, "model.norm.weight") is model.get_parameter("model.norm.weight")
    assert utils.get_attr(model, "model.nothing.weight") is None
    weight = torch.nn.Parameter(torch.zeros(3))
    utils.set_attr(model, "model.norm.weight", weight)
    assert model.get_parameter("model.norm.weight") is weight
    utils.set_attr(model, "model.nothing.weight", weight)
    utils.set_attr(model, "tag", 3)
    assert model.tag == 3


def test_blocks(model: torch.nn.Module) -> None:
    blocks = utils.get_block_names(model)
    assert blocks == [["model.layers.0", "model.layers.1"]]
    assert utils.get_block_names(model, quant_vision=True) == blocks
    assert utils.find_matching_blocks(model, blocks, None) is blocks
    assert utils.find_matching_blocks(model, blocks, r"layers\.1") == [["model.layers.1"]]
    assert utils.find_matching_blocks(model, blocks, "model.layers.0, model.layers.1") == blocks
    assert utils.find_matching_blocks(model, blocks, [["x"]]) == [["x"]]
    with pytest.raises(ConfigError, match="matches none"):
        utils.find_matching_blocks(model, blocks, "model.blocks")
    assert utils.get_lm_head_name(model) == "lm_head"
    assert utils.is_pure_text_model(model)
    model.vision_tower = type("VisionTower", (torch.nn.Module,), {})()
    model.vision_tower.blocks = torch.nn.ModuleList([torch.nn.Linear(2, 2)])
    assert not utils.is_pure_text_model(model)
    assert utils.get_block_names(model) == blocks
    assert utils.get_block_names(model, quant_vision=True) == [*blocks, ["vision_tower.blocks.0"]]


@pytest.mark.skipif(torch.cuda.is_available(), reason="a machine without an accelerator takes the CPU")
def test_the_first_device() -> None:
    for given in ("cpu", 0, "0", "cpu,cuda:0", {".*": "cpu"}, ["cpu", "cuda:1"], None, "auto"):
        assert utils.get_major_device(given) == "cpu"
    with pytest.raises(DeviceError):
        utils.get_major_device("cuda:5,cpu")


def test_loading(packable_folder: Callable[..., str]) -> None:
    model, tokenizer = utils.llm_load_model(packable_folder("llama"), model_dtype="fp16")
    assert model.dtype is torch.float16 and not model.training and len(tokenizer("abc").input_ids) >= 3
    with pytest.raises(ModelError):
        utils.llm_load_model("no/such-model-anywhere-at-all")
    with pytest.raises(UnsupportedError, match="multimodal models"):
        utils.mllm_load_model("x")
    with pytest.raises(UnsupportedError, match="diffusion models"):
        utils.diffusion_load_model("x")


def test_formats_have_a_short_path() -> None:
    from auto_round.formats import base as long

    assert formats.OutputFormat is long.OutputFormat and formats.get_format("fake").name == "fake"
    assert utils.parse_layer_config_arg("{mtp:{bits:8,data_type:int},mtp.fc:{bits:16}}") == {
        "mtp": {"bits": 8, "data_type": "int"},
        "mtp.fc": {"bits": 16},
    }
