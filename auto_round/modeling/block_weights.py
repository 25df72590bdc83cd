"""The weights of decoder blocks that are no linear layers, each with the reason why it stays dense."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from auto_round.errors import UnsupportedError
from auto_round.modeling.blocks import has_own_forward, is_linear
from auto_round.modeling.routers import is_moe, router_modules

ROUTER = "it chooses experts"
CONVOLUTION = "a convolution"
EMBEDDING = "an embedding table"
SMALL = "a bias, scale or state of a recurrence, not a matrix that multiplies tokens"
_UNKNOWN = "no rule says what it computes"
_LAYOUT = "experts in a layout that is not known"
_FORWARD = "its class has a forward of its own, which is not that of a linear layer"
_WARNING, _ERROR = 0.05, 0.5
_SMALL = re.compile(r"(^|_)(bias|scale|norm|A_log|D|dt|sinks?|time_mix\w*|slope|decay)(_|$)|bias$")
_ROUTER_PARAM = re.compile(r"router|(^|_)gate(_weight)?$|routing")


@dataclass(frozen=True)
class DenseWeight:
    """A weight of two or more dimensions that no rule quantizes.

    Attributes:
        name: full name of the parameter.
        numel: its size.
        reason: why it stays dense.
        unknown: for want of a rule, not by one.
    """

    name: str
    numel: int
    reason: str
    unknown: bool


@dataclass(frozen=True)
class BlockWeights:
    """What decoder blocks hold.

    Attributes:
        total: number of weights in tensors of two and more dimensions.
        dense: those that are not in a linear layer.
    """

    total: int
    dense: tuple[DenseWeight, ...]

    @property
    def unknown(self) -> tuple[DenseWeight, ...]:
        """Those that stay dense for want of a rule, the largest first."""
        return tuple(sorted((w for w in self.dense if w.unknown), key=lambda w: -w.numel))

    @property
    def share_unknown(self) -> float:
        """How much of all weights that is."""
        return sum(w.numel for w in self.unknown) / self.total if self.total else 0.0

    def check(self, model: str, advice: str = "") -> str | None:
        """A warning when much of the blocks stays dense for want of a rule, None where little or nothing does.

        Raises UnsupportedError when it is more than half. `advice`: what else the user can do then.
        """
        share, unknown = self.share_unknown, self.unknown
        if share <= _WARNING:
            return None
        kinds: dict[str, str] = {}
        for weight in unknown:
            kinds.setdefault(re.sub(r"\.\d+(?=\.)", ".*", weight.name), weight.reason)
        shown = [f"{name} ({reason})" for name, reason in kinds.items()]
        names = ", ".join(shown[:5]) + (f" and {len(shown) - 5} more" if len(shown) > 5 else "")
        if share > _ERROR:
            raise UnsupportedError(
                f"{share:.0%} of the weights in the blocks of {model} would stay dense because no rule recognises "
                f"them: {names}. Quantizing the rest would hardly make the model smaller; {advice}use a version of "
                "this package that knows the family, or ask for it with the model's name"
            )
        return f"{share:.0%} of the weights in the blocks stay dense because no rule recognises them: {names}"


def block_weights(model: nn.Module, blocks: Sequence[str]) -> BlockWeights:
    """The weights of two and more dimensions in `blocks`, and which of them no linear layer holds."""
    routers = router_modules(model)
    total = 0
    dense: dict[str, DenseWeight] = {}
    seen: set[int] = set()
    for block in blocks:
        for owner, module, leaf, parameter in _matrices(model, block):
            if id(parameter) in seen:
                continue
            seen.add(id(parameter))
            total += parameter.numel()
            if leaf == "weight" and is_linear(module):
                continue
            reason, unknown = _reason(model, owner, module, leaf, parameter, routers)
            name = f"{owner}.{leaf}"
            dense[name] = DenseWeight(name, parameter.numel(), reason, unknown)
    return BlockWeights(total, tuple(dense.values()))


def _matrices(model: nn.Module, block: str) -> Iterator[tuple[str, nn.Module, str, torch.Tensor]]:
    for name, module in model.get_submodule(block).named_modules():
        for leaf, parameter in module._parameters.items():
            if parameter is not None and parameter.dim() >= 2 and parameter.is_floating_point():
                yield (f"{block}.{name}" if name else block), module, leaf, parameter


def _reason(
    model: nn.Module, owner: str, module: nn.Module, leaf: str, parameter: torch.Tensor, routers: set[str]
) -> tuple[str, bool]:
    """(why the parameter stays dense, whether that is for want of a rule)."""
    parts = owner.split(".")
    if any(".".join(parts[: n + 1]) in routers for n in range(len(parts))):
        return ROUTER, False
    if sum(size > 1 for size in parameter.shape) < 2 or _SMALL.search(leaf):
        return SMALL, False
    if isinstance(module, nn.Embedding):
        return EMBEDDING, False
    if leaf == "weight" and parameter.dim() > 2 and _is_convolution(parts[-1], module, parameter):
        return CONVOLUTION, False
    if parameter.dim() == 2 and is_moe(module) and _ROUTER_PARAM.search(leaf):
        return ROUTER, False
    if leaf == "weight" and has_own_forward(module):
        return _FORWARD, True
    if parameter.dim() == 3 and any("expert" in part for part in parts):
        return _LAYOUT, True
    return _UNKNOWN, True


def _is_convolution(segment: str, module: nn.Module, parameter: torch.Tensor) -> bool:
    return isinstance(module, nn.modules.conv._ConvNd) or "conv" in segment or parameter.shape[1] == 1
