from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from auto_round.errors import LibraryError, UnsupportedError
from auto_round.modeling.attention import (
    find_attention,
    head_counts,
    library_error,
    replace_argument,
    unrecognised_attention,
)

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
    with pytest.raises(UnsupportedError, match="Own does not say how many heads"):
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
    new_args, new_kwargs = replace_argument("cache", "new", module, args, kwargs)
    first, cache, last, more = module(*new_args, **new_kwargs)
    assert (first, cache, last) == (1, "new", kwargs.get("last", 0))
    assert more == {k: v for k, v in kwargs.items() if k == "more"}


class KeyValueCache:
    def update(self, keys: torch.Tensor, values: torch.Tensor, _layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        return keys, values


class ByUse(torch.nn.Module):
    def forward(self, hidden: torch.Tensor, memory: Any = None) -> torch.Tensor:
        keys, _ = (hidden, hidden) if memory is None else memory.update(hidden, hidden, 0)
        return keys


class ByType(torch.nn.Module):
    """The cache is assigned to another name before it is used."""

    def forward(self, hidden: torch.Tensor, *, memory: KeyValueCache | None = None, **_more: Any) -> torch.Tensor:
        current = memory
        return hidden if current is None else current.update(hidden, hidden, 0)[0]


class ByWrittenType(torch.nn.Module):
    def forward(self, hidden: torch.Tensor, memory: "typing.Optional[KeyValueCache]" = None) -> Any:  # type: ignore[name-defined]  # noqa: F821,UP037
        return self._keep(hidden, memory)

    def _keep(self, hidden: torch.Tensor, kept: Any) -> torch.Tensor:
        return hidden if kept is None else kept.update(hidden, hidden, 0)[0]


class ByName(torch.nn.Module):
    def forward(self, hidden: torch.Tensor, layer_cache=None):  # type: ignore[no-untyped-def]
        current = layer_cache or KeyValueCache()
        return current.update(hidden, hidden, 0)[0]


class State(torch.nn.Module):
    """Linear attention: it takes the same cache and keeps a state in it."""

    def forward(self, hidden: torch.Tensor, cache: KeyValueCache | None = None, **kwargs: Any) -> torch.Tensor:
        kwargs.update(more=1)
        return hidden if cache is None else cache.update_conv_state(hidden, 0)  # type: ignore[attr-defined]


class Block(torch.nn.Module):
    """Hands the cache on."""

    def __init__(self, inner: torch.nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, hidden: torch.Tensor, cache: KeyValueCache | None = None) -> torch.Tensor:
        return self.inner(hidden, cache)


@pytest.mark.parametrize(
    ("kind", "argument"), [(ByUse, "memory"), (ByType, "memory"), (ByWrittenType, "memory"), (ByName, "layer_cache")]
)
def test_a_cache_is_recognised_under_any_name(kind: type[torch.nn.Module], argument: str) -> None:
    (attention,) = find_attention(torch.nn.Sequential(Block(kind())))
    assert (attention.name, attention.cache) == ("0.inner", argument)
    assert attention.shows >= {"k", "v"}


def test_what_only_keeps_a_state_or_hands_the_cache_on_is_no_attention() -> None:
    assert find_attention(torch.nn.Sequential(Block(State()), Block(torch.nn.Identity()))) == []


def test_layers_that_share_keys_and_values_of_others_promise_none() -> None:
    layer = ByUse()
    layer.is_kv_shared_layer = True  # type: ignore[assignment]
    (attention,) = find_attention(torch.nn.Sequential(layer))
    assert attention.shows == frozenset()


class NewAttention(torch.nn.Module):
    layer_idx = 3

    def forward(self, hidden: torch.Tensor, store: Any = None) -> torch.Tensor:
        return hidden if store is None else store.append_states(hidden, hidden)


class LinearAttention(NewAttention):
    pass


def test_attention_that_nothing_recognises_has_a_name() -> None:
    block = torch.nn.Sequential(NewAttention(), LinearAttention(), torch.nn.Linear(2, 2))
    assert find_attention(block) == []
    assert unrecognised_attention([block]) == ["NewAttention"]
    assert unrecognised_attention([torch.nn.Sequential(State())]) == []


def test_an_error_of_ours_names_the_versions() -> None:
    import platform

    import transformers

    error = library_error("nothing was seen", "leave it out")
    assert isinstance(error, LibraryError) and error.exit_code == 10
    torch_version = torch.__version__.split("+")[0]
    for part in ("not of the model", f"torch {torch_version}", f"transformers {transformers.__version__}",
                 f"Python {platform.python_version()}", "auto-round 1", "report it", "leave it out"):  # fmt: skip
        assert part in str(error)
