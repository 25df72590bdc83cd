"""Blocks run one at a time give what the whole model gives, in every family; where they cannot, an error names why."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from families import buildable, known_families, sample_ids

from auto_round.calibration.block_calls import SharedState
from auto_round.calibration.capture import CapturedInputs, capture_inputs
from auto_round.errors import AutoRoundError, ModelError, UnsupportedError
from auto_round.modeling.source import ModelSource, open_source

# Why the blocks of a family cannot be run one at a time, as the message says it.
REFUSED = {
    "blt": "several stacks of the same blocks",
    "dory": "runs its blocks in a cycle",
    "hrm_text": "several stacks of the same blocks",
    "reformer": "returns a ",
}


def samples(count: int = 3, length: int = 12) -> list[dict[str, torch.Tensor]]:
    return [{"input_ids": ids, "attention_mask": torch.ones_like(ids)} for ids in sample_ids(count, length, top=90)]


def by_blocks(source: ModelSource, captured: CapturedInputs, batch: int = 2) -> torch.Tensor:
    """Logits of all samples, each block run alone on batches of them."""
    hidden = captured.hidden[:].clone()
    state = SharedState(hidden)
    count = hidden.shape[0]
    with torch.no_grad():
        for index, name in enumerate(source.blocks):
            block = source.load(name)
            state.keep_only(captured.links.slots_needed_from(index))
            for rows in range(0, count, batch):
                some = list(range(rows, min(rows + batch, count)))
                hidden[some] = captured.run(index, block, hidden[some], some, state, True)
            source.release(name)
        return torch.cat([captured.run_head(source, hidden[[i]], [i]) for i in range(count)])


def whole(model: torch.nn.Module, given: list[dict[str, torch.Tensor]]) -> torch.Tensor:
    with torch.no_grad():
        return torch.cat([model(**{k: v[None] for k, v in one.items()}, use_cache=False).logits for one in given])


@pytest.mark.parametrize("name", buildable())
def test_blocks_one_at_a_time_give_the_models_logits(name: str) -> None:
    model = known_families()[name].build()
    expected = whole(model, samples())
    try:
        source = open_source(model)
        captured = capture_inputs(source, samples(), check_isolation=True)
    except AutoRoundError as error:
        assert name in REFUSED and REFUSED[name] in str(error), str(error)
        return
    assert name not in REFUSED
    assert torch.allclose(by_blocks(source, captured), expected, atol=2e-4 * float(expected.abs().max()))


def sharing(tiny_model: Any, use: Callable[..., Any], **extra: Any) -> torch.nn.Module:
    """A Llama whose blocks ask `use(index, hidden, output, store, kwargs)` for their output; they are given `extra`."""
    model = tiny_model("llama")
    kind = type(model.model.layers[0])
    store = SimpleNamespace()

    class Block(kind):  # type: ignore[misc,valid-type]
        def forward(self, hidden_states: torch.Tensor, **kwargs: Any) -> Any:
            output = super().forward(hidden_states, **{k: v for k, v in kwargs.items() if k not in extra})
            return use(self.self_attn.layer_idx, hidden_states, output, store, kwargs)

    class Model(type(model.model)):  # type: ignore[misc]
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return super().forward(*args, **kwargs, **{k: v() for k, v in extra.items()})

    for layer in model.model.layers:
        layer.__class__ = Block
        layer.store = store
    model.model.__class__ = Model
    return model


def first_is_added(index: int, hidden: torch.Tensor, output: torch.Tensor, store: Any, kwargs: Any) -> torch.Tensor:
    if index == 0:
        kwargs["shared"]["first"] = (output * 2, output + 1)
    return output + kwargs["shared"]["first"][0] if index else output


def outputs_are_listed(index: int, hidden: torch.Tensor, output: torch.Tensor, store: Any, kwargs: Any) -> torch.Tensor:
    total = output + sum(kwargs["shared"])
    kwargs["shared"].append(output * 0.5)
    return total


def in_an_object(index: int, hidden: torch.Tensor, output: torch.Tensor, store: Any, kwargs: Any) -> torch.Tensor:
    before = getattr(kwargs["shared"], "last", None)
    kwargs["shared"].last = output.transpose(0, 1)  # the batch is not in front
    return output if before is None else output + before.transpose(0, 1)


@pytest.mark.parametrize(
    ("use", "kind"), [(first_is_added, dict), (outputs_are_listed, list), (in_an_object, SimpleNamespace)]
)
def test_what_blocks_hand_on_in_an_object(use: Any, kind: Any, tiny_model: Any) -> None:
    model = sharing(tiny_model, use, shared=kind)
    expected = whole(model, samples())
    source = open_source(model)
    captured = capture_inputs(source, samples(), check_isolation=True)
    assert any(block.writes for block in captured.links.blocks)
    assert torch.allclose(by_blocks(source, captured), expected, atol=1e-4)
    assert not captured.links.slots_needed_from(len(source.blocks)), "nothing is kept that no block needs"


def in_place(index: int, hidden: torch.Tensor, output: torch.Tensor, store: Any, kwargs: Any) -> torch.Tensor:
    return hidden.mul_(0.5).add_(output)


def test_a_block_that_writes_into_its_hidden_states(tiny_model: Any) -> None:
    model = sharing(tiny_model, in_place)
    expected = whole(model, samples())
    source = open_source(model)
    captured = capture_inputs(source, samples(), check_isolation=True)
    before = captured.hidden[:].clone()
    assert torch.allclose(by_blocks(source, captured), expected, atol=1e-4)
    assert torch.equal(captured.hidden[:], before)


def by_attribute(index: int, hidden: torch.Tensor, output: torch.Tensor, store: Any, kwargs: Any) -> torch.Tensor:
    if index == 0:
        store.first = output
    return output + store.first if index == 2 else output


def writes_an_argument(index: int, hidden: torch.Tensor, output: torch.Tensor, store: Any, kwargs: Any) -> torch.Tensor:
    kwargs["position_embeddings"][0].mul_(1.001)
    return output


@pytest.mark.parametrize(
    ("use", "said"),
    [
        (by_attribute, r"'model\.layers\.2'.*cannot be run alone"),
        (writes_an_argument, r"'model\.layers\.0'.*changes one of its arguments in place"),
    ],
)
def test_what_cannot_be_run_alone_is_refused(use: Any, said: str, tiny_model: Any) -> None:
    with pytest.raises(UnsupportedError, match=rf"{said}.*model_free=True"):
        capture_inputs(open_source(sharing(tiny_model, use)), samples(), check_isolation=True)


def test_arguments_made_of_earlier_outputs_are_refused(tiny_model: Any) -> None:
    model = tiny_model("llama")

    class Model(type(model.model)):  # type: ignore[misc]
        def forward(self, input_ids: torch.Tensor, attention_mask: Any = None, **kwargs: Any) -> Any:
            from transformers.modeling_outputs import BaseModelOutputWithPast

            hidden = self.embed_tokens(input_ids)
            places = torch.arange(hidden.shape[1])[None]
            rope = self.rotary_emb(hidden, places)
            for layer in self.layers:
                rope = tuple(part + 0.01 * hidden.mean() for part in rope)
                hidden = layer(hidden, position_embeddings=rope)
            return BaseModelOutputWithPast(last_hidden_state=self.norm(hidden))

    model.model.__class__ = Model
    with pytest.raises(UnsupportedError, match=r"'model\.layers\.1'.*depend on what earlier blocks computed"):
        capture_inputs(open_source(model), samples(), check_isolation=True)


def test_blocks_in_a_cycle_are_refused_before_data_is_read(tmp_path: Path) -> None:
    from auto_round import AutoRound

    if "dory" not in known_families():
        pytest.skip("dory is not in this version of Transformers")
    folder = known_families()["dory"].save(tmp_path / "dory")
    read: list[int] = []
    samples = (read.append(1) or ids for ids in sample_ids(4))
    ar = AutoRound(str(folder), dataset=samples, iters=2, nsamples=4, seqlen=16, device_map="cpu")
    with pytest.raises(ModelError, match=r"runs its blocks in a cycle.*model_free=True.*iters=0"):
        ar.quantize_and_save(tmp_path / "out")
    assert not read
    AutoRound(str(folder), iters=0, disable_opt_rtn=True, group_size=32, device_map="cpu").quantize_and_save(
        tmp_path / "rounded"
    )


@pytest.mark.parametrize("name", ["deepseek_v4", "gemma3n_text", "xlnet", "llama"])
def test_samples_are_rows_of_tokens(name: str) -> None:
    source = open_source(known_families()[name].build())
    captured = capture_inputs(source, samples(3, 12))
    assert captured.hidden.shape[:2] == (3, 12) and captured.hidden.dim() == 3
    layout = captured.links.layout
    assert torch.equal(layout.rows(layout.hidden(captured.hidden[:])), captured.hidden[:])
