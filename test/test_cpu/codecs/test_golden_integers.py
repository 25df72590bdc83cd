"""Plain rounding gives the very integers, scales and zero points of checkpoints made by another implementation."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from auto_round.codecs.int import integer_qparams, to_codes
from auto_round.modeling.files.safetensors import TensorFiles

CASES = [
    ("w2a16-auto_round-group_size64", 2, 64, True),
    ("w3a16-auto_round", 3, 128, True),
    ("w3a16-auto_gptq", 3, 128, True),
    ("w4a16-auto_round", 4, 128, True),
    ("w4a16-auto_gptq", 4, 128, True),
    ("w4a16-auto_awq", 4, 128, True),
    ("w8a16-auto_round", 8, 128, True),
    ("w4a16-auto_gptq-symfalse", 4, 128, False),
    ("w4a16-auto_awq-symfalse", 4, 128, False),
    ("w4a16-auto_round_auto_awq-symfalse", 4, 128, False),
]
AWQ_PLACES = [0, 4, 1, 5, 2, 6, 3, 7]  # which nibble of the word holds the i-th value


def bit_stream(words: torch.Tensor, bits: int) -> torch.Tensor:
    """[n * 32 / bits, m] values from int32 words [n, m], the first value in the lowest bits."""
    unpacked = (words.unsqueeze(1) >> torch.arange(32, dtype=torch.int32).view(1, 32, 1)) & 1
    stream = unpacked.reshape(-1, bits, words.shape[1])
    return (stream << torch.arange(bits, dtype=torch.int32).view(1, bits, 1)).sum(1)


def nibbles(words: torch.Tensor) -> torch.Tensor:
    """[m, n * 8] values from AWQ words [m, n]."""
    return torch.stack([(words >> (4 * place)) & 15 for place in AWQ_PLACES], -1).view(words.shape[0], -1)


@pytest.mark.parametrize("name, bits, size, sym", CASES)
def test_integers_are_the_same(golden_folder: Path, name: str, bits: int, size: int, sym: bool) -> None:
    source = TensorFiles.open(golden_folder / "_source-tiny-llama")
    files = TensorFiles.open(golden_folder / name)
    layers = [key.removesuffix(".qweight") for key in files if key.endswith(".qweight")]
    assert len(layers) == 14
    for layer in layers:
        weight = source.read(f"{layer}.weight")
        qweight, qzeros = files.read(f"{layer}.qweight"), files.read(f"{layer}.qzeros")
        awq = qweight.shape[0] == weight.shape[1]
        codes = nibbles(qweight).T if awq else bit_stream(qweight, bits).T
        groups = weight.view(weight.shape[0], -1, size)
        grid = integer_qparams(groups, bits, sym)
        assert torch.equal(to_codes(groups, grid).view(weight.shape).int(), codes.int()), layer
        assert torch.equal(grid.scale.squeeze(-1).half(), files.read(f"{layer}.scales").T), layer
        zeros = nibbles(qzeros).T if awq else (bit_stream(qzeros.T.contiguous(), bits) + 1) % 2**bits
        expected = grid.zero.squeeze(-1) if isinstance(grid.zero, torch.Tensor) else torch.full_like(zeros, grid.zero)
        assert torch.equal(zeros.int(), expected.int()), layer
