"""Resolve `layer_config` and `ignore_layers`: match names, partial names and regular expressions to schemes."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from auto_round.errors import ConfigError, nearest
from auto_round.schemes import QuantizationScheme, is_preset_scheme, parse_scheme, preset_name_to_scheme

LayerConfig = Mapping[str, Any]
_MAX_DEPTH = 20
# What `AutoRound.layer_config` tells beside the scheme, so that it can be given back.
_INFO_KEYS = ("in_blocks", "fixed_by_user", "mostly", "scale_dtype")
_ACTIVATION_DETAILS = ("act_bits", "act_group_size", "act_sym", "act_data_type", "act_dynamic")
_REGEX_CHARS = re.compile(r"[\\^$*+?\[\](){}|]")


def parse_layer_config(text: str) -> dict[str, Any]:
    """A layer configuration written on the command line.

    JSON, or the same without quotes: `{k_proj:{bits:8},v_proj:{bits:8,group_size:32},lm_head:W4A16}`. Regular
    expressions may be keys; a key that holds `:`, `,` or braces needs quotes. A path to a `.json` file is read.
    Whole numbers in quotes are numbers.

    Raises:
        ConfigError: the text is not such a mapping; the message shows the place.
    """
    text = text.strip()
    if text.endswith(".json") and "{" not in text:
        try:
            with open(text, encoding="utf-8") as file:
                text = file.read().strip()
        except OSError as error:
            raise ConfigError(f"--layer_config: cannot read {text!r}: {error.strerror}") from error
        except UnicodeDecodeError as error:
            raise ConfigError(f"--layer_config: {text!r} is no text in UTF-8 ({error.reason})") from error
    try:
        value = json.loads(text)
    except (json.JSONDecodeError, RecursionError):
        value = _RelaxedReader(text).read()
    if not isinstance(value, dict):
        raise ConfigError(f"--layer_config {text!r} is not a mapping; write {{layer:{{bits:8}},other:W8A16}}")
    return {name: _with_numbers(entry) for name, entry in value.items()}


def _with_numbers(entry: Any) -> Any:
    """The entry with the numbers that stood in quotes (`{"bits": "8"}`)."""
    if not isinstance(entry, dict):
        return entry
    return {k: int(v) if isinstance(v, str) and re.fullmatch(r"-?\d{1,9}", v) else v for k, v in entry.items()}


class _RelaxedReader:
    """Reads `{a:{b:1},c:[1,2]}`: JSON whose strings may lack quotes."""

    def __init__(self, text: str) -> None:
        self.text, self.at, self.depth = text, 0, 0

    def read(self) -> Any:
        value = self._value()
        self._space()
        if self.at != len(self.text):
            raise self._error("text after the end")
        return value

    def _error(self, what: str) -> ConfigError:
        return ConfigError(f"--layer_config: {what} at character {self.at + 1} of {self.text!r}")

    def _space(self) -> None:
        while self.at < len(self.text) and self.text[self.at].isspace():
            self.at += 1

    def _peek(self) -> str:
        self._space()
        return self.text[self.at] if self.at < len(self.text) else ""

    def _take(self, char: str) -> None:
        if self._peek() != char:
            raise self._error(f"expected {char!r}")
        self.at += 1

    def _value(self) -> Any:
        char = self._peek()
        if not char or char not in "{[(":
            return _plain(self._string(",}])"))
        self.depth += 1
        if self.depth > _MAX_DEPTH:
            raise self._error("brackets nested too deeply")
        value = self._mapping() if char == "{" else self._list("]" if char == "[" else ")")
        self.depth -= 1
        return value

    def _mapping(self) -> dict[str, Any]:
        self._take("{")
        result: dict[str, Any] = {}
        while self._peek() != "}":
            key = self._string(":")
            if isinstance(key, _Quoted):
                key = str(key)
            self._take(":")
            if key in result:
                raise self._error(f"{key!r} is given twice")
            result[key] = self._value()
            if self._peek() != "}":
                self._take(",")
        self._take("}")
        return result

    def _list(self, end: str) -> list[Any]:
        self.at += 1
        result = []
        while self._peek() != end:
            result.append(self._value())
            if self._peek() != end:
                self._take(",")
        self._take(end)
        return result

    def _string(self, ends: str) -> str:
        quote = self._peek()
        if quote and quote in "\"'":
            close = self.text.find(quote, self.at + 1)
            if close < 0:
                raise self._error("a quote that is not closed")
            word, self.at = self.text[self.at + 1 : close], close + 1
            return _Quoted(word)
        start = self.at
        while self.at < len(self.text) and self.text[self.at] not in ends:
            self.at += 1
        word = self.text[start : self.at].strip()
        if not word:
            raise self._error("a name or value is missing")
        return word


class _Quoted(str):
    """A string that stood in quotes, and so is no number or truth value."""


def _plain(word: str) -> Any:
    if isinstance(word, _Quoted):
        return str(word)
    special = {"true": True, "false": False, "none": None, "null": None}
    if word.lower() in special:
        return special[word.lower()]
    for kind in (int, float):
        try:
            return kind(word)
        except ValueError:
            continue
    return word


def parse_ignore_layers(value: str | Sequence[str] | None) -> tuple[str, ...]:
    """`"mlp, lm_head"` or a list, as a tuple of patterns."""
    if not value:
        return ()
    items = value.replace(";", ",").split(",") if isinstance(value, str) else list(value)
    for item in items:
        if not isinstance(item, str):
            raise ConfigError(f"ignore_layers: {item!r} is no layer name; give names or patterns, such as 'mlp'")
    return tuple(item.strip() for item in items if item.strip())


def matching_layers(pattern: str, layers: Sequence[str]) -> list[str]:
    """Layers that a pattern means: the full name alone if it is one, else a regular expression or partial name.

    A partial name matches whole dotted segments or the end or start of one, so `layers.1` does not mean `layers.10`
    and `k_proj` does mean `model.layers.0.self_attn.k_proj`.
    """
    if not isinstance(pattern, str) or not pattern.strip():
        raise ConfigError(f"layer pattern {pattern!r} is empty or no text; give a layer's name or a part of it")
    if pattern in layers:
        return [pattern]
    if _REGEX_CHARS.search(pattern):
        # A leading `*` is a glob by habit ("*k_proj"); `.*` inside is a regular expression already.
        expression = "." + pattern if pattern.startswith("*") else pattern
        try:
            compiled = re.compile(expression)
        except re.error as error:
            raise ConfigError(f"layer pattern {pattern!r} is not a regular expression: {error}") from error
        return [name for name in layers if compiled.search(name)]
    # A digit at either end of the pattern must not run on into more digits.
    literal = re.escape(pattern)
    before = r"(?<!\d)" if pattern[0].isdigit() else ""
    after = r"(?!\d)" if pattern[-1].isdigit() else ""
    compiled = re.compile(before + literal + after)
    return [name for name in layers if compiled.search(name)]


def pattern_regex(pattern: str) -> str:
    """A pattern of a layer configuration as a regular expression that is searched for in a layer's name, such as
    `.*k_proj.*`. It may mean more than the pattern: a digit at its end runs on."""
    if _REGEX_CHARS.search(pattern):
        return "." + pattern if pattern.startswith("*") else pattern
    return f".*{re.escape(pattern)}.*"


def scheme_from_entry(name: str, entry: Any, default: QuantizationScheme) -> QuantizationScheme:
    """One value of a layer configuration as a scheme: a preset name, a scheme, or fields that change `default`.

    The field `scheme` names what the other fields change instead: `{"scheme": "W8A16", "group_size": 32}`.

    Raises:
        ConfigError: an unknown preset or field, or a value that is not allowed.
    """
    if isinstance(entry, QuantizationScheme):
        return entry
    if isinstance(entry, str):
        if entry.lower() in ("fp16", "fp32", "float16", "float32", "bfloat16"):
            entry = "BF16"
        if not is_preset_scheme(entry):
            raise ConfigError(f"layer_config[{name!r}]={entry!r}: {_preset_problem(entry)}")
        return preset_name_to_scheme(entry)
    if isinstance(entry, int) and not isinstance(entry, bool):
        return default.with_overrides({"bits": entry})
    if isinstance(entry, Mapping):
        fields = {key: value for key, value in entry.items() if key not in (*_INFO_KEYS, "scheme")}
        try:
            base = default if entry.get("scheme") is None else parse_scheme(entry["scheme"])
            scheme = base.with_overrides(fields)
        except ConfigError as error:
            raise ConfigError(f"layer_config[{name!r}]: {error}") from error
        if not scheme.quantizes_activations and not default.quantizes_activations:
            # How activations would be quantized makes no difference where they are not.
            return replace(scheme, **{key: getattr(default, key) for key in _ACTIVATION_DETAILS})
        return scheme
    raise ConfigError(
        f"layer_config[{name!r}]={entry!r}: give a preset name, a dict such as {{'bits': 8}}, or a QuantizationScheme"
    )


def _preset_problem(entry: str) -> str:
    try:
        preset_name_to_scheme(entry)
    except ConfigError as error:
        return str(error)
    return "unknown"


def resolve_layers(
    layers: Iterable[str],
    default: QuantizationScheme,
    layer_config: LayerConfig | None = None,
    ignore_layers: str | Sequence[str] | None = None,
    outside_blocks: Iterable[str] = (),
    quant_lm_head: bool = False,
    own_defaults: Mapping[str, QuantizationScheme] | None = None,
    other_modules: Sequence[str] = (),
    unmatched: Callable[[str], None] | None = None,
) -> dict[str, QuantizationScheme]:
    """The scheme of every layer.

    Args:
        layers: names of the linear layers inside blocks.
        default: what they get when nothing else is said.
        layer_config: {full name | partial name | regular expression: scheme, preset name or fields}. A full name beats
            a pattern; among patterns the later one wins.
        ignore_layers: patterns of layers left in full precision; they beat `layer_config`.
        outside_blocks: names of the linear layers outside blocks, such as `lm_head`: full precision unless named.
        quant_lm_head: give the layers outside blocks the default scheme too.
        own_defaults: by layer, what takes the place of `default` for it.
        other_modules: names of modules that are never quantized. An entry of 16 bits may name them.
        unmatched: takes the message about a name or pattern that means nothing; None raises it.

    Raises:
        ConfigError: a pattern matches no layer (with the nearest names) and `unmatched` is None, or an entry is no
            scheme.
    """
    report = _refuse if unmatched is None else unmatched
    inside, outside = list(layers), list(outside_blocks)
    full = default.with_overrides({"bits": 16, "act_bits": 16})
    known = inside + outside
    defaults = {name: (own_defaults or {}).get(name, default) for name in known}
    schemes = {name: defaults[name] if quant_lm_head or name not in outside else full for name in known}
    exact: dict[str, QuantizationScheme] = {}
    for pattern, entry in (layer_config or {}).items():
        names = matching_layers(pattern, known)
        if not names:
            scheme = scheme_from_entry(pattern, entry, default)
            others = matching_layers(pattern, other_modules)
            if not others:
                report(_no_match("layer_config", pattern, known))
            elif scheme.quantizes_weights:
                report(f"layer_config: {pattern!r} names {others[0]}, which is not quantized here: it stays as it is")
        for name in names:
            scheme = scheme_from_entry(pattern, entry, defaults[name])
            if pattern == name:
                exact[name] = scheme
            else:
                schemes[name] = scheme
    schemes.update(exact)
    for pattern in parse_ignore_layers(ignore_layers):
        names = matching_layers(pattern, known)
        if not names and not matching_layers(pattern, other_modules):
            report(_no_match("ignore_layers", pattern, known))
        for name in names:
            schemes[name] = full
    return schemes


def _refuse(message: str) -> None:
    raise ConfigError(message)


def _no_match(argument: str, pattern: str, known: Sequence[str]) -> str:
    segments = sorted({part for name in known for part in name.split(".") if not part.isdigit()})
    kinds = {re.sub(r"\d+", "0", name): name for name in reversed(known)}  # one layer of each kind
    hint = nearest(pattern, kinds.values()) or nearest(pattern.strip(".*"), segments) or "."
    return (
        f"{argument}: {pattern!r} matches no layer of this model{hint} Its layers are named like {', '.join(segments)}"
    )
