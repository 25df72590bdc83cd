"""Which linear layers stay dense by default although their scheme quantizes them, and how a user overrides it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from auto_round.export.formats import OutputFormat
from auto_round.layer_config import matching_layers
from auto_round.modeling.block_weights import ROUTER
from auto_round.modeling.engine_dense import engine_dense
from auto_round.modeling.routers import router_names

_SERVED = "serving engines keep it dense"


@dataclass(frozen=True)
class DenseByDefault:
    """Layers that stay dense unless `layer_config` names them.

    Attributes:
        reasons: by layer, why it stays dense.
        overridden: by layer, why it would have stayed dense; the user asked for another scheme.
    """

    reasons: Mapping[str, str]
    overridden: Mapping[str, str]

    def notes(self) -> list[str]:
        """A warning for every kind of layer that is quantized against the default."""
        by_reason: dict[str, list[str]] = {}
        for name, reason in self.overridden.items():
            by_reason.setdefault(reason, []).append(name)
        return [
            f"{_shown(names)} {'is' if len(names) == 1 else 'are'} quantized because layer_config asks for it, against "
            f"the default: {reason}"
            for reason, names in by_reason.items()
        ]


def dense_by_default(
    model: nn.Module, model_type: str, layers: Sequence[str], formats: Sequence[OutputFormat],
    layer_config: Mapping[str, Any],
) -> DenseByDefault:  # fmt: skip
    """Routers in every format; in formats that serving engines read, the layers that those keep dense too.

    Args:
        model: its routers are found.
        model_type: of its configuration.
        layers: names of all its linear layers.
        formats: of the output; none means that it is not known yet.
        layer_config: as the user gave it. An entry that means only layers which stay dense by default overrides it.
    """
    routers = router_names(model)
    served = not formats or any(fmt.fused_by for fmt in formats)
    found: dict[str, str] = {}
    for name in layers:
        row = engine_dense(model_type, name) if served else None
        if name in routers:
            found[name] = ROUTER
        elif row is not None:
            found[name] = f"{_SERVED}: {row.reason}"
    named = _named(layer_config, layers, found)
    return DenseByDefault(
        {name: reason for name, reason in found.items() if name not in named},
        {name: reason for name, reason in found.items() if name in named},
    )


def _named(layer_config: Mapping[str, Any], layers: Sequence[str], dense: Mapping[str, str]) -> set[str]:
    """Layers that stay dense by default and that an entry means: by their full names, or by a pattern that matches no
    others."""
    named: set[str] = set()
    for pattern in layer_config:
        matched = matching_layers(pattern, layers)
        if matched and all(name in dense for name in matched):
            named |= set(matched)
    return named


def _shown(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"
