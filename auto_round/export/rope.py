"""Rotary settings as configurations had them before Transformers 5, for runtimes that read only those keys.

| Transformers 5 | before |
|---|---|
| rope_parameters.rope_theta | rope_theta |
| rope_parameters.rope_type and its numbers, unless "default" | rope_scaling |
| rope_parameters.partial_rotary_factor | partial_rotary_factor |
| rope_parameters.full_attention, .sliding_attention (Gemma 3) | the above, and rope_local_base_freq |
"""

from __future__ import annotations

from typing import Any


def with_legacy_rope(values: dict[str, Any]) -> dict[str, Any]:
    """A copy of a config's values with the older keys beside `rope_parameters`. Keys that are there are kept."""
    parameters = values.get("rope_parameters")
    if not isinstance(parameters, dict):
        return values
    added: dict[str, Any] = {}
    if isinstance(parameters.get("full_attention"), dict):
        local = parameters.get("sliding_attention")
        if isinstance(local, dict) and local.get("rope_theta") is not None:
            added["rope_local_base_freq"] = local["rope_theta"]
        parameters = parameters["full_attention"]
    for key in ("rope_theta", "partial_rotary_factor"):
        if parameters.get(key) is not None:
            added[key] = parameters[key]
    kind = parameters.get("rope_type", "default")
    if kind != "default":
        rest = {k: v for k, v in parameters.items() if k not in ("rope_theta", "partial_rotary_factor")}
        added["rope_scaling"] = rest | {"type": kind}
    made = {**values, **{key: value for key, value in added.items() if values.get(key) is None}}
    scaling = made.get("rope_scaling")
    if isinstance(scaling, dict) and "rope_type" in scaling:
        made["rope_scaling"] = {**scaling, "type": scaling.get("type", scaling["rope_type"])}
    return made
