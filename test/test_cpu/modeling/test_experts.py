from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch

from auto_round.modeling.experts import LinearExperts, is_fused_experts, unfuse_experts

MOE = ["mixtral", "qwen2-moe", "qwen3-moe", "gpt-oss", "qwen3-next"]
Model = Callable[..., Any]


def pair(tiny_model: Model, family: str) -> tuple[torch.nn.Module, LinearExperts]:
    """The fused experts of block 0 and their replacement, holding equal weights."""
    fused = tiny_model(family).model.layers[0].mlp.experts
    holder = torch.nn.ModuleDict({"experts": copy.deepcopy(fused)})
    assert unfuse_experts(holder) == ["experts"]
    linear = holder["experts"]
    assert isinstance(linear, LinearExperts)
    return fused, linear


def route(experts: int, tokens: int = 9, k: int = 2, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(tokens, experts, generator=generator)
    weights, index = scores.topk(k, dim=-1)
    return torch.randn(tokens, 32, generator=generator), index, weights


@pytest.mark.parametrize("family", MOE)
def test_equals_the_fused_experts(family: str, tiny_model: Model) -> None:
    fused, linear = pair(tiny_model, family)
    hidden, index, weights = route(linear.num_experts)
    torch.testing.assert_close(linear(hidden, index, weights), fused(hidden, index, weights), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", MOE)
def test_gradients_equal_the_fused_ones(family: str, tiny_model: Model) -> None:
    fused, linear = pair(tiny_model, family)
    grads = []
    for experts in (fused, linear):
        hidden, index, weights = route(linear.num_experts)
        hidden.requires_grad_(), weights.requires_grad_()
        experts(hidden, index, weights).square().sum().backward()
        grads.append((hidden.grad, weights.grad))
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)
    assert fused.down_proj.grad is not None
    for e in range(linear.num_experts):
        theirs = fused.down_proj.grad[e]
        ours = getattr(linear, str(e)).down_proj.weight.grad
        expected = theirs.t() if linear.layout.transposed else theirs
        torch.testing.assert_close(
            ours if ours is not None else torch.zeros_like(expected), expected, rtol=1e-3, atol=1e-4
        )


def test_only_experts_with_tokens_run(tiny_model: Model) -> None:
    fused, linear = pair(tiny_model, "mixtral")
    ran = []
    for e in range(5):
        getattr(linear, str(e)).up_proj.register_forward_hook(lambda _m, a, _o, e=e: ran.append((e, len(a[0]))))
    hidden = torch.randn(3, 32)
    index, weights = torch.tensor([[4, 1], [4, 1], [1, 4]]), torch.rand(3, 2)
    torch.testing.assert_close(linear(hidden, index, weights), fused(hidden, index, weights))
    assert ran == [(1, 3), (4, 3)]


def test_no_tokens_and_no_expert(tiny_model: Model) -> None:
    _, linear = pair(tiny_model, "mixtral")
    empty = linear(torch.empty(0, 32), torch.empty(0, 2, dtype=torch.int64), torch.empty(0, 2))
    assert empty.shape == (0, 32)
    hidden, index, weights = torch.randn(2, 32), torch.tensor([[5, 0], [5, 5]]), torch.rand(2, 2)
    out = linear(hidden, index, weights)
    alone = linear(hidden[:1], torch.tensor([[0]]), weights[:1, 1:])
    torch.testing.assert_close(out[0], alone[0])
    assert out[1].abs().sum() == 0


def test_layout_of_names_and_shared_memory(tiny_model: Model) -> None:
    model = tiny_model("qwen3-moe")
    fused = model.model.layers[1].mlp.experts
    storage = fused.gate_up_proj.untyped_storage().data_ptr()
    assert unfuse_experts(model) == ["model.layers.0.mlp.experts", "model.layers.1.mlp.experts"]
    names = dict(model.named_modules())
    assert isinstance(names["model.layers.1.mlp.experts.3.gate_proj"], torch.nn.Linear)
    assert names["model.layers.1.mlp.experts.3.gate_proj"].weight.untyped_storage().data_ptr() == storage
    assert not any("gate_up_proj" in n for n in model.state_dict())
    assert unfuse_experts(model) == [], "a second call finds nothing"


@pytest.mark.parametrize("family", MOE)
def test_whole_model_and_copy_keep_their_logits(family: str, tiny_model: Model) -> None:
    model = tiny_model(family)
    ids = torch.randint(3, 96, (2, 7), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        wanted = model(ids).logits
        unfuse_experts(model)
        torch.testing.assert_close(model(ids).logits, wanted, rtol=1e-4, atol=1e-5)
        twin = copy.deepcopy(model.model.layers[0])
        twin.mlp.experts.get_submodule("0").up_proj.weight.zero_()
        torch.testing.assert_close(model(ids).logits, wanted, rtol=1e-4, atol=1e-5)


def test_meta_models_stay_on_meta(tiny_model: Model) -> None:
    model = tiny_model("gpt-oss").to("meta")
    shapes = {n: p.shape for n, p in model.named_parameters()}
    unfuse_experts(model)
    assert all(p.is_meta for p in model.parameters())
    expert = model.model.layers[0].mlp.experts.get_submodule("2")
    hidden, twice = shapes["model.layers.0.mlp.experts.gate_up_proj"][1:]
    assert expert.gate_proj.weight.shape == (twice // 2, hidden) and expert.gate_proj.bias.shape == (twice // 2,)


def test_unknown_layouts_are_left_alone() -> None:
    class OwnExperts(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate_up_proj = torch.nn.Parameter(torch.zeros(2, 4, 8))
            self.down_proj = torch.nn.Parameter(torch.zeros(2, 4, 2))

    model = torch.nn.ModuleDict({"experts": OwnExperts(), "fc": torch.nn.Linear(2, 2)})
    assert not is_fused_experts(model["experts"]) and unfuse_experts(model) == []


def test_experts_with_a_tensor_that_no_layout_explains_stay_whole(tiny_model: Model) -> None:
    for kind in ("parameter", "buffer", "matrix below"):
        experts = tiny_model("qwen3-moe").model.layers[0].mlp.experts
        if kind == "parameter":
            experts.per_expert_scale = torch.nn.Parameter(torch.ones(5))
        elif kind == "buffer":
            experts.register_buffer("per_expert_scale", torch.ones(5))
        else:
            experts.latent = torch.nn.Linear(32, 32)
        names = set(experts.state_dict())
        holder = torch.nn.ModuleDict({"experts": experts})
        assert not is_fused_experts(experts) and unfuse_experts(holder) == [], kind
        assert set(holder["experts"].state_dict()) == names


def test_bfloat16_output_keeps_its_dtype(tiny_model: Model) -> None:
    fused, linear = pair(tiny_model, "qwen3-moe")
    hidden, index, weights = route(linear.num_experts)
    linear.to(torch.bfloat16)
    out = linear(hidden.bfloat16(), index, weights)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), fused(hidden, index, weights), rtol=0.1, atol=0.02)


def test_one_expert_is_reached_by_its_number(tiny_model: Any) -> None:
    model = tiny_model("mixtral")
    unfuse_experts(model)
    experts = next(module for module in model.modules() if isinstance(module, LinearExperts))
    assert experts[1] is experts.get_submodule("1") and len(list(experts)) == experts.num_experts
    with pytest.raises(IndexError, match="expert 99 of"):
        experts[99]
