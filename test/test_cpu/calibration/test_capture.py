from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from auto_round.calibration.capture import CapturedInputs, capture_inputs
from auto_round.errors import DataError, ModelError, NumericsError, UnsupportedError
from auto_round.modeling.partial_loading import non_block_loaded
from auto_round.modeling.source import ModelSource, open_source

FAMILIES = [
    "llama", "llama-tied", "qwen2", "qwen3", "opt", "gpt2", "gemma3", "phi", "mistral", "falcon-alibi",
    "falcon-rotary", "mixtral", "qwen2-moe", "qwen3-moe", "gpt-oss", "qwen3-next", "olmo-hybrid",
]  # fmt: skip
LENGTH = 11


def make_samples(count: int = 4, masks: str = "none", seed: int = 0) -> list[dict[str, torch.Tensor]]:
    """masks: "none" (no key), "ones", "left", "right" or "mixed" (some samples padded, on either side)."""
    generator = torch.Generator().manual_seed(seed)
    samples = []
    for index in range(count):
        sample = {"input_ids": torch.randint(3, 96, (LENGTH,), generator=generator)}
        if masks != "none":
            mask = torch.ones(LENGTH, dtype=torch.int64)
            if masks == "left" or masks == "mixed" and index % 3 == 1:
                mask[: 2 + index % 3] = 0
            if masks == "right" or masks == "mixed" and index % 3 == 2:
                mask[LENGTH - 3 :] = 0
            sample["attention_mask"] = mask
        samples.append(sample)
    return samples


def stack(samples: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    return {key: torch.stack([s[key] for s in samples]) for key in samples[0]}


def run_blocks(source: ModelSource, captured: CapturedInputs, indices: list[int]) -> torch.Tensor:
    hidden = captured.hidden[indices]
    for i, name in enumerate(source.blocks):
        block = source.load(name)
        with torch.no_grad():
            hidden = captured.run(i, block, hidden, indices)
        source.release(name)
    return hidden


def reference(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.mark.parametrize("masks", ["none", "mixed"])
@pytest.mark.parametrize("family", FAMILIES)
def test_walk_equals_the_whole_model(family: str, masks: str, tiny_folder: Callable[..., Path]) -> None:
    folder = tiny_folder(family)
    samples = make_samples(4, masks)
    source = open_source(folder)
    captured = capture_inputs(source, samples)
    order = [2, 0, 1, 3]
    hidden = run_blocks(source, captured, order)
    with torch.no_grad():
        logits = captured.run_head(source, hidden, order)
        head_in = captured.run_head(source, hidden, order, stop_at="lm_head")
        model = reference(folder)
        batch = stack([samples[i] for i in order])
        wanted = model(**batch).logits
    counted = captured.loss_mask[order]
    torch.testing.assert_close(logits[counted], wanted[counted], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(model.lm_head(head_in)[counted], wanted[counted], rtol=1e-4, atol=1e-4)
    assert all(p.is_meta for p in source.model.parameters()), "no weights may be left after the run"


def test_every_block_gets_its_own_arguments_and_masks_stay_boolean(tiny_folder: Callable[..., Path]) -> None:
    source = open_source(tiny_folder("gemma3"))
    captured = capture_inputs(source, make_samples(2, "left"))
    local, full = captured._calls[0][0].build()[1], captured._calls[2][0].build()[1]
    assert local["attention_mask"].dtype == full["attention_mask"].dtype == torch.bool
    assert not torch.equal(local["attention_mask"], full["attention_mask"]), "the window is 4 of 11 tokens"
    assert not torch.equal(local["position_embeddings"][0], full["position_embeddings"][0]), "rope bases differ"
    assert torch.equal(local["attention_mask"], captured._calls[1][0].build()[1]["attention_mask"])


def test_sliding_window_without_padding_keeps_its_boolean_mask(tiny_folder: Callable[..., Path]) -> None:
    captured = capture_inputs(open_source(tiny_folder("mistral")), make_samples(2))
    mask = captured._calls[0][0].build()[1]["attention_mask"]
    assert mask.dtype == torch.bool and mask[..., LENGTH - 1, :].sum() == 4


def test_equal_arguments_are_held_once(tiny_folder: Callable[..., Path]) -> None:
    captured = capture_inputs(open_source(tiny_folder("gemma3")), make_samples(6, "ones"))
    tensors = {id(leaf) for calls in captured._calls for call in calls for leaf in call.leaves}
    uses = sum(len(call.leaves) for calls in captured._calls for call in calls)
    positions = uses - 6 * (3 * 4 + 3)  # three local layers with a mask, a full one without
    assert positions in (0, 6 * 4), "older Transformers hand each block the positions in the cache too"
    assert len(tensors) == 6 + bool(positions)


@pytest.mark.parametrize("family", ["llama-tied", "gpt2", "falcon-alibi", "mixtral"])
def test_a_live_model_is_walked_in_place(family: str, tiny_model: Callable[..., Any]) -> None:
    model = tiny_model(family)
    samples = make_samples(3, "mixed")
    with torch.no_grad():
        wanted = model(**stack(samples)).logits
    source = open_source(model)
    assert source.model is model
    weights = [p for p in model.parameters()]
    captured = capture_inputs(source, samples)
    hidden = run_blocks(source, captured, [0, 1, 2])
    with torch.no_grad():
        logits = captured.run_head(source, hidden, [0, 1, 2])
        again = model(**stack(samples)).logits
    kept = captured.loss_mask
    torch.testing.assert_close(logits[kept], wanted[kept], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(again[kept], wanted[kept], rtol=1e-4, atol=1e-4)
    assert all(a is b for a, b in zip(weights, model.parameters(), strict=True))


def test_batches_of_any_composition_give_the_same_rows(tiny_folder: Callable[..., Path]) -> None:
    source = open_source(tiny_folder("qwen2"))
    captured = capture_inputs(source, make_samples(5, "mixed"))
    together = run_blocks(source, captured, [4, 1, 0, 3, 2])
    alone = torch.cat([run_blocks(source, captured, [i]) for i in (4, 1, 0, 3, 2)])
    kept = captured.loss_mask[[4, 1, 0, 3, 2]]
    torch.testing.assert_close(together[kept], alone[kept], rtol=1e-4, atol=1e-5)


def test_gradients_flow_through_run(tiny_folder: Callable[..., Path]) -> None:
    source = open_source(tiny_folder("qwen3-moe"))
    captured = capture_inputs(source, make_samples(3, "mixed"))
    hidden = captured.hidden.clone().requires_grad_()
    captured.run(0, source.load(source.blocks[0]), hidden, [0, 1, 2]).square().mean().backward()
    assert hidden.grad is not None and hidden.grad.abs().sum(dim=(1, 2)).min() > 0


def test_run_follows_the_dtype_of_the_stream(tiny_folder: Callable[..., Path]) -> None:
    """Alibi is added to the scores as a float mask, which must have the dtype of the queries."""
    source = open_source(tiny_folder("falcon-alibi"), dtype="bfloat16")
    captured = capture_inputs(source, make_samples(2, "mixed"))
    assert captured.hidden.dtype == torch.bfloat16
    block = source.load(source.blocks[0]).float()
    assert captured.run(0, block, captured.hidden.float(), [0, 1]).dtype == torch.float32


def forwards_are_restored(source: ModelSource) -> bool:
    modules = [source.model.get_submodule(name) for name in source.blocks]
    hooked = [m for m in source.model.modules() if m._forward_pre_hooks]
    return all("forward" not in m.__dict__ for m in modules) and not hooked


def test_recorders_are_removed_also_after_an_error(tiny_model: Callable[..., Any]) -> None:
    model = tiny_model("llama")
    source = open_source(model)
    captured = capture_inputs(source, make_samples(2))
    assert forwards_are_restored(source)

    def broken(*_args: object) -> None:
        raise RuntimeError("on purpose")

    handle = model.model.rotary_emb.register_forward_pre_hook(broken)
    with pytest.raises(RuntimeError, match="on purpose"):
        capture_inputs(source, make_samples(2))
    with pytest.raises(RuntimeError, match="on purpose"):
        captured.run_head(source, captured.hidden, [0, 1])
    handle.remove()
    assert forwards_are_restored(source)


def test_weights_are_released_after_an_error(tiny_folder: Callable[..., Path]) -> None:
    source = open_source(tiny_folder("llama"))

    def broken(*_args: object) -> None:
        raise RuntimeError("on purpose")

    source.model.model.layers[0].mlp.register_forward_pre_hook(broken)
    with pytest.raises(RuntimeError, match="on purpose"):
        capture_inputs(source, make_samples(2))
    assert all(p.is_meta for p in source.model.parameters())


def test_a_forward_of_the_users_own_is_put_back(tiny_model: Callable[..., Any]) -> None:
    model = tiny_model("llama")
    own = model.model.layers[1].forward
    model.model.layers[1].forward = own
    capture_inputs(open_source(model), make_samples(1))
    assert model.model.layers[1].__dict__["forward"] is own


def test_loss_mask_leaves_out_padding_and_ignored_labels(tiny_folder: Callable[..., Path]) -> None:
    samples = make_samples(2, "ones")
    samples[0]["attention_mask"][:3] = 0
    samples[0]["labels"] = samples[0]["input_ids"].clone()
    samples[0]["labels"][5] = -100
    samples[1]["labels"] = samples[1]["input_ids"].clone()
    captured = capture_inputs(open_source(tiny_folder("llama")), samples)
    assert captured.loss_mask.dtype == torch.bool
    assert captured.loss_mask[0].nonzero().flatten().tolist() == [3, 4, 6, 7, 8, 9, 10]
    assert captured.loss_mask[1].all()


@pytest.mark.parametrize("bounded", [False, True])
def test_what_is_loaded_for_a_pass(bounded: bool, tiny_folder: Callable[..., Path], monkeypatch: Any) -> None:
    source = open_source(tiny_folder("llama"))
    source.bounded = bounded
    asked: list[str] = []
    load = source.load
    monkeypatch.setattr(source, "load", lambda name, device=None: (asked.append(name), load(name, device))[1])
    captured = capture_inputs(source, make_samples(3))
    head = [] if bounded else ["lm_head"]
    assert asked == ["model.embed_tokens", "model.norm", *head, "model.layers.0"]
    asked.clear()
    with non_block_loaded(source):
        for i in range(3):
            captured.run_head(source, captured.hidden[[i]], [i])
    assert asked == ["model.embed_tokens", "model.norm", "lm_head"], "read once for all batches"
    assert all(p.is_meta for p in source.model.parameters())


def test_what_was_loaded_before_stays(tiny_folder: Callable[..., Path]) -> None:
    source = open_source(tiny_folder("llama"))
    embedding = source.load("model.embed_tokens")
    capture_inputs(source, make_samples(1))
    assert not embedding.weight.is_meta


def test_one_block_is_enough(tiny_model: Callable[..., Any]) -> None:
    model = tiny_model("falcon-rotary", num_hidden_layers=1)
    samples = make_samples(2)
    source = open_source(model)
    captured = capture_inputs(source, samples)
    with torch.no_grad():
        hidden = captured.run(0, source.load(source.blocks[0]), captured.hidden, [0, 1])
        logits = captured.run_head(source, hidden, [0, 1])
        torch.testing.assert_close(logits, model(**stack(samples)).logits, rtol=1e-4, atol=1e-5)


def test_bad_samples_are_refused(tiny_folder: Callable[..., Path]) -> None:
    source = open_source(tiny_folder("llama"))
    with pytest.raises(DataError, match="no calibration samples"):
        capture_inputs(source, [])
    with pytest.raises(DataError, match="sample 1 differs"):
        capture_inputs(source, [{"input_ids": torch.arange(4)}, {"input_ids": torch.arange(5)}])
    with pytest.raises(DataError, match="input_ids"):
        capture_inputs(source, [{"tokens": torch.arange(4)}])
    captured = capture_inputs(source, make_samples(2))
    with pytest.raises(DataError, match="2 sample"):
        captured.run(0, source.load(source.blocks[0]), captured.hidden[:1], [0, 1])


def test_a_model_that_changes_the_stream_between_blocks_is_refused(tiny_model: Callable[..., Any]) -> None:
    model = tiny_model("llama")
    model.model.layers[1].register_forward_hook(lambda _m, _a, out: out + 1)
    with pytest.raises(UnsupportedError, match="changes the hidden states.*model.layers.2"):
        capture_inputs(open_source(model), make_samples(1))


def test_a_block_that_never_runs_is_an_error(tiny_model: Callable[..., Any]) -> None:
    model = tiny_model("llama")
    model.config.num_hidden_layers = model.model.config.num_hidden_layers = 2
    with pytest.raises(ModelError, match=r"never called its last block 'model.layers.2'"):
        capture_inputs(open_source(model), make_samples(1))


def test_nan_before_the_blocks_is_named(tiny_model: Callable[..., Any]) -> None:
    model = tiny_model("llama")
    source = open_source(model)
    samples = make_samples(2)
    samples[1]["input_ids"][3] = 7
    samples[0]["input_ids"][samples[0]["input_ids"] == 7] = 8
    model.model.embed_tokens.register_forward_hook(
        lambda _m, a, out: out.masked_fill((a[0] == 7).unsqueeze(-1), torch.nan)
    )
    with pytest.raises(NumericsError, match="sample 1"):
        capture_inputs(source, samples)
