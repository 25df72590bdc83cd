"""Fingerprints of layers in ggml types."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from auto_round.codecs.ggml.search import search_blocks
from auto_round.codecs.ggml.types import ggml_scheme
from auto_round.codecs.quantized_layer import QuantizedLayer
from auto_round.output.verify import dense_digest, layer_digest


@pytest.mark.parametrize("name", ["Q4_0", "Q5_1", "Q4_K", "Q6_K"])
def test_all_that_is_stored_counts(name: str) -> None:
    blocks = search_blocks(torch.randn(4, 512, generator=torch.Generator().manual_seed(0)), name)
    layer = QuantizedLayer("a", ggml_scheme(name), blocks)
    found = layer_digest(layer, False, torch.bfloat16)
    assert found == layer_digest(replace(layer, name="b"), False, torch.float32)
    others = set()
    for part in ("codes", "d", "scales", "dmin", "mins"):
        tensor = getattr(blocks, part)
        if tensor is not None:
            changed = tensor.clone()
            changed[-1, -1] = 3 if int(changed[-1, -1]) != 3 else 2
            others.add(layer_digest(replace(layer, codes=replace(blocks, **{part: changed})), False, torch.bfloat16))
    assert found not in others and len(others) == sum(
        part is not None for part in (blocks.codes, blocks.d, blocks.scales, blocks.dmin, blocks.mins)
    )
    dense = layer_digest(layer, True, torch.bfloat16)
    assert dense == dense_digest(blocks.dequantize().to(torch.bfloat16)) != found
