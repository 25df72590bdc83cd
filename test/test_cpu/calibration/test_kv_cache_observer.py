"""Keys, values and queries as the attention itself has them, against Transformers' own cache and plain formulas."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch

from auto_round.calibration.capture import capture_inputs
from auto_round.calibration.observers import KVCacheObserver, observe_kv_cache
from auto_round.errors import LibraryError, NumericsError, UnsupportedError
from auto_round.modeling.attention import find_attention
from auto_round.modeling.source import open_source
from auto_round.run.streams import Stream

IDS = torch.randint(3, 90, (5, 12), generator=torch.Generator().manual_seed(2))
FAMILIES = [
    "llama", "qwen2", "qwen3", "mistral", "phi", "gemma3", "mixtral", "qwen2-moe", "qwen3-next", "gpt-oss", "opt",
    "gpt2", "falcon-rotary", "falcon-alibi", "gpt-neox",
]  # fmt: skip
Seen = list[dict[str, torch.Tensor]]


def build(family: str, tiny_model: Callable[..., Any]) -> Any:
    if family != "gpt-neox":
        return tiny_model(family)
    import transformers

    config = transformers.GPTNeoXConfig(
        vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        max_position_embeddings=64,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return transformers.AutoModelForCausalLM.from_config(config).eval()


def observe(model: Any, samples: list[dict[str, torch.Tensor]], queries: bool = False, batch: int = 2) -> Seen:
    """What is observed in each block of a run in full precision."""
    source = open_source(model)
    captured = capture_inputs(source, samples)
    stream = Stream(captured, captured.hidden, batch)
    found: Seen = []
    for index, name in enumerate(source.blocks):
        block = source.load(name)
        with observe_kv_cache(find_attention(block), queries) as seen:
            stream.hidden = stream.after(index, block, torch.device("cpu"), torch.float32, (seen,))
        found.append(dict(seen))
    return found


def of_cache(model: Any, ids: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor] | None]:
    """Largest |key| and |value| of each head and layer, from the cache that Transformers fills."""
    from transformers import DynamicCache

    layers = model.config.num_hidden_layers
    largest: list[Any] = [None] * layers
    for sample in ids:
        # The model's own has other layers than these only for linear attention; for sliding windows it forgets.
        given = {} if "Next" in type(model).__name__ else {cache_name(model): DynamicCache()}
        with torch.no_grad():
            cache = model(sample[None], **given, use_cache=True)[cache_name(model)]
        for index in range(layers):
            if hasattr(cache, "key_cache"):  # a class of its own, as Qwen3-Next has in older Transformers
                keys, values = cache.key_cache[index], cache.value_cache[index]
            else:
                keys, values = (getattr(cache.layers[index], kind, None) for kind in ("keys", "values"))
            if keys is None:
                continue
            pair = keys.abs().amax((0, 2, 3)), values.abs().amax((0, 2, 3))
            old = largest[index]
            largest[index] = pair if old is None else tuple(map(torch.maximum, pair, old))
    return largest


def cache_name(model: Any) -> str:
    """What a whole model calls its cache; that changes with Transformers' version."""
    parameters = inspect.signature(model.forward).parameters
    return next(name for name, parameter in parameters.items() if "Cache" in str(parameter.annotation))


@pytest.mark.parametrize("family", FAMILIES)
def test_what_goes_into_the_cache(family: str, tiny_model: Callable[..., Any]) -> None:
    found = observe(build(family, tiny_model), [{"input_ids": ids} for ids in IDS])
    wanted = of_cache(build(family, tiny_model), IDS)
    assert any(w is not None for w in wanted)
    for seen, pair in zip(found, wanted, strict=True):
        assert (pair is None) == (not seen)
        if pair is not None:
            name = next(iter(seen)).rpartition(".")[0]
            assert set(seen) == {f"{name}.k", f"{name}.v"}
            torch.testing.assert_close(seen[f"{name}.k"], pair[0], rtol=2e-4, atol=1e-5)
            torch.testing.assert_close(seen[f"{name}.v"], pair[1], rtol=2e-4, atol=1e-5)


def rotated(states: torch.Tensor, theta: float = 10000.0) -> torch.Tensor:
    """Rotary embedding of [B, heads, T, D], pairs half a head apart."""
    half = states.shape[-1] // 2
    angles = torch.arange(states.shape[2])[:, None] * theta ** (-torch.arange(half) / half)
    first, second = states[..., :half], states[..., half:]
    return torch.cat(
        (first * angles.cos() - second * angles.sin(), second * angles.cos() + first * angles.sin()), dim=-1
    )


def test_llama_by_plain_hooks_and_a_formula(tiny_model: Callable[..., Any]) -> None:
    """Outputs of the projections, rotated by hand; every sample counts, whatever the batches."""
    model = tiny_model("llama")
    seen: dict[str, torch.Tensor] = {}

    def hook(name: str, heads: int, rotate: bool) -> Any:
        def after(_module: Any, _args: Any, output: torch.Tensor) -> None:
            states = output.unflatten(-1, (heads, 8)).transpose(1, 2)
            largest = (rotated(states) if rotate else states).abs().amax((0, 2, 3))
            seen[name] = torch.maximum(largest, seen.get(name, torch.zeros(heads)))

        return after

    handles = []
    for index, layer in enumerate(model.model.layers):
        attention = layer.self_attn
        for leaf, heads, rotate in (("q", 4, True), ("k", 2, True), ("v", 2, False)):
            module = getattr(attention, f"{leaf}_proj")
            handles.append(module.register_forward_hook(hook(f"{index}.{leaf}", heads, rotate)))
    with torch.no_grad():
        for ids in IDS:
            model(ids[None])
    for handle in handles:
        handle.remove()
    for batch in (1, 2, 5):
        found = observe(tiny_model("llama"), [{"input_ids": ids} for ids in IDS], queries=True, batch=batch)
        for index, block in enumerate(found):
            assert set(block) == {f"self_attn.{leaf}" for leaf in "qkv"}
            for leaf in "qkv":
                torch.testing.assert_close(block[f"self_attn.{leaf}"], seen[f"{index}.{leaf}"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["qwen3", "gemma3", "phi", "mixtral", "gpt-neox", "opt", "gpt2"])
def test_queries_as_the_attention_function_gets_them(
    family: str, implementation: str, tiny_model: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compared with the function's own first argument, where PyTorch or the model's file is called with it."""
    model = build(family, tiny_model)
    model.set_attn_implementation(implementation)
    found = observe(model, [{"input_ids": ids} for ids in IDS], queries=True)
    assert model.config._attn_implementation == implementation
    largest: list[torch.Tensor] = []

    def note(query: torch.Tensor) -> None:
        largest.append(query.abs().amax((0, 2, 3)))

    if implementation == "sdpa":
        original = torch.nn.functional.scaled_dot_product_attention

        def watched(query: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            note(query)
            return original(query, *args, **kwargs)

        monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", watched)
    else:
        import sys

        file = sys.modules[type(model).__module__]
        eager = file.eager_attention_forward

        def eager_watched(module: Any, query: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            note(query)
            return eager(module, query, *args, **kwargs)

        monkeypatch.setattr(file, "eager_attention_forward", eager_watched)
    with torch.no_grad():
        for ids in IDS:
            model(ids[None])
    layers = len(found)
    for index, seen in enumerate(found):
        name = next(key for key in seen if key.endswith(".q"))
        wanted = torch.stack(largest[index::layers]).amax(0)
        torch.testing.assert_close(seen[name], wanted, rtol=2e-4, atol=1e-5)


def test_padding_is_left_out_and_prompts_are_not(tiny_model: Callable[..., Any]) -> None:
    """A position without a loss (label -100) is in the cache too; one that is only padding is not."""
    plain = observe(tiny_model("llama"), [{"input_ids": ids} for ids in IDS])
    mask = torch.ones(12, dtype=torch.long)
    labels = torch.full((12,), -100)
    assert_same(plain, observe(tiny_model("llama"), [{"input_ids": i, "labels": labels} for i in IDS]))
    padded = []
    for ids in IDS:
        longer = torch.cat((ids, torch.full((4,), 95)))
        padded.append({"input_ids": longer, "attention_mask": torch.cat((mask, torch.zeros(4, dtype=torch.long)))})
    assert_same(plain, observe(tiny_model("llama"), padded))


def assert_same(one: Seen, other: Seen) -> None:
    for first, second in zip(one, other, strict=True):
        for name in first:
            torch.testing.assert_close(first[name], second[name], rtol=1e-4, atol=1e-6)


def test_everything_is_put_back(tiny_model: Callable[..., Any]) -> None:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    model = tiny_model("llama")
    table, chosen = dict(ALL_ATTENTION_FUNCTIONS), model.config._attn_implementation
    attentions = find_attention(model.model.layers[0])
    with pytest.raises(RuntimeError, match="stop"), observe_kv_cache(attentions, queries=True):
        assert model.config._attn_implementation != chosen
        raise RuntimeError("stop")
    assert dict(ALL_ATTENTION_FUNCTIONS) == table and model.config._attn_implementation == chosen
    assert not attentions[0].module._forward_pre_hooks


def test_the_numbers_of_the_block_do_not_change(tiny_model: Callable[..., Any]) -> None:
    source = open_source(tiny_model("gemma3"))
    captured = capture_inputs(source, [{"input_ids": ids} for ids in IDS])
    with torch.no_grad():
        for index, name in enumerate(source.blocks):
            block = source.load(name)
            before = captured.run(index, block, captured.hidden, range(5))
            with observe_kv_cache(find_attention(block), queries=True):
                assert torch.equal(captured.run(index, block, captured.hidden, range(5)), before)


@pytest.mark.parametrize("family", ["falcon-rotary", "falcon-alibi"])
def test_queries_of_attention_without_the_table_are_refused(family: str, tiny_model: Callable[..., Any]) -> None:
    found = observe(tiny_model(family), [{"input_ids": IDS[0]}], queries=True)
    seen = KVCacheObserver()
    seen.update(found[0])
    seen.of("self_attention.k", len(found[0]["self_attention.k"]))
    with pytest.raises(UnsupportedError, match="does not use Transformers' table"):
        seen.of("self_attention.q", 4)


class Odd(torch.nn.Module):
    """An attention that asks its cache for something else."""

    def forward(self, hidden_states: torch.Tensor, past_key_values: Any = None) -> torch.Tensor:
        if past_key_values is not None:
            past_key_values.shared_layers[0] = hidden_states
        return hidden_states


def test_another_kind_of_cache_is_refused() -> None:
    block = torch.nn.Sequential(Odd())
    with (
        pytest.raises(UnsupportedError, match="reads 'shared_layers' of its key-value cache"),
        observe_kv_cache(find_attention(block)),
    ):
        block(torch.ones(1, 2, 3))


def test_values_that_cannot_be_used() -> None:
    seen = KVCacheObserver()
    with pytest.raises(UnsupportedError, match="does not cache"):
        seen.add("a.k", torch.ones(2, 3))
    seen.add("a.k", torch.ones(1, 2, 3, 4))
    with pytest.raises(UnsupportedError, match="caches 2 heads, its configuration says 4"):
        seen.of("a.k", 4)
    with pytest.raises(UnsupportedError, match="a.v: this attention passes nothing"):
        seen.of("a.v", 2)
    with pytest.raises(UnsupportedError, match="changes from call to call"):
        seen.add("a.k", torch.ones(1, 3, 3, 4))
    seen.add("a.k", torch.full((1, 2, 3, 4), torch.inf))
    with pytest.raises(NumericsError, match="NaN or Inf in the states of attention 'a.k'"):
        seen.of("a.k", 2)


class Renamed(torch.nn.Module):
    """An attention whose code hands keys and values to its cache, but not in this call."""

    def forward(self, hidden: torch.Tensor, cache: Any = None) -> torch.Tensor:
        if hidden.sum() > 1e9:
            cache.update(hidden, hidden, 0)
        return hidden


def test_an_attention_that_showed_nothing_is_an_error_of_ours() -> None:
    """Its code says that it hands keys and values to a cache, so that a lack cannot be the model's."""
    block = torch.nn.Sequential(Renamed())
    with observe_kv_cache(find_attention(block)) as seen:
        block(torch.ones(1, 2, 3))
    with pytest.raises(LibraryError, match=rf"0.k: .*none of the states.*torch {torch.__version__.split('+')[0]}"):
        seen.of("0.k", 2)
    with pytest.raises(UnsupportedError, match="does not use Transformers' table"):
        seen.of("0.q", 2)


def test_keys_and_values_are_seen_whatever_the_arguments_are_called() -> None:
    class Attention(torch.nn.Module):
        def forward(self, hidden: torch.Tensor, cache: Any = None) -> Any:
            return cache.update(new_keys=hidden, new_values=2 * hidden, layer=0)[1]

    block = torch.nn.Sequential(Attention())
    with observe_kv_cache(find_attention(block)) as seen:
        assert torch.equal(block(torch.ones(1, 2, 3, 4)), 2 * torch.ones(1, 2, 3, 4))
    assert {name: states.tolist() for name, states in seen.items()} == {"0.k": [1.0, 1.0], "0.v": [2.0, 2.0]}
