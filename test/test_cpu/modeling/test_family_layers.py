"""Experts, routers and other weights of the blocks, over all tiny families of Transformers' causal-LM mapping."""

from __future__ import annotations

import functools
import importlib
import re
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from families import Family, known_families, sample_ids
from torch import nn

from auto_round.modeling.blocks import find_blocks, linear_names
from auto_round.modeling.experts import LinearExperts, is_fused_experts, unfuse_experts
from auto_round.modeling.layer_rules import ROUTER, block_weights, router_names

pytestmark = pytest.mark.filterwarnings("ignore")
# Several stacks of blocks, or none.
NOT_WALKED = {"blt", "hrm_text"}
MOE = (
    "afmoe aria_text axk1 axk2 bailing_hybrid beam cohere2_moe dbrx deepseek_v2 deepseek_v3 deepseek_v32 deepseek_v4 "
    "dots1 dots3_note dots3_note_text ernie4_5_moe exaone_moe flex_olmo glm4_moe glm4_moe_lite glm_moe_dsa gpt_oss "
    "granitemoe granitemoe_swa granitemoehybrid granitemoeshared hunyuan_v1_moe hy_v3 hy_v4 inkling2_loop_text "
    "inkling2_text inkling_text jamba jetmoe kimi_linear kolibri1 laguna lara_mini lfm2_moe llama4 llama4_text "
    "longcat_flash mellum mimo_v2_flash minimax minimax_m2 minimax_m3_vl_text mixtral nemotron_h olmoe phimoe "
    "qwen2_moe qwen3_5_moe qwen3_5_moe_text qwen3_moe qwen3_next qwen4_exp qwen4_exp_text sarvam_mla sarvam_moe "
    "solar_open zaya"
).split()


@functools.cache
def families() -> dict[str, Family]:
    return known_families()


def build(name: str) -> Any:
    family = families().get(name)
    if family is None or family.reason is not None:
        pytest.skip(f"{name} is not in this version of Transformers, or not a decoder")
    return family.build()


def generic(name: str) -> str:
    return re.sub(r"\.\d+(?=\.|$)", ".*", name)


@pytest.mark.parametrize("name", MOE)
def test_experts_as_linear_layers_keep_the_logits(name: str) -> None:
    model = build(name)
    ids = torch.stack(sample_ids())
    stored = {n: p.numel() for n, p in model.named_parameters()}
    with torch.no_grad():
        wanted = model(ids, use_cache=False).logits
        replaced = unfuse_experts(model)
        assert replaced
        torch.testing.assert_close(model(ids, use_cache=False).logits, wanted, rtol=0, atol=1e-5)
        for prefix in replaced:  # the layers are what is computed with, not a copy of the fused weights
            experts = model.get_submodule(prefix)
            assert isinstance(experts, LinearExperts)
            for layer in linear_names(experts):
                experts.get_submodule(layer).weight.zero_()
        assert not torch.allclose(model(ids, use_cache=False).logits, wanted, atol=1e-3)
    for prefix in replaced:
        experts = model.get_submodule(prefix)
        fused = {f"{prefix}.{n}": shape for n, shape in experts.fused_shapes.items()}
        assert {n: stored[n] for n in fused} == {n: torch.Size(s).numel() for n, s in fused.items()}
    assert not any(is_fused_experts(module) for module in model.modules())


ROUTERS = {
    "afmoe": {"mlp.router.gate"},
    "dbrx": {"ffn.router.layer"},
    "hunyuan_v1_moe": {"mlp.gate.wg"},
    "jetmoe": {"mlp.router.layer", "self_attention.experts.router.layer"},
    "longcat_flash": {"mlp.router.classifier"},
    "qwen2_moe": {"mlp.shared_expert_gate"},
    "qwen3_next": {"mlp.shared_expert_gate"},
    "qwen3_5_moe": {"mlp.shared_expert_gate"},
    "zaya": {
        "mlp.gate.down_proj", "mlp.gate.router_mlp.fc1", "mlp.gate.router_mlp.fc2", "mlp.gate.router_mlp.out_proj",
    },
    "gemma3n_text": {"altup.modality_router"},
    "llama": set(), "kimi_linear": set(), "bailing_hybrid": set(), "lara_mini": set(), "axk2": set(), "mamba": set(),
    "falcon": set(), "gemma4_text": set(), "xlstm": set(),
}  # fmt: skip


@pytest.mark.parametrize("name", ROUTERS)
def test_linear_routers(name: str) -> None:
    model = build(name)
    unfuse_experts(model)
    blocks = {find_blocks(model)[0].rpartition(".")[0]}
    found = {generic(n) for n in router_names(model)}
    assert {n.removeprefix(f"{next(iter(blocks))}.*.") for n in found} == ROUTERS[name]


@pytest.mark.parametrize("name", [name for name in MOE if name not in ROUTERS or not ROUTERS[name]])
def test_routers_that_are_no_linear_layers_are_named_so(name: str) -> None:
    model = build(name)
    unfuse_experts(model)
    weights = block_weights(model, find_blocks(model))
    routers = {generic(w.name) for w in weights.dense if w.reason == ROUTER}
    routers = routers or {
        generic(n) for n in router_names(model)
    }  # of Transformers 5.20: Jamba's is a linear layer there
    assert routers, "a mixture without a router"
    assert all(re.search(r"\.(gate|router)(\.|$)", n) for n in routers)
    assert not any(".experts." in n for n in routers)


# Fraction of a tiny model that no rule recognises. Real models have less, because their matrices are larger.
UNKNOWN = {
    "deepseek_v4": 0.06, "hy_v4": 0.02, "inkling_text": 0.12, "inkling2_text": 0.12, "inkling2_loop_text": 0.12,
    "recurrent_gemma": 0.05, "zamba": 0.1,
}  # fmt: skip
REFUSED = {"xlnet"}  # its projections are 3-D parameters


@pytest.mark.parametrize("name", sorted(families()))
def test_every_weight_of_a_block_is_a_layer_or_has_a_reason(name: str) -> None:
    if name in NOT_WALKED:
        pytest.skip("not one stack of blocks")
    model = build(name)
    unfuse_experts(model)
    blocks = find_blocks(model)
    weights = block_weights(model, blocks)
    layers = {f"{n}.weight" for n in linear_names(model)}
    named = {w.name for w in weights.dense}
    for block in blocks:
        for leaf, parameter in model.get_submodule(block).named_parameters():
            if parameter.dim() >= 2:
                assert (f"{block}.{leaf}" in layers) != (f"{block}.{leaf}" in named), leaf
    assert all(weight.reason for weight in weights.dense)
    if name in REFUSED:
        assert weights.unknown_fraction > 0.5
    else:
        assert weights.unknown_fraction <= UNKNOWN.get(name, 0.0)


@pytest.mark.parametrize(
    ("family", "cls"),
    [
        ("muse_spark", "MuseSparkExperts"),
        ("step3p7", "Step3p7Experts"),
        ("openai_privacy_filter", "OpenAIPrivacyFilterExperts"),
    ],
)
def test_experts_of_models_that_are_no_causal_language_models(family: str, cls: str) -> None:
    """A norm behind each expert, a limit on activations, biases with joined halves."""
    try:
        modules = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    except ImportError:
        pytest.skip(f"{family} is not in this version of Transformers")
    made = SimpleNamespace(
        hidden_size=32, moe_hidden_size=32, moe_intermediate_size=24, intermediate_size=24, num_local_experts=4,
        num_experts_per_tok=2, hidden_act="silu", post_norm_eps=1e-6, swiglu_alpha=1.7, swiglu_limit=2.0,
        _experts_implementation="eager",
    )  # fmt: skip
    holder = nn.ModuleDict({"experts": getattr(modules, cls)(made)})
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in holder.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
        hidden = torch.randn(9, 32, generator=generator)
        weights, index = torch.rand(9, 4, generator=generator).topk(2)
        wanted = holder["experts"](hidden, index, weights)
        names = {n for n, _ in holder.named_parameters()}
        assert unfuse_experts(holder) == ["experts"]
        torch.testing.assert_close(holder["experts"](hidden, index, weights), wanted, rtol=0, atol=1e-5)
    kept = {n for n in names if "norm" in n}
    assert kept <= {n for n, _ in holder.named_parameters()}, "a norm keeps its name"
