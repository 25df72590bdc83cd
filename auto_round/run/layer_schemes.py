"""Choose each layer's scheme: user patterns, mixed presets, layers unquantized by default, fitting group sizes."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from math import gcd
from typing import TYPE_CHECKING, Any

from torch import nn

from auto_round.codecs.ggml.types import ggml_type_of
from auto_round.errors import ConfigError, nearest
from auto_round.formats.base import OutputFormat
from auto_round.layer_config import matching_layers, resolve_layers
from auto_round.modeling.config import read_value
from auto_round.modeling.layer_rules import ROUTER, engine_unquantized, is_routed_expert, router_names
from auto_round.modeling.source import ModelSource
from auto_round.run.keywords import no_zero_point, symmetric_if_required
from auto_round.run.plan import LayerPlan
from auto_round.run.settings import Settings
from auto_round.schemes import MixedPreset, QuantizationScheme

if TYPE_CHECKING:
    from auto_round.gguf.plan import GgufPlan

_TOWERS = ("vision_config", "audio_config")
# Below this group size kernels have no support, and scales would take as much as two bits per weight.
_MIN_GROUP_SIZE = 32


def resolve_layer_schemes(
    rules: LayerRules, inside: Sequence[str], outside: Sequence[str]
) -> tuple[dict[str, QuantizationScheme], list[str]]:
    """The scheme of every layer, and notes about patterns that match nothing and fields that are ignored.

    Args:
        inside, outside: linear layers inside blocks, and those outside that may be quantized.

    Raises:
        ConfigError: a pattern matches nothing and the settings are strict, or an entry is no scheme.
    """
    settings, known = rules.settings, [*inside, *outside]
    others = [name for name, _ in rules.source.model.named_modules() if name and name not in known]
    notes: list[str] = []
    schemes = resolve_layers(
        inside, settings.scheme, rules.layer_config, settings.ignore_layers, outside, rules.quant_lm_head,
        rules.defaults(known), others, None if settings.strict else notes.append,
    )  # fmt: skip
    for name, scheme in schemes.items():
        schemes[name], changed = symmetric_if_required(scheme)
        for field in changed:
            note = f"layer_config: {field}=False is not used: {no_zero_point(schemes[name], field)}"
            notes += [note] if note not in notes else []
    return schemes, notes


def select_blocks(settings: Settings, blocks: Sequence[str]) -> tuple[str, ...]:
    """The blocks that match `to_quant_block_names`: names, prefixes of names, or regular expressions.

    Raises ConfigError for an entry that matches no block.
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


def mixed_defaults(
    mixed: MixedPreset | None, scheme: QuantizationScheme, names: Iterable[str], config: Any
) -> dict[str, QuantizationScheme]:
    """Default schemes of a preset with several widths, for every layer that does not get `scheme`.

    Args:
        mixed: the preset, None for others.
        scheme: scheme of routed experts; the other layers differ in their bits.
        names: of all linear layers.
        config: the model's, which tells whether it is multimodal.
    """
    if mixed is None:
        return {}
    multimodal = any(read_value(config, tower) is not None for tower in _TOWERS)
    other = scheme.with_overrides({"bits": mixed.multimodal_other_bits if multimodal else mixed.other_bits})
    return {name: other for name in names if not is_routed_expert(name)}


class LayerRules:
    """What the files of a run decide about its layers: without a GGUF file (`GgufRules`) nothing.

    Attributes:
        file: plan of the GGUF file.
        layer_config: the entries of the layer configuration that apply to linear layers.
        quant_lm_head: whether layers outside the blocks get the default scheme too.
    """

    file: GgufPlan | None = None

    def __init__(self, settings: Settings, source: ModelSource) -> None:
        self.settings, self.source = settings, source
        self.layer_config, self.quant_lm_head = settings.layer_config, settings.quant_lm_head

    def defaults(self, names: Sequence[str]) -> dict[str, QuantizationScheme]:
        """Default schemes of layers that replace the settings'."""
        return mixed_defaults(self.settings.mixed, self.settings.scheme, names, self.source.config)

    def fitted(
        self, schemes: Mapping[str, QuantizationScheme], widths: Mapping[str, int]
    ) -> tuple[dict[str, QuantizationScheme], list[str]]:
        """Schemes that the files can hold, for layers whose rows have these widths, and notes for the user."""
        settings, mixed = self.settings, self.settings.mixed
        if mixed is None or any(map(is_routed_expert, schemes)):
            return dict(schemes), []
        return dict(schemes), [
            f"{settings.scheme_name} gives routed experts {settings.scheme.bits} bits, and this model has none: every "
            f"layer gets {mixed.other_bits}"
        ]

    def unquantized_reason(self, name: str) -> str | None:
        """Why the files cannot hold a layer quantized, or None."""
        return None

    def settled(self, layers: Mapping[str, LayerPlan]) -> tuple[dict[str, LayerPlan], list[str]]:
        """The plans with the type that each layer has in the files, and notes for the user."""
        return (dict(layers) if self.settings.scheme.super_bits is None else with_types(layers)), []

    def nbytes(self, fmt: OutputFormat) -> int | None:
        """Bytes of a format's tensors, if they are not those of its layout."""
        return None


def with_types(layers: Mapping[str, LayerPlan]) -> dict[str, LayerPlan]:
    """The plans with the ggml type of each layer."""
    kinds = {name: ggml_type_of(p.scheme) if p.scheme.quantizes_weights else None for name, p in layers.items()}
    return {name: replace(p, ggml=None if (k := kinds[name]) is None else k.name) for name, p in layers.items()}


def embedding_names(source: ModelSource) -> tuple[str, ...]:
    """The model's embeddings."""
    return tuple(name for name, m in source.model.named_modules() if isinstance(m, nn.Embedding))


def fit_groups(
    schemes: Mapping[str, QuantizationScheme], widths: Mapping[str, int], formats: Sequence[OutputFormat]
) -> tuple[dict[QuantizationScheme, QuantizationScheme], list[str]]:
    """Replace group sizes that do not divide the rows of a layer, for formats without a short last group.

    All layers of a scheme get the same group size, since some formats support only one.

    Args:
        schemes: by layer name.
        widths: in_features by layer name.

    Returns:
        (scheme -> replacement, notes for the user). Both are empty when no format requires full groups.
    """
    if not any(fmt.requires_full_groups for fmt in formats):
        return {}, []
    instead: dict[QuantizationScheme, QuantizationScheme] = {}
    notes: list[str] = []
    for scheme in dict.fromkeys(schemes.values()):
        size = scheme.group_size
        if not scheme.quantizes_weights or not isinstance(size, int) or size < _MIN_GROUP_SIZE:
            continue
        fitting = size
        for name, own in schemes.items():
            common = gcd(fitting, widths[name])
            if own == scheme and common >= _MIN_GROUP_SIZE:  # else the layer is left unquantized
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


def unquantized_by_default(
    model: nn.Module, model_type: str, layers: Sequence[str], formats: Sequence[OutputFormat],
    layer_config: Mapping[str, Any],
) -> tuple[dict[str, str], list[str]]:  # fmt: skip
    """Layers that stay in full precision unless they are asked for, with the reasons: routers in every format, and in
    formats for serving engines also the layers that these do not load quantized.

    Args:
        model: its routers are found.
        model_type: of its configuration.
        layers: names of all its linear layers.
        formats: of the output; none when they are not known yet.
        layer_config: of the user. An entry that matches only such layers overrides the default.

    Returns:
        (reasons by layer name, a warning for every kind of layer that is overridden).
    """
    routers = router_names(model)
    served = not formats or any(fmt.fusing_runtimes for fmt in formats)
    reasons: dict[str, str] = {}
    for name in layers:
        row = engine_unquantized(model_type, name) if served else None
        if name in routers:
            reasons[name] = ROUTER
        elif row is not None:
            reasons[name] = f"serving engines keep it unquantized: {row.reason}"
    overridden: dict[str, list[str]] = {}  # by reason
    matches = [matching_layers(pattern, layers) for pattern in layer_config]
    asked = {name for names in matches if all(name in reasons for name in names) for name in names}
    for name in layers:
        if name in asked:
            overridden.setdefault(reasons.pop(name), []).append(name)
    notes = []
    for reason, names in overridden.items():
        shown = f"{names[0]} is" if len(names) == 1 else f"{names[0]} and {len(names) - 1} more are"
        notes.append(f"{shown} quantized because layer_config asks for it, against the default: {reason}")
    return reasons, notes
