"""Choose each layer's scheme: user patterns, mixed presets, layers unquantized by default, fitting group sizes."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import gcd
from typing import Any

from torch import nn

from auto_round.errors import ConfigError, nearest
from auto_round.formats.base import OutputFormat
from auto_round.layer_config import LayerConfig, matching_layers, resolve_layers
from auto_round.modeling.config import read_value
from auto_round.modeling.layer_rules import ROUTER, engine_unquantized, is_routed_expert, router_names
from auto_round.run.keywords import no_zero_point, symmetric_if_required
from auto_round.run.settings import Settings
from auto_round.schemes import MixedPreset, QuantizationScheme


def resolve_layer_schemes(
    settings: Settings, inside: Sequence[str], outside: Sequence[str], modules: Iterable[str],
    own_defaults: Mapping[str, QuantizationScheme], layer_config: LayerConfig, quant_lm_head: bool,
) -> tuple[dict[str, QuantizationScheme], list[str]]:  # fmt: skip
    """The scheme of every layer, and notes about names that mean nothing and fields that are not used.

    Args:
        inside, outside: linear layers inside blocks, and those outside that may be quantized.
        modules: names of all modules of the model.
        layer_config: the settings' own, or a part of it.

    Raises:
        ConfigError: a name or pattern means nothing and the settings are strict, or an entry is no scheme.
    """
    notes: list[str] = []
    known = {*inside, *outside}
    schemes = resolve_layers(
        inside, settings.scheme, layer_config, settings.ignore_layers, outside, quant_lm_head, own_defaults,
        [name for name in modules if name and name not in known], None if settings.strict else notes.append,
    )  # fmt: skip
    for name, scheme in schemes.items():
        settled, changed = symmetric_if_required(scheme)
        schemes[name] = settled
        for field in changed:
            note = f"layer_config: {field}=False is not used: {no_zero_point(settled, field)}"
            notes += [note] if note not in notes else []
    return schemes, notes


def select_blocks(settings: Settings, blocks: Sequence[str]) -> tuple[str, ...]:
    """The blocks that `to_quant_block_names` means: names, beginnings of names, or regular expressions.

    Raises ConfigError for one that means no block.
    """
    wanted = settings.to_quant_block_names
    if not wanted:
        return tuple(blocks)
    chosen: set[str] = set()
    for name in wanted:
        found = [block for block in blocks if block == name or block.startswith(f"{name}.")] or _search(name, blocks)
        if not found:
            raise ConfigError(f"to_quant_block_names: {name!r} is no block of this model{nearest(name, blocks)}")
        chosen.update(found)
    return tuple(block for block in blocks if block in chosen)


def _search(pattern: str, blocks: Sequence[str]) -> list[str]:
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise ConfigError(f"to_quant_block_names: {pattern!r} is not a regular expression: {error}") from error
    return [block for block in blocks if compiled.search(block)]


# Presets of more than one width: which layer of a model gets which.

_TOWERS = ("vision_config", "audio_config")


def mixed_defaults(
    mixed: MixedPreset | None, scheme: QuantizationScheme, names: Iterable[str], config: Any
) -> dict[str, QuantizationScheme]:
    """The default scheme of every layer that does not simply get `scheme`.

    Args:
        mixed: the mixture, None when there is none.
        scheme: what routed experts get; the others differ from it in their bits alone.
        names: of all linear layers.
        config: the model's, which says whether it reads more than text.
    """
    if mixed is None:
        return {}
    multimodal = any(read_value(config, tower) is not None for tower in _TOWERS)
    other = scheme.with_overrides({"bits": mixed.multimodal_other_bits if multimodal else mixed.other_bits})
    return {name: other for name in names if not is_routed_expert(name)}


# Group sizes that divide every row, for formats whose readers know no short last group.

# Below this kernels have no group size, and scales would weigh as much as two bits for each weight.
_SMALLEST = 32


def fit_groups(
    schemes: Mapping[str, QuantizationScheme], widths: Mapping[str, int], formats: Sequence[OutputFormat]
) -> tuple[dict[QuantizationScheme, QuantizationScheme], list[str]]:
    """Smaller groups where a scheme's groups do not fill the rows of one of its layers.

    All layers of a scheme get the same group size, so that a format that knows one only still has one.

    Args:
        schemes: by layer name.
        widths: in_features by layer name.

    Returns:
        (scheme -> scheme to use instead, notes for the user). Both are empty when no format asks for full groups.
    """
    if not any(fmt.requires_full_groups for fmt in formats):
        return {}, []
    instead: dict[QuantizationScheme, QuantizationScheme] = {}
    notes: list[str] = []
    for scheme in dict.fromkeys(schemes.values()):
        size = scheme.group_size
        if not scheme.quantizes_weights or not isinstance(size, int) or size < _SMALLEST:
            continue
        fitting = size
        for name, own in schemes.items():
            common = gcd(fitting, widths[name])
            if own == scheme and common >= _SMALLEST:  # else the layer stays in full precision
                fitting = common
        if fitting != size:
            instead[scheme] = scheme.with_overrides({"group_size": fitting})
            odd = next(name for name, own in schemes.items() if own == scheme and widths[name] % size)
            asking = ", ".join(fmt.name for fmt in formats if fmt.requires_full_groups)
            notes.append(
                f"groups of {fitting} instead of {size}: {odd} has {widths[odd]} inputs, and {asking} files have no "
                "short last group"
            )
    return instead, notes


# Which linear layers stay dense by default although their scheme quantizes them, and how a user overrides it.

_SERVED = "serving engines keep it dense"


@dataclass(frozen=True)
class UnquantizedByDefault:
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


def unquantized_by_default(
    model: nn.Module, model_type: str, layers: Sequence[str], formats: Sequence[OutputFormat],
    layer_config: Mapping[str, Any],
) -> UnquantizedByDefault:  # fmt: skip
    """Routers in every format; in formats that serving engines read, the layers that those keep dense too.

    Args:
        model: its routers are found.
        model_type: of its configuration.
        layers: names of all its linear layers.
        formats: of the output; none means that it is not known yet.
        layer_config: as the user gave it. An entry that means only layers which stay dense by default overrides it.
    """
    routers = router_names(model)
    served = not formats or any(fmt.fusing_runtimes for fmt in formats)
    found: dict[str, str] = {}
    for name in layers:
        row = engine_unquantized(model_type, name) if served else None
        if name in routers:
            found[name] = ROUTER
        elif row is not None:
            found[name] = f"{_SERVED}: {row.reason}"
    named = _named(layer_config, layers, found)
    return UnquantizedByDefault(
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
