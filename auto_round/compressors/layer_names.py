"""What the user's layer names and patterns mean on a model: the scheme of every layer, and which blocks are chosen."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

from auto_round.compressors.keywords import no_zero_point, symmetric_where_only
from auto_round.compressors.settings import Settings
from auto_round.errors import ConfigError, nearest
from auto_round.layer_config import LayerConfig, resolve_layers
from auto_round.schemes import QuantizationScheme


def named_schemes(
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
        settled, changed = symmetric_where_only(scheme)
        schemes[name] = settled
        for field in changed:
            note = f"layer_config: {field}=False is not used: {no_zero_point(settled, field)}"
            notes += [note] if note not in notes else []
    return schemes, notes


def chosen_blocks(settings: Settings, blocks: Sequence[str]) -> tuple[str, ...]:
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
