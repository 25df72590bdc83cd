"""Static scales of the key-value cache in a run: planned from the model's structure, made from what blocks show."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from auto_round.calibration.cache_extremes import CacheExtremes
from auto_round.errors import UnsupportedError
from auto_round.export.cache_scales import FP8_MAXIMUM, CacheScheme, scale_shape
from auto_round.export.formats import OutputFormat, TensorSpecs
from auto_round.modeling.attention import Attention, find_attention, head_counts, unrecognised_attention
from auto_round.modeling.config_values import text_config
from auto_round.modeling.libraries import library_error
from auto_round.modeling.source import ModelSource


@dataclass(frozen=True)
class CachePlan:
    """Which attention modules get scales.

    Attributes:
        scheme: which scales.
        heads: (query heads, key-value heads) by the module's full name.
    """

    scheme: CacheScheme
    heads: Mapping[str, tuple[int, int]]

    @property
    def queries(self) -> bool:
        return self.scheme.queries is not None

    def attentions(self, block: nn.Module) -> list[Attention]:
        """What has to be watched while a block runs."""
        return find_attention(block)

    def specs(self, fmt: OutputFormat) -> TensorSpecs:
        """Shapes and dtypes of all scales in a format's files, by tensor name."""
        return {
            f"{name}.{leaf}": (scale_shape(fmt, self.scheme, leaf, self._count(name, leaf)), torch.float32)
            for name in self.heads
            for leaf in self.scheme.leaves
        }

    def scales(self, block: str, seen: CacheExtremes) -> dict[str, torch.Tensor]:
        """The scales of one block: largest value / 448, float32, a scalar or [heads].

        A head whose states are all zero gets 1.

        Raises:
            UnsupportedError: an attention showed nothing, or not the heads that it is said to have.
            LibraryError: it showed nothing though its code says that it does.
            NumericsError: it showed NaN or Inf.
        """
        made: dict[str, torch.Tensor] = {}
        for name in (n for n in self.heads if n.startswith(f"{block}.")):
            for leaf in self.scheme.leaves:
                largest = seen.of(f"{name.removeprefix(f'{block}.')}.{leaf[0]}", self._count(name, leaf))
                if self.scheme.granularity(leaf) == "tensor":
                    largest = largest.amax()
                scale = largest.cpu() / FP8_MAXIMUM
                made[f"{name}.{leaf}"] = torch.where(scale > 0, scale, torch.ones_like(scale))
        return made

    def _count(self, name: str, leaf: str) -> int:
        return self.heads[name][0 if leaf == "q_scale" else 1]


def stored_scale(fmt: OutputFormat, scale: torch.Tensor) -> torch.Tensor:
    """A scale as a format's files hold it: [1], or one number a head."""
    return scale.reshape(1) if scale.dim() == 0 else scale.reshape(-1, *fmt.cache_scale_tail)


def plan_cache(source: ModelSource, scheme: CacheScheme | None) -> CachePlan | None:
    """The plan for a model, None when no scales are asked for.

    Raises:
        UnsupportedError: it has no attention that keeps keys and values.
        LibraryError: it has attention, of which none takes a cache in a way that is known here.
    """
    if scheme is None:
        return None
    config = text_config(source.config)
    heads = {
        f"{block}.{attention.name}": head_counts(attention, config)
        for block in source.blocks
        for attention in find_attention(source.model.get_submodule(block))
    }
    blocks = [source.model.get_submodule(block) for block in source.blocks]
    if not heads and (unknown := unrecognised_attention(blocks)):
        raise library_error(
            f"{type(source.model).__name__} has attention ({', '.join(unknown)}), but no argument of it was "
            "recognised as its key-value cache",
            "leave static_kv_dtype and static_attention_dtype out",
        )
    if not heads:
        raise UnsupportedError(
            f"{type(source.model).__name__} has no attention with a key-value cache: leave static_kv_dtype and "
            "static_attention_dtype out"
        )
    return CachePlan(scheme, heads)
