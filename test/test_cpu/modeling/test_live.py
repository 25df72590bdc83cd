from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from auto_round.errors import ModelError, NumericsError
from auto_round.modeling.source import open_source

Model = Callable[..., Any]


def test_works_in_place(tiny_model: Model) -> None:
    model = tiny_model("llama-tied").train()
    source = open_source(model)
    assert source.model is model and not model.training and source.dtype == torch.float32
    weight = model.model.layers[0].mlp.up_proj.weight
    assert source.load("model.layers.0") is model.model.layers[0]
    source.release("model.layers.0")
    assert model.model.layers[0].mlp.up_proj.weight is weight and not weight.is_meta and weight.requires_grad
    assert source.tied() == {"lm_head.weight": "model.embed_tokens.weight"}
    assert source.tensor_names() == list(model.state_dict())
    assert torch.equal(source.read("lm_head.weight"), model.model.embed_tokens.weight)
    assert source.tensor_meta("model.norm.weight") == ((32,), torch.float32)
    assert source.non_block_module_names() == ["model.embed_tokens", "model.norm", "lm_head"]


def test_names_equal_those_of_a_checkpoint(tiny_model: Model, tiny_folder: Callable[..., Any]) -> None:
    for family in ("gpt2", "mixtral", "gpt-oss"):
        live, path = open_source(tiny_model(family)), open_source(tiny_folder(family))
        assert live.tensor_names() == path.tensor_names() and live.tied() == path.tied() and live.blocks == path.blocks
        assert all(torch.equal(live.read(n), path.read(n)) for n in live.tensor_names())


def test_no_device_means_where_it_is(tiny_model: Model) -> None:
    model = tiny_model("llama-tied")
    source = open_source(model)
    head = model.lm_head.weight
    source.load("model.layers.1")
    assert all(p.device.type == "cpu" for p in model.parameters())
    assert model.lm_head.weight is model.model.embed_tokens.weight is head


def test_refused(tiny_model: Model) -> None:
    with pytest.raises(ModelError, match="no .config"):
        open_source(torch.nn.Linear(2, 2))
    with pytest.raises(ModelError, match="meta device"):
        open_source(tiny_model("llama").to("meta"))
    source = open_source(tiny_model("llama"))
    with pytest.raises(ModelError, match="no tensor 'model.norm.bias'"):
        source.read("model.norm.bias")


def test_bad_weights_are_named(tiny_model: Model) -> None:
    model = tiny_model("llama")
    model.model.layers[2].mlp.down_proj.weight.data[0, 0] = torch.nan
    source = open_source(model)
    source.load("model.layers.1")
    with pytest.raises(NumericsError, match="model.layers.2.mlp.down_proj.weight"):
        source.load("model.layers.2")
