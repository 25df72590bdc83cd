"""Read values from model configurations, and write config.json for Transformers 4 and 5 alike.

Transformers 5 moved the rotary settings into `rope_parameters` and renamed `torch_dtype` to `dtype`; it still reads the
older keys. Transformers 4 knows only those, and silently computes with a base of 10000 where they are missing. So both
are written; the family's class in Transformers decides which older keys it accepts.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from auto_round.modeling.files.folder import check_inside, read_object

TEXT_PARTS = ("text_config", "llm_config", "language_config", "thinker_config")
LAYER_COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
QUANTIZATION_KEYS = ("quantization_config", "compression_config")
# Keys that describe the machine on which the source was saved.
_MACHINE_KEYS = ("_name_or_path", "_attn_implementation_autoset", "_commit_hash")
_NEW, _SCALING = "rope_parameters", "rope_scaling"
# Older keys of entries of `rope_parameters`. What is not among these is `rope_scaling`, unless its type is "default".
_THETA = ("rope_theta", "rotary_emb_base", "global_rope_theta")
_LOCAL_THETA = ("rope_local_base_freq", "local_rope_theta")  # of its entry `sliding_attention`
_PARTIAL = ("partial_rotary_factor", "rotary_pct")
_OLD = (*_THETA, *_LOCAL_THETA, *_PARTIAL, _SCALING)
Values = dict[str, Any]


def text_config(config: Any) -> Any:
    """The part of a configuration that describes the language model; the configuration itself if it has no parts."""
    get = getattr(config, "get_text_config", None)
    if not callable(get):
        return config
    try:
        return get()
    except ValueError:  # several parts describe text: an encoder and a decoder
        return config


def read_value(config: Any, name: str, default: Any = None) -> Any:
    """Read one value; a list with one entry per layer if it varies by layer; `default` if missing or None.

    `config` is a Transformers configuration, a `RawConfig`, a mapping, or None.
    """
    try:
        value = config.get(name) if isinstance(config, Mapping) else getattr(config, name, None)
    except Exception:  # Transformers raises its own error for a value that only single layers have
        try:
            layers = config.per_layer_config
            found = [read_value(one, name) for one in (layers.values() if isinstance(layers, Mapping) else layers)]
        except Exception:  # the family's own class computes the layers, from values that may be damaged
            found = []
        value = found if any(one is not None for one in found) else None
    return default if value is None else value


def layer_value(config: Any, name: str, layer: int | None) -> Any:
    """The value for one layer, if it varies by layer; the first layer's when `layer` is None or out of range."""
    value = read_value(config, name)
    if isinstance(value, (list, tuple)) and value:
        return value[layer] if layer is not None and 0 <= layer < len(value) else value[0]
    return value


def largest(config: Any, *names: str, default: int = 0) -> int:
    """The largest positive integer under the first of `names` that has one (spellings such as "hidden_size", "n_embd").

    Values that vary by layer count with all their layers. The text part of `config` is read first.
    """
    return max(_sizes(config, *names), default=default)


def smallest(config: Any, *names: str) -> int | None:
    """As `largest`, for the smallest size; None if no name has a positive integer."""
    return min(_sizes(config, *names), default=None)


def _sizes(config: Any, *names: str) -> list[int]:
    values = (read_value(part, name) for part in (text_config(config), config) for name in names)
    found = ([number for number in integers(value) if number > 0] for value in values)
    return next(filter(None, found), [])


def integers(value: Any) -> list[int]:
    """The integers in a value: itself, or those in a list or mapping of values by layer."""
    if isinstance(value, int):
        return [] if isinstance(value, bool) else [value]
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [number for entry in value for number in integers(entry)]
    return []


def source_config(config: Any, folder: Path | None, trusted: bool) -> Values:
    """The configuration of a model without its quantization and without keys that describe a machine.

    It is read from the config.json of the checkpoint's `folder`, whose unknown keys and order are preserved, else from
    the object `config`. `trusted`: Python files are copied too, so that `auto_map` may name them.
    """
    if folder is None:
        values: Values = json.loads(config.to_json_string(use_diff=False))
    else:
        values = read_object(check_inside(folder, folder / "config.json"))
    values = _without(values, _MACHINE_KEYS)
    for part in (values, *_parts(values).values()):
        for key in QUANTIZATION_KEYS:
            part.pop(key, None)
    own = values.get("auto_map")
    if not trusted and isinstance(own, dict) and _class_of(values) is not None:
        # Entries that name Python files of the folder go; those of a repository stay.
        values["auto_map"] = {key: name for key, name in own.items() if isinstance(name, str) and "--" in name}
        if not values["auto_map"]:
            del values["auto_map"]
    return values


def with_dtype(values: Mapping[str, Any], dtype: str) -> Values:
    """A copy with `dtype` under both names, in the configuration and in every part that has either.

    Parts keep their own dtype unless the dtype of the whole changes.
    """
    made = copy.deepcopy(dict(values))
    before = made.get("dtype") or made.get("torch_dtype")
    changed = before is not None and str(before).removeprefix("torch.") != dtype
    for part in _parts(made).values():
        own = part.get("dtype") or part.get("torch_dtype")
        if own is not None:
            part["dtype"] = part["torch_dtype"] = dtype if changed else own
    made["dtype"] = made["torch_dtype"] = dtype
    return made


def with_both_rope_spellings(values: Mapping[str, Any]) -> Values:
    """A copy with the rotary settings in the keys of Transformers 4 and 5, nested parts too. Existing keys are kept.

    Reading the copy gives the same configuration as reading `values`.
    """
    made = copy.deepcopy(dict(values))
    before = _parsed(made)
    for name, part in ((None, made), *_parts(made).items()):
        found = _part(before, name).get(_NEW)
        if isinstance(found, dict) and found and not isinstance(part.get(_NEW), dict):
            if name is None or name in TEXT_PARTS or any(key in part for key in _OLD):
                part[_NEW] = copy.deepcopy(found)
        older = _legacy_rope(part.get(_NEW))
        if _SCALING in older and str(part.get("model_type", "")).startswith("phi"):
            # Phi reads this key before `rope_parameters`. Its classes in Transformers 4 count the fields: `type` (never
            # `rope_type`) and the two factors; for Phi-3.5-MoE also the two scales and the original length, which the
            # others have at the top level.
            scaling, length = older[_SCALING], "original_max_position_embeddings"
            kind = scaling.get("rope_type", scaling.get("type"))
            older[_SCALING] = {"type": kind} | {k: v for k, v in scaling.items() if k not in ("rope_type", "type")}
            if not {"short_mscale", "long_mscale"} & set(scaling) and part.get(length) == scaling.get(length):
                older[_SCALING].pop(length, None)
        for key, value in older.items():
            if part.get(key) is None and (before is None or _accepts_legacy_key(made, name, key, value, before)):
                part[key] = value
    return made if before is None or _contains(_parsed(made), before) else copy.deepcopy(dict(values))


def untied(values: Mapping[str, Any]) -> Values:
    """A copy that says that the output head has its own weight."""
    made = copy.deepcopy(dict(values))
    for key in TEXT_PARTS:
        if isinstance(made.get(key), dict) and "tie_word_embeddings" in made[key]:
            made[key]["tie_word_embeddings"] = False
    made["tie_word_embeddings"] = False
    return made


def causal_class(values: Mapping[str, Any]) -> str | None:
    """Transformers' class name for a causal language model with these values; None when it has none."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    found = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(str(values.get("model_type")))
    return found[0] if isinstance(found, (tuple, list)) else found


def _without(values: Mapping[str, Any], keys: tuple[str, ...]) -> Values:
    return {k: _without(v, keys) if isinstance(v, dict) else v for k, v in values.items() if k not in keys}


def _parts(values: Values) -> dict[str, Values]:
    """The nested configurations."""
    found = {key: part for key, part in values.items() if key.endswith("_config") and key not in QUANTIZATION_KEYS}
    return {key: part for key, part in found.items() if isinstance(part, dict)}


def _legacy_rope(parameters: Any) -> Values:
    """The same settings under every older name that some family has."""
    if not isinstance(parameters, dict):
        return {}
    found: Values = {}
    if isinstance(parameters.get("full_attention"), dict):
        local = parameters.get("sliding_attention")
        if isinstance(local, dict) and local.get("rope_theta") is not None:
            found |= dict.fromkeys(_LOCAL_THETA, local["rope_theta"])
        parameters = parameters["full_attention"]
    for key, names in (("rope_theta", _THETA), ("partial_rotary_factor", _PARTIAL)):
        if parameters.get(key) is not None:
            found |= dict.fromkeys(names, parameters[key])
    rest = {k: v for k, v in parameters.items() if k not in ("rope_theta", "partial_rotary_factor")}
    if any(isinstance(v, dict) for v in rest.values()):
        return {}  # settings per kind of layer, unknown to older versions
    if set(rest) - {"rope_type", "type"} or rest.get("rope_type", "default") != "default":
        found[_SCALING] = rest
    return found


def _part(values: Values | None, name: str | None) -> Values:
    """A nested configuration, or the whole one; empty if there is none."""
    found = values if name is None or values is None else values.get(name)
    return found if isinstance(found, dict) else {}


def _accepts_legacy_key(values: Values, name: str | None, key: str, value: Any, before: Values) -> bool:
    """Whether the family's class accepts `key` as an older spelling, or has it as a setting. `name`: of the part."""
    tried = copy.deepcopy(values)
    (tried if name is None else tried[name])[key] = value
    after = _parsed(tried)
    one, other = _part(before, name), _part(after, name)
    # Phi-3 reads this key as an attribute; the default value may be left out.
    kept = key == "partial_rotary_factor" and value != 1.0 and str(one.get("model_type")).startswith("phi")
    return _contains(after, before) and (key not in other or key in one or kept)


def _class_of(values: Mapping[str, Any]) -> Any:
    from transformers import CONFIG_MAPPING

    model_type = str(values.get("model_type"))
    return CONFIG_MAPPING[model_type] if model_type in CONFIG_MAPPING else None


def _parsed(values: Values) -> Values | None:
    """The configuration as Transformers reads it; None for an unknown family or invalid values."""
    from transformers.utils import logging

    kind = _class_of(values)
    if kind is None:
        return None
    level = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)  # this is only a trial
    try:
        return json.loads(json.dumps(kind.from_dict(copy.deepcopy(values)).to_dict(), default=str))
    except Exception:  # invalid values raise anything; opening the model reports them
        return None
    finally:
        logging.set_verbosity(level)


def _contains(found: Any, wanted: Any) -> bool:
    """Whether everything that was read before (`wanted`) is read again."""
    if isinstance(wanted, dict):
        return isinstance(found, dict) and all(key in found and _contains(found[key], wanted[key]) for key in wanted)
    return bool(found == wanted)
