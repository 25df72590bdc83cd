"""What checkpoints call the modules of a model, where that is not what the model calls them."""

from __future__ import annotations

from pathlib import Path

import pytest
from families import buildable, known_families

from auto_round.modeling.source import open_source

NAMES = {
    # A block used twice, which is stored once: each place has its own name, by which layers are looked up.
    "zamba2": {
        f"model.layers.{place}.shared_transformer.{layer}": f"model.layers.{place}.shared_transformer.{layer}"
        for place in (1, 3)
        for layer in ("self_attn.q_proj", "feed_forward.gate_up_proj_adapter_list.0.0")
    },
    # A matrix that is a parameter in the files and a linear layer in the model.
    "inkling2_text": {
        "model.layers.1.self_attn.k_proj.sconv.weight_proj": "model.llm.layers.1.attn.k_sconv.weight_proj"
    },
    # Tied: the embedding is what is stored.
    "llama:tied": {"lm_head": "lm_head", "model.embed_tokens": "model.embed_tokens"},
}


@pytest.mark.parametrize("name", [name for name in NAMES if name in buildable()])
def test_modules_are_called_as_in_the_files(name: str, tmp_path: Path) -> None:
    naming = open_source(str(known_families()[name].save(tmp_path))).checkpoint_naming()
    assert {module: naming.module(module) for module in NAMES[name]} == NAMES[name]
