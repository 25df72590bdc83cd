"""Quantizing block by block: one block in memory at a time, streams, importance, NaN and Inf."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from auto_round.errors import NumericsError
from auto_round.modeling.checkpoint import CheckpointSource
from auto_round.run.block_layers import in_dtype


def real_blocks(source: Any) -> set[str]:
    return {
        name
        for name in source.blocks
        if any(not parameter.is_meta for parameter in source.model.get_submodule(name).parameters())
    }


@pytest.mark.parametrize("family", ["llama", "mixtral", "gpt-oss"])
@pytest.mark.parametrize("iters", [0, 1])
def test_a_model_given_by_path_is_never_whole_in_memory(
    family: str, iters: int, make: Callable[..., Any], packable_folder: Any, tmp_path: Path, monkeypatch: Any
) -> None:
    most = 0
    load = CheckpointSource.load

    def watched(self: CheckpointSource, name: str, device: Any = None) -> Any:
        nonlocal most
        module = load(self, name, device)
        most = max(most, len(real_blocks(self)))
        return module

    monkeypatch.setattr(CheckpointSource, "load", watched)
    folder = packable_folder(family, num_hidden_layers=3, layer_types=None) if family != "gpt-oss" else family
    ar = make(folder, iters=iters)
    source = ar._runs.source
    ar.quantize_and_save(tmp_path / "out", "auto_round,fake")
    assert most == 1
    assert not real_blocks(source)
    assert all(parameter.is_meta for parameter in source.model.parameters())


def test_later_blocks_are_tuned_on_what_the_quantized_ones_give(
    make: Callable[..., Any], monkeypatch: Any, tmp_path: Path
) -> None:
    from auto_round.algorithms.quantization.sign_round.loop import SignRoundQuantizer

    seen: dict[bool, list[Any]] = {True: [], False: []}
    original = SignRoundQuantizer.quantize_block
    for wanted in (True, False):

        def watched(self: Any, task: Any, wanted: bool = wanted) -> Any:
            seen[wanted].append((task.inputs.clone(), task.targets.clone()))
            return original(self, task)

        monkeypatch.setattr(SignRoundQuantizer, "quantize_block", watched)
        make("llama", iters=1, bits=2, enable_quanted_input=wanted).quantize_and_save(tmp_path / str(wanted))
    (first, target), (second, _) = seen[True]
    (plain_first, plain_target), (plain_second, plain_last) = seen[False]
    assert torch.equal(first, plain_first) and torch.equal(target, plain_target)
    assert torch.equal(plain_second, plain_target)  # the full-precision stream
    assert not torch.allclose(second, plain_second) and torch.allclose(second, plain_second, atol=3)
    assert torch.equal(seen[True][1][1], plain_last)  # the aim is the full-precision model either way


def test_importance_is_the_second_moment_of_the_full_precision_inputs(
    make: Callable[..., Any], packable_model: Any, token_ids: Any, monkeypatch: Any
) -> None:
    from auto_round.algorithms.quantization.rtn.quantizer import RTNQuantizer

    found: dict[str, torch.Tensor] = {}
    original = RTNQuantizer.quantize_block

    def watched(self: Any, task: Any) -> Any:
        found.update({layer.name: layer.importance for layer in task.layers})
        return original(self, task)

    monkeypatch.setattr(RTNQuantizer, "quantize_block", watched)
    model = packable_model("llama")
    name = "model.layers.1.mlp.down_proj"
    inputs: list[torch.Tensor] = []
    handle = model.get_submodule(name).register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    with torch.no_grad():
        for ids in token_ids:
            model(ids.view(1, -1))
    handle.remove()
    make("llama", iters=0).quantize()
    expected = torch.cat(inputs).double().square().flatten(0, 1).sum(0)
    ratio = found[name].double() / expected
    assert torch.allclose(ratio, ratio.mean().expand_as(ratio), rtol=1e-4)


def test_padded_and_unlabelled_positions_do_not_count(
    make: Callable[..., Any], weights_hash: Any, tmp_path: Path
) -> None:
    """A causal model's tail that is masked in the loss may hold anything."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 250, (8, 24), generator=generator)
    other = ids.clone()
    other[:, 16:] = torch.randint(3, 250, (8, 8), generator=generator)
    labels = torch.full_like(ids, -100)
    labels[:, :16] = 5
    hashes = []
    for number, (tokens, iters) in enumerate([(ids, 8), (other, 8), (ids, 0), (other, 0)]):
        data = [{"input_ids": t, "labels": k} for t, k in zip(tokens, labels, strict=True)]
        make("llama", dataset=data, iters=iters, bits=2, lr=0.02).quantize_and_save(tmp_path / str(number))
        hashes.append(weights_hash(tmp_path / str(number)))
    assert hashes[0] == hashes[1] and hashes[2] == hashes[3] and hashes[0] != hashes[2]


def test_an_expert_without_tokens_is_rounded(make: Callable[..., Any], packable_model: Any, logits: Any) -> None:
    model = packable_model("qwen3-moe")
    for layer in model.model.layers:
        layer.mlp.gate.weight.data.zero_()  # every token is routed to the same two experts
    quantized, layers = make(model, iters=2).quantize()
    assert bool(torch.isfinite(logits(quantized)).all())
    assert sum(entry["bits"] == 4 for entry in layers.values()) == 8 + 2 * 4 * 3


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("kind", ["path", "object"])
def test_a_damaged_weight_is_named(
    kind: str, value: float, make: Callable[..., Any], packable_model: Any, tmp_path: Path
) -> None:
    model = packable_model("llama")
    model.model.layers[1].mlp.up_proj.weight.data[3, 4] = value
    given: Any = model
    if kind == "path":
        model.save_pretrained(tmp_path / "bad")
        given = str(tmp_path / "bad")
    with pytest.raises(NumericsError, match="model.layers.1.mlp.up_proj.weight"):
        make(given, iters=0, disable_opt_rtn=True).quantize_and_save(tmp_path / "out")
    assert not list((tmp_path / "out").glob("*.safetensors"))


def test_activations_that_overflow_are_named(make: Callable[..., Any], packable_model: Any, tmp_path: Path) -> None:
    model = packable_model("llama")
    model.model.layers[1].mlp.down_proj.weight.data.fill_(1e38)
    with pytest.raises(NumericsError, match="model.layers.1"):
        make(model, iters=1).quantize_and_save(tmp_path / "out")


def test_a_failed_run_puts_the_users_model_back_together(make: Callable[..., Any], packable_model: Any) -> None:
    model = packable_model("llama")
    kinds = {name: type(module) for name, module in model.named_modules()}
    model.model.layers[1].mlp.up_proj.weight.data[3, 4] = float("nan")
    with pytest.raises(NumericsError):
        make(model, iters=1).quantize()
    assert {name: type(module) for name, module in model.named_modules()} == kinds
    assert not any("forward" in module.__dict__ for module in model.modules())
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "float32", torch.bfloat16])
def test_half_precision_models(
    dtype: Any, make: Callable[..., Any], logits: Any, tmp_path: Path, read_json: Any
) -> None:
    ar = make("llama", iters=1, model_dtype=dtype)
    _, folders = ar.quantize_and_save(tmp_path / "out", "auto_round,fake")
    stored = {"bf16": "bfloat16", "fp16": "float16"}.get(str(dtype), str(dtype).removeprefix("torch."))
    assert read_json(folders[0], "config.json")["dtype"] == stored
    packed, dense = logits(folders[0]), logits(folders[1])
    # A dense file rounds scale * (code - zero) to the model's dtype; a packed one does not.
    assert float((packed - dense).norm() / dense.norm()) < (1e-5 if stored == "float32" else 2e-2)


def test_a_block_in_another_dtype_for_a_while() -> None:
    block = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.LayerNorm(4)).to(torch.bfloat16)
    block.register_buffer("table", torch.arange(3))
    block[1].bias = torch.nn.Parameter(torch.full((4,), 1 + 2**-20))
    before = dict(block.state_dict(keep_vars=True))
    for other in (torch.float32, torch.float16):
        with in_dtype(block, torch.bfloat16, other):
            assert block[0].weight.dtype == other and block.table.dtype == torch.int64
            assert torch.equal(block[0].weight, before["0.weight"].to(other))
            assert block[1].bias.dtype == torch.float32  # what a model keeps exact stays so
        after = block.state_dict(keep_vars=True)
        assert all(after[name] is tensor for name, tensor in before.items())
