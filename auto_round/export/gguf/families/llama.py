"""Llama 2 and 3, SmolLM2, Mistral and Mixtral: one architecture in llama.cpp, which rotates neighbouring rows."""

from __future__ import annotations

import math

import torch

from auto_round.export.gguf.families.shared import (
    DECODER,
    ROPE_DIMENSIONS,
    SILU,
    VOCABULARY,
    WHOLE_ROTATION,
    rope_types,
    rotary,
)
from auto_round.export.gguf.family import Family
from auto_round.export.gguf.settings import Settings


def llama3_factors(s: Settings) -> dict[str, torch.Tensor]:
    """float32 [head_dim / 2]: by what each rotary frequency is divided (Llama 3.1's scaling for long contexts).

    Wavelengths shorter than original / high keep their frequency, those longer than original / low are divided by the
    factor, and between them the share kept grows linearly with original / wavelength.
    """
    rope = s.rope
    if rope["rope_type"] != "llama3":
        return {}
    dims = s.head_dim
    frequencies = 1.0 / (
        float(rope.get("rope_theta", 10000.0)) ** (torch.arange(0, dims, 2, dtype=torch.float32) / dims)
    )
    factor, original = float(rope.get("factor", 8.0)), float(rope.get("original_max_position_embeddings", 8192))
    low, high = float(rope.get("low_freq_factor", 1.0)), float(rope.get("high_freq_factor", 4.0))
    turns = original / (2 * math.pi / frequencies)
    kept = (turns - low) / (high - low)
    between = 1 / ((1 - kept) / factor + kept)
    factors = torch.where(turns > high, torch.ones(()), torch.where(turns < low, torch.tensor(factor), between))
    return {"rope_freqs.weight": factors.float()}


ROPE = rope_types("default", "linear", "yarn", "llama3")
KEYS = (*DECODER, VOCABULARY, ROPE_DIMENSIONS)


def _windowed(s: Settings) -> bool:
    return bool(s.get("sliding_window")) and s.get("sliding_window") < s.get("max_position_embeddings", default=0)


LLAMA = Family(
    "llama", ("llama",), KEYS, rotary(), assumes=(SILU, ROPE, WHOLE_ROTATION), extras=llama3_factors
)  # fmt: skip
MISTRAL = Family(
    "llama", ("mistral",), KEYS, rotary(), assumes=(SILU, ROPE, WHOLE_ROTATION), extras=llama3_factors,
    notes=((_windowed, "llama.cpp lets Mistral's layers see the whole context, not only their window"),),
)  # fmt: skip
MIXTRAL = Family(
    "llama", ("mixtral",), KEYS, rotary(), assumes=(SILU, ROPE, WHOLE_ROTATION), extras=llama3_factors,
    notes=((_windowed, "llama.cpp lets Mixtral's layers see the whole context, not only their window"),),
)  # fmt: skip
