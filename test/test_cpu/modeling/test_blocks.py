from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from auto_round.errors import ModelError
from auto_round.modeling.blocks import (
    find_blocks,
    is_conv1d,
    is_linear,
    linear_names,
    set_weight_2d,
    weight_2d,
)
from auto_round.modeling.layer_rules import block_weights

EXPECTED = {
    "llama": "model.layers",
    "opt": "model.decoder.layers",
    "gpt2": "transformer.h",
    "gemma3": "model.layers",
    "falcon-alibi": "transformer.h",
    "mixtral": "model.layers",
    "qwen3-next": "model.layers",
}


@pytest.mark.parametrize("family", EXPECTED)
def test_blocks_of_families(family: str, tiny_model: Callable[..., Any]) -> None:
    model = tiny_model(family)
    count = model.config.num_hidden_layers
    assert find_blocks(model) == tuple(f"{EXPECTED[family]}.{i}" for i in range(count))


def test_a_vision_tower_is_not_taken_for_the_decoder() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tower = nn.ModuleList([nn.Sequential(nn.Linear(64, 64)) for _ in range(9)])
            self.text = nn.Module()
            self.text.layers = nn.ModuleList([nn.Sequential(nn.Linear(4, 4)) for _ in range(2)])

        def get_decoder(self) -> nn.Module:
            return self.text

    assert find_blocks(Model()) == ("text.layers.0", "text.layers.1")


def test_lists_inside_blocks_are_not_blocks() -> None:
    def block() -> nn.Module:
        module = nn.Module()
        module.experts = nn.ModuleList([nn.Linear(8, 8) for _ in range(16)])
        return module

    model = nn.Module()
    model.layers = nn.ModuleList([block(), block()])
    model.norms = nn.ModuleList([nn.LayerNorm(8) for _ in range(40)])
    assert find_blocks(model) == ("layers.0", "layers.1")


def test_no_blocks_is_an_error() -> None:
    with pytest.raises(ModelError, match="no list of decoder blocks"):
        find_blocks(nn.Sequential(nn.Linear(2, 2)))


def test_linear_layers_and_their_orientation(tiny_model: Callable[..., Any]) -> None:
    block = tiny_model("gpt2").transformer.h[0]
    assert linear_names(block) == ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"]
    conv = block.attn.c_attn
    assert is_conv1d(conv) and is_linear(conv) and not is_linear(block.ln_1) and not is_linear(nn.Embedding(3, 4))
    assert weight_2d(conv).shape == (96, 32)
    assert weight_2d(conv).data_ptr() == conv.weight.data_ptr(), "a view"
    x = torch.randn(5, 32)
    torch.testing.assert_close(conv(x), x @ weight_2d(conv).t() + conv.bias)
    set_weight_2d(conv, torch.arange(96 * 32).view(96, 32))
    assert conv.weight[1, 0] == 1 and conv.weight[0, 1] == 32
    linear = nn.Linear(3, 5)
    assert weight_2d(linear) is linear.weight


def test_subclasses_of_linear_are_known_by_their_outputs() -> None:
    class Same(nn.Linear):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return input @ self.weight.T + self.bias

    class Scaled(nn.Linear):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(input)

    class Choosing(nn.Linear):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return super().forward(input).topk(2)[1]

    class Grouped(nn.Linear):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return torch.bmm(input, self.weight.view(self.groups, -1, input.shape[-1]).transpose(1, 2))

    class Inherited(nn.Linear):
        pass

    for device in ("cpu", "meta"):
        with torch.device(device):
            model = nn.ModuleDict({c.__name__: c(8, 4) for c in (Same, Scaled, Choosing, Grouped, Inherited)})
        assert linear_names(model) == ["Same", "Inherited"]
    weights = block_weights(nn.ModuleDict({"block": model}), ("block",))
    assert {w.name for w in weights.dense} == {f"block.{n}.weight" for n in ("Scaled", "Choosing", "Grouped")}
    assert all("overrides forward" in w.reason and w.unknown for w in weights.dense)
    assert weights.unknown_fraction == 0.6
