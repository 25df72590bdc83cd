"""The values of config.json for a quantized model: the source's own, spelled for Transformers 4 and 5 alike.

Transformers 5 moved the rotary settings into `rope_parameters` and renamed `torch_dtype` to `dtype`; it still reads the
older keys. A reader built on Transformers 4 knows only those, and computes with a base of 10000 where they are missing,
without a word. So both are written:

| Transformers 5 | before |
|---|---|
| rope_parameters.rope_theta | rope_theta; rotary_emb_base (GPT-NeoX); global_rope_theta (ModernBERT) |
| rope_parameters.rope_type and its numbers | rope_scaling, where it says more than "default" |
| rope_parameters.partial_rotary_factor | partial_rotary_factor; rotary_pct (GPT-NeoX) |
| rope_parameters.full_attention | the above, where each kind of layer has settings of its own |
| rope_parameters.sliding_attention.rope_theta | rope_local_base_freq (Gemma 3), local_rope_theta |
| dtype | torch_dtype |

Phi-3 and its kin read `rope_scaling` before `rope_parameters` in both; theirs has the fields that Transformers 4 asks
for.

Which of the older names a family has is asked of its class in Transformers: names that it takes for older spellings are
written, names that it would keep as attributes are not.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from auto_round.modeling.json_text import read_object
from auto_round.modeling.links import inside

_QUANTIZATION = ("quantization_config", "compression_config")
# Where the source lay on the machine that made it, and how it was run there.
_LOCAL = ("_name_or_path", "_attn_implementation_autoset", "_commit_hash")
_TEXT_PARTS = ("text_config", "llm_config", "language_config", "thinker_config")
_NEW, _SCALING = "rope_parameters", "rope_scaling"
_THETA = ("rope_theta", "rotary_emb_base", "global_rope_theta")
_LOCAL_THETA = ("rope_local_base_freq", "local_rope_theta")
_PARTIAL = ("partial_rotary_factor", "rotary_pct")
_OLD = (*_THETA, *_LOCAL_THETA, *_PARTIAL, _SCALING)
Values = dict[str, Any]


def source_values(config: Any, folder: Path | None, trusted: bool) -> Values:
    """The configuration of a model without what it says of quantization or of the machine.

    Args:
        config: the model's configuration object; read only where there is no folder.
        folder: of the checkpoint, whose config.json is taken as it is: unknown keys and the order of all are kept.
        trusted: the checkpoint's own Python files come along, so that `auto_map` may name them.

    Raises ModelError when the folder's config.json cannot be read.
    """
    if folder is None:
        values: Values = json.loads(config.to_json_string(use_diff=False))
    else:
        values = read_object(inside(folder, folder / "config.json"))
    values = _without(values, _LOCAL)
    for part in (values, *_parts(values)):
        for key in _QUANTIZATION:
            part.pop(key, None)
    if not trusted and _class_of(values) is not None:
        _drop_own_code(values)
    return values


def with_dtype(values: Mapping[str, Any], dtype: str) -> Values:
    """A copy that says `dtype` under both names, as every part does that has either. Parts keep a dtype of their own
    unless the whole is given another one than it had."""
    made = copy.deepcopy(dict(values))
    said = made.get("dtype") or made.get("torch_dtype")
    changed = said is not None and str(said).removeprefix("torch.") != dtype
    for part in _parts(made):
        own = part.get("dtype") or part.get("torch_dtype")
        if own is not None:
            part["dtype"] = part["torch_dtype"] = dtype if changed else own
    made["dtype"] = made["torch_dtype"] = dtype
    return made


def with_both_ropes(values: Mapping[str, Any]) -> Values:
    """A copy with the rotary settings in the words of Transformers 4 and of 5, the nested parts too. What is there is
    kept. Reading the copy gives the configuration that reading `values` gives."""
    made = copy.deepcopy(dict(values))
    before = _parsed(made)
    for path in [(), *((key,) for key, part in made.items() if _is_part(key, part))]:
        part, parsed = _at(made, path), _config_at(before, path)
        if parsed is not None and not isinstance(part.get(_NEW), dict):
            found = getattr(parsed, _NEW, None)
            text = not path or path[0] in _TEXT_PARTS
            if isinstance(found, dict) and found and (text or any(key in part for key in _OLD)):
                part[_NEW] = json.loads(json.dumps(found))
        older = _older(part.get(_NEW))
        if _SCALING in older and str(part.get("model_type", "")).startswith("phi"):
            older[_SCALING] = _phi_scaling(older[_SCALING], part)
        for key, value in older.items():
            if part.get(key) is None and (before is None or _reads(made, path, key, value, before)):
                part[key] = value
    if before is not None and not _same(before, _parsed(made)):
        return copy.deepcopy(dict(values))
    return made


def untied(values: Mapping[str, Any]) -> Values:
    """A copy that says that the output head has a weight of its own."""
    made = copy.deepcopy(dict(values))
    for key in _TEXT_PARTS:
        if isinstance(made.get(key), dict) and "tie_word_embeddings" in made[key]:
            made[key]["tie_word_embeddings"] = False
    made["tie_word_embeddings"] = False
    return made


def causal_class(values: Mapping[str, Any]) -> str | None:
    """The class that Transformers takes for a causal language model with these values, None when it knows none."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    found = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(str(values.get("model_type")))
    return found[0] if isinstance(found, (tuple, list)) else found


def _without(values: Mapping[str, Any], keys: tuple[str, ...]) -> Values:
    return {k: _without(v, keys) if isinstance(v, dict) else v for k, v in values.items() if k not in keys}


def _drop_own_code(values: Values) -> None:
    """Leave out of `auto_map` what names Python files of the folder; those of a repository stay."""
    own = values.get("auto_map")
    if isinstance(own, dict):
        kept = {key: name for key, name in own.items() if isinstance(name, str) and "--" in name}
        if kept:
            values["auto_map"] = kept
        else:
            del values["auto_map"]


def _is_part(key: str, value: Any) -> bool:
    return isinstance(value, dict) and key.endswith("_config") and key not in _QUANTIZATION


def _parts(values: Values) -> list[Values]:
    return [part for key, part in values.items() if _is_part(key, part)]


def _at(values: Values, path: tuple[str, ...]) -> Values:
    for key in path:
        values = values[key]
    return values


def _older(parameters: Any) -> Values:
    """The same settings under every older name that some family has."""
    if not isinstance(parameters, dict):
        return {}
    found: Values = {}
    if isinstance(parameters.get("full_attention"), dict):
        local = parameters.get("sliding_attention")
        if isinstance(local, dict) and local.get("rope_theta") is not None:
            found |= dict.fromkeys(_LOCAL_THETA, local["rope_theta"])
        parameters = parameters["full_attention"]
    if parameters.get("rope_theta") is not None:
        found |= dict.fromkeys(_THETA, parameters["rope_theta"])
    if parameters.get("partial_rotary_factor") is not None:
        found |= dict.fromkeys(_PARTIAL, parameters["partial_rotary_factor"])
    rest = {k: v for k, v in parameters.items() if k not in ("rope_theta", "partial_rotary_factor")}
    if any(isinstance(v, dict) for v in rest.values()):
        return {}  # settings by kinds of layers that no older version knew
    if set(rest) - {"rope_type", "type"} or rest.get("rope_type", "default") != "default":
        found[_SCALING] = rest
    return found


def _phi_scaling(scaling: Values, part: Values) -> Values:
    """Phi's `rope_scaling`, whose classes in Transformers 4 count its fields: `type` (never `rope_type`) and the two
    factors; Phi-3.5-MoE's the two scales and the original length besides, which the others have on the top level."""
    kind = scaling.get("rope_type", scaling.get("type"))
    made = {"type": kind} | {key: value for key, value in scaling.items() if key not in ("rope_type", "type")}
    length = "original_max_position_embeddings"
    if not {"short_mscale", "long_mscale"} & set(made) and part.get(length) == made.get(length):
        made.pop(length, None)
    return made


def _reads(values: Values, path: tuple[str, ...], key: str, value: Any, before: Any) -> bool:
    """Whether the family's class takes `key` for an older spelling, or has it as a setting of its own."""
    tried = copy.deepcopy(values)
    _at(tried, path)[key] = value
    after = _parsed(tried)
    if after is None or not _same(before, after):
        return False
    one, other = (_plain(_config_at(config, path)) for config in (before, after))
    # Phi-3 keeps this one as an attribute, as it was before; one that says nothing may be left out.
    kept = key == "partial_rotary_factor" and value != 1.0 and str(one.get("model_type")).startswith("phi")
    return key not in other or key in one or kept


def _class_of(values: Mapping[str, Any]) -> Any:
    from transformers import CONFIG_MAPPING

    model_type = str(values.get("model_type"))
    return CONFIG_MAPPING[model_type] if model_type in CONFIG_MAPPING else None


def _parsed(values: Values) -> Any:
    """What Transformers makes of the values, None when it knows no such family or refuses them."""
    kind = _class_of(values)
    if kind is None:
        return None
    try:
        with _quiet():
            return kind.from_dict(copy.deepcopy(values))
    except Exception:  # whatever odd values lead to; who opens the model is told
        return None


@contextmanager
def _quiet() -> Iterator[None]:
    """Trial readings are no news."""
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)
    try:
        yield
    finally:
        logging.set_verbosity(level)


def _config_at(config: Any, path: tuple[str, ...]) -> Any:
    for key in path:
        config = getattr(config, key, None)
    return config if hasattr(config, "to_dict") else None


def _plain(config: Any) -> Values:
    return {} if config is None else json.loads(json.dumps(config.to_dict(), default=str))


def _same(before: Any, after: Any) -> bool:
    """Whether everything that was read before is read again."""
    return after is not None and _holds(_plain(after), _plain(before))


def _holds(found: Any, wanted: Any) -> bool:
    if isinstance(wanted, dict):
        return isinstance(found, dict) and all(key in found and _holds(found[key], wanted[key]) for key in wanted)
    return bool(found == wanted)
