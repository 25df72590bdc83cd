"""Codes of ggml blocks by error feedback and coordinate descent, for tests of both."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from auto_round.algorithms.descent import descend_codes
from auto_round.algorithms.gptq import HessianFactor, gptq_codes
from auto_round.codecs.base import Grid
from auto_round.codecs.ggml.types import GgmlBlocks, ggml_scheme
from auto_round.codecs.kinds import GgmlCodec


def grid_of(blocks: GgmlBlocks) -> Grid:
    return GgmlCodec(ggml_scheme(blocks.kind.name), blocks.kind).grid(blocks, blocks.shape)


def gptq_blocks(weight: torch.Tensor, blocks: GgmlBlocks, factors: Sequence[HessianFactor]) -> GgmlBlocks:
    """The blocks with codes by error feedback."""
    return replace(blocks, codes=gptq_codes(weight, grid_of(blocks), factors))


def descend_blocks(
    weight: torch.Tensor, blocks: GgmlBlocks, hessians: Sequence[torch.Tensor], damping: float, passes: int
) -> GgmlBlocks:
    """The blocks with codes by coordinate descent."""
    return replace(blocks, codes=descend_codes(weight, grid_of(blocks), hessians, damping, passes))
