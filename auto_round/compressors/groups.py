"""Group sizes that divide every row, for formats whose readers know no short last group."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import gcd

from auto_round.export.formats import OutputFormat
from auto_round.schemes import QuantizationScheme

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
    if not any(fmt.full_groups for fmt in formats):
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
            asking = ", ".join(fmt.name for fmt in formats if fmt.full_groups)
            notes.append(
                f"groups of {fitting} instead of {size}: {odd} has {widths[odd]} inputs, and {asking} files have no "
                "short last group"
            )
    return instead, notes
