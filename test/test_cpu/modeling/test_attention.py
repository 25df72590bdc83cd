from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from auto_round.errors import UnsupportedError
from auto_round.modeling.attention import find_attention, head_counts, with_argument

# family: (names in a block, query heads, key-value heads)
WANTED = {
    "llama": (["self_attn"], 4, 2), "qwen3": (["self_attn"], 4, 2), "opt": (["self_attn"], 4, 4),
    "gpt2": (["attn"], 4, 4), "gemma3": (["self_attn"], 4, 2), "phi": (["self_attn"], 4, 4),
    "falcon-rotary": (["self_attention"], 4, 2), "falcon-alibi": (["self_attention"], 4, 4),
    "mixtral": (["self_attn"], 4, 2), "gpt-oss": (["self_attn"], 4, 2),
}  # fmt: skip


@pytest.mark.parametrize("family", WANTED)
def test_attention_is_found_by_structure(family: str, tiny_model: Callable[..., Any]) -> None:
    from auto_round.modeling.blocks import find_blocks

    model = tiny_model(family)
    names, heads, key_values = WANTED[family]
    found = find_attention(model.get_submodule(find_blocks(model)[0]))
    assert [a.name for a in found] == names
    assert [head_counts(a, model.config) for a in found] == [(heads, key_values)]


def test_blocks_of_linear_attention_have_none(tiny_model: Callable[..., Any]) -> None:
    layers = tiny_model("qwen3-next").model.layers
    assert [[a.name for a in find_attention(layer)] for layer in layers] == [[], ["self_attn"], []]


def test_latent_attention_is_refused() -> None:
    import transformers

    config = transformers.DeepseekV3Config(
        vocab_size=32, hidden_size=16, intermediate_size=16, moe_intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, n_routed_experts=2, kv_lora_rank=8, q_lora_rank=8,
        qk_rope_head_dim=4, qk_nope_head_dim=4, v_head_dim=4, n_group=1, topk_group=1, num_experts_per_tok=1,
    )  # fmt: skip
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    (attention,) = find_attention(model.model.layers[0])
    with pytest.raises(UnsupportedError, match="DeepseekV3Attention caches compressed latents"):
        head_counts(attention, model.config)


def test_heads_that_nobody_tells() -> None:
    class Own(torch.nn.Module):
        def forward(self, hidden: torch.Tensor, layer_past: Any = None) -> torch.Tensor:
            return hidden

    (attention,) = find_attention(torch.nn.Sequential(Own()))
    assert attention.cache == "layer_past"
    with pytest.raises(UnsupportedError, match="Own does not tell how many heads"):
        head_counts(attention, object())


@pytest.mark.parametrize(
    ("args", "kwargs"),
    [((1,), {}), ((1, None), {"last": 3}), ((1,), {"cache": None, "last": 3, "more": 4}), ((), {"first": 1})],
)
def test_an_argument_is_replaced_however_it_is_passed(args: Any, kwargs: dict[str, Any]) -> None:
    class Module(torch.nn.Module):
        def forward(self, first: int, cache: Any = None, last: int = 0, **more: int) -> Any:
            return first, cache, last, more

    module = Module()
    new_args, new_kwargs = with_argument(module, "cache", "new", args, kwargs)
    first, cache, last, more = module(*new_args, **new_kwargs)
    assert (first, cache, last) == (1, "new", kwargs.get("last", 0))
    assert more == {k: v for k, v in kwargs.items() if k == "more"}
