"""`quantization_config` of compressed-tensors: which layers belong to which group, and which are left alone.

One scheme for all layers is written as the class `Linear` with exceptions in `ignore`, as every runtime knows it. With
several schemes each group names its layers: a runtime that joins layers (vLLM's q, k and v) would otherwise take the
class before the names. Layers whose names differ in numbers only share one regular expression where all of them, in the
whole model, belong together.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Iterable
from typing import Any

from auto_round.export.cache_scales import kv_cache_scheme
from auto_round.export.compressed_tensors_float import float_format, float_inputs, float_weights
from auto_round.export.float_layouts import is_float
from auto_round.export.plan import ExportPlan
from auto_round.schemes import QuantizationScheme

PACKED, PLAIN, MIXED = "pack-quantized", "int-quantized", "mixed-precision"


def format_of(scheme: QuantizationScheme) -> str:
    """The library's name of a layer's layout: packed words for weights alone, int8 next to quantized activations."""
    if is_float(scheme):
        return float_format(scheme)
    return PLAIN if scheme.quantizes_activations else PACKED


def weight_arguments(scheme: QuantizationScheme) -> dict[str, Any]:
    """The group's `weights`. Per-tensor scales of integers are written per channel, repeated."""
    if is_float(scheme):
        return float_weights(scheme)
    assert isinstance(scheme.group_size, int)
    grouped = scheme.group_size > 0
    return {
        "dynamic": False,
        "group_size": scheme.group_size if grouped else None,
        "num_bits": scheme.bits,
        "strategy": "group" if grouped else "channel",
        "symmetric": scheme.sym,
        "type": "int",
    }


def input_arguments(scheme: QuantizationScheme) -> dict[str, Any] | None:
    """The group's `input_activations`."""
    activations = scheme.activations
    if activations is None:
        return None
    if is_float(scheme):
        return float_inputs(scheme)
    size = activations.group_size
    assert isinstance(size, int)
    grouped = activations.dynamic and size > 0
    strategy = "group" if grouped else "token" if activations.dynamic and size == -1 else "tensor"
    return {
        "dynamic": activations.dynamic,
        "group_size": size if grouped else None,
        "num_bits": activations.bits,
        "strategy": strategy,
        "symmetric": activations.sym,
        "type": "int",
    }


def compressed_config(plan: ExportPlan) -> dict[str, Any] | None:
    """The whole `quantization_config`, None when no layer is quantized."""
    names = plan.quantized_layers()
    if not names:
        return None
    groups: dict[str, list[str]] = defaultdict(list)
    arguments: dict[str, dict[str, Any]] = {}
    for name in names:
        scheme = plan.layers[name]
        group = {
            "format": format_of(scheme), "input_activations": input_arguments(scheme), "output_activations": None,
            "weights": weight_arguments(scheme),
        }  # fmt: skip
        key = repr(group)
        arguments[key] = group
        groups[key].append(name)
    dense = [name for name in plan.layers if name not in set(names)] + [
        name for name in (*plan.other_matrices, *plan.spare) if name not in plan.layers
    ]
    everything = [*plan.layers, *dense]
    single = len(groups) == 1
    # The most common group comes first.
    order = sorted(groups, key=lambda key: -len(groups[key]))
    formats = {arguments[key]["format"] for key in order}
    return {
        "config_groups": {
            f"group_{i}": {
                **arguments[key],
                "targets": ["Linear"] if single else name_patterns(groups[key], everything),
            }
            for i, key in enumerate(order)
        },
        "format": formats.pop() if len(formats) == 1 else MIXED,
        "global_compression_ratio": None,
        "ignore": name_patterns(dense, everything),
        "kv_cache_scheme": kv_cache_scheme(plan.settings),
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
    }


def name_patterns(names: Iterable[str], everything: Collection[str]) -> list[str]:
    """Exact names, and `re:` patterns for those that differ in numbers only and have no other member in `everything`.

    A pattern starts with `.*`: wrappers of other programs put words in front of a model's names.
    """
    wanted = list(dict.fromkeys(names))
    chosen = set(wanted)
    families: dict[str, set[str]] = defaultdict(set)
    for name in everything:
        families[_family(name)].add(name)
    result: dict[str, None] = {}
    for name in wanted:
        family = families[_family(name)]
        whole = len(family) > 1 and family <= chosen
        result["re:.*" + _family(name) + "$" if whole else name] = None
    return list(result)


def _family(name: str) -> str:
    """A regular expression for the name with any numbers in it."""
    return r"\.".join(r"\d+" if part.isdigit() else re.escape(part) for part in name.split("."))
