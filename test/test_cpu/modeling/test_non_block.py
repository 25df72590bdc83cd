"""Modules outside the blocks have values when a forward reads their weights before it calls them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from auto_round.calibration.capture import capture_inputs
from auto_round.errors import ModelError
from auto_round.modeling.partial_loading import deferred_modules, non_block_loaded
from auto_round.modeling.source import ModelSource, open_source

READS = {
    "llama": ["model.embed_tokens", "model.norm", "lm_head"],
    "llama-tied": ["model.embed_tokens", "lm_head"],
    "opt": ["model.decoder.embed_positions", "model.decoder.project_in", "lm_head"],
    "gemma4_text": ["model.embed_tokens_per_layer", "model.per_layer_model_projection"],
}


def samples(count: int = 2, length: int = 12) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [{"input_ids": torch.randint(3, 90, (length,), generator=generator)} for _ in range(count)]


def reading(source: ModelSource, name: str) -> None:
    """Let the model's forward move its ids to where the weights of a module are, as Llama 4 does."""

    class Reader(type(source.model)):  # type: ignore[misc]
        def forward(self, input_ids: torch.Tensor, **kwargs: Any) -> Any:
            tensors = [*self.get_submodule(name).parameters(), *self.get_submodule(name).buffers()]
            return super().forward(input_ids=input_ids.to(tensors[0].device), **kwargs)

    source.model.__class__ = Reader


@pytest.fixture
def folder(tiny_folder: Callable[..., Path], tmp_path: Path) -> Callable[[str], Path]:
    def find(family: str) -> Path:
        from families import known_families

        return known_families()[family].save(tmp_path / family) if family == "gemma4_text" else tiny_folder(family)

    return find


@pytest.mark.parametrize(("family", "name"), [(f, n) for f, names in READS.items() for n in [*names, "rotary"]])
def test_ids_that_follow_a_weight_keep_their_values(family: str, name: str, folder: Callable[[str], Path]) -> None:
    if name == "rotary":
        name = "model.rotary_emb" if family != "opt" else "model.decoder.embed_tokens"
    path = folder(family)
    expected = capture_inputs(open_source(path), samples())
    source = open_source(path)
    reading(source, name)
    captured = capture_inputs(source, samples())
    assert torch.equal(captured.hidden[:], expected.hidden[:])
    assert all(p.is_meta for p in source.model.parameters()), "and all is given back"


def test_a_tensor_without_values_is_an_error(tiny_folder: Callable[..., Path]) -> None:
    source = open_source(tiny_folder("llama"))
    source.bounded = True
    reading(source, "lm_head")
    with pytest.raises(ModelError, match=r"'model.embed_tokens'.*on meta.*without max_memory"):
        capture_inputs(source, samples())
    assert all(p.is_meta for p in source.model.parameters())


def test_a_block_that_is_given_no_values_is_an_error(tiny_folder: Callable[..., Path]) -> None:
    source = open_source(tiny_folder("llama"))

    class Reader(type(source.model.model)):  # type: ignore[misc,name-defined]
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return super().forward(*args, **kwargs, extra=self.layers[1].mlp.up_proj.weight[:1])

    source.model.model.__class__ = Reader
    with pytest.raises(ModelError, match=r"'model.layers.0'.*on meta.*model_free"):
        capture_inputs(source, samples())


def test_a_bounded_run_loads_the_head_when_it_is_called(tiny_folder: Callable[..., Path]) -> None:
    source = open_source(tiny_folder("llama"))
    assert deferred_modules(source) == set()
    source.bounded = True
    assert deferred_modules(source) == {"lm_head"}
    with non_block_loaded(source):
        assert source.model.lm_head.weight.is_meta
        assert not source.model.model.embed_tokens.weight.is_meta
    assert source.model.model.embed_tokens.weight.is_meta


def test_towers_that_text_does_not_reach_are_not_read(tmp_path: Path) -> None:
    from families import known_families

    source = open_source(known_families()["gemma3"].save(tmp_path / "gemma3"))
    assert source.blocks[0] == "model.language_model.layers.0"
    later = deferred_modules(source)
    assert "model.vision_tower.embeddings.patch_embedding" in later and "lm_head" not in later
    with non_block_loaded(source):
        assert source.model.model.vision_tower.embeddings.patch_embedding.weight.is_meta
