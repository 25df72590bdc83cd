"""Resolve `layer_config` and `ignore_layers`: names, partial names and regular expressions of layers to schemes."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

from auto_round.errors import ConfigError, nearest
from auto_round.schemes import ACTIVATION_KEYS, QuantizationScheme, parse_scheme, preset_name_to_scheme

_MAX_DEPTH = 20
# Keys that the attribute `AutoRound.layer_config` adds to the scheme's; ignored when its value is passed in again.
INFO_KEYS = ("in_blocks", "fixed_by_user", "mostly", "scale_dtype")
_REGEX_CHARS = re.compile(r"[\\^$*+?\[\](){}|]")


def parse_layer_config(text: str) -> dict[str, Any]:
    """Parse the value of `--layer_config`: JSON, the same without quotes, or the path of a `.json` file.

    Without quotes: `{k_proj:{bits:8},lm_head:W4A16}`. A key that contains `:` needs quotes. Whole numbers in quotes
    (`{"bits": "8"}`) are read as numbers. Raises ConfigError, with the position, when the text is no such mapping.
    """
    text = text.strip()
    if text.endswith(".json") and "{" not in text:
        try:
            with open(text, encoding="utf-8") as file:
                text = file.read().strip()
        except OSError as error:
            raise ConfigError(f"--layer_config: cannot read {text!r}: {error.strerror}") from error
        except UnicodeDecodeError as error:
            raise ConfigError(f"--layer_config: {text!r} is not UTF-8 text ({error.reason})") from error
    try:
        value = json.loads(text)
    except (json.JSONDecodeError, RecursionError):
        value = _RelaxedReader(text).read()
    if not isinstance(value, dict):
        raise ConfigError(f"--layer_config {text!r} is not a mapping; write {{layer:{{bits:8}},other:W8A16}}")
    for fields in value.values():
        for key, field in fields.items() if isinstance(fields, dict) else ():
            if isinstance(field, str) and re.fullmatch(r"-?\d{1,9}", field):
                fields[key] = int(field)
    return value


class _RelaxedReader:
    """Recursive-descent parser of JSON whose strings may lack quotes: `{a:{b:1},c:[1,2]}`."""

    def __init__(self, text: str) -> None:
        self.text, self.at = text, 0

    def read(self) -> Any:
        value = self._value(0)
        if self._peek():
            raise self._error("text after the end")
        return value

    def _error(self, what: str) -> ConfigError:
        return ConfigError(f"--layer_config: {what} at character {self.at + 1} of {self.text!r}")

    def _peek(self) -> str:
        """The next character that is not white space; "" at the end."""
        while self.text[self.at : self.at + 1].isspace():
            self.at += 1
        return self.text[self.at : self.at + 1]

    def _take(self, char: str) -> None:
        if self._peek() != char:
            raise self._error(f"expected {char!r}")
        self.at += 1

    def _value(self, depth: int) -> Any:
        end = {"{": "}", "[": "]", "(": ")"}.get(self._peek())
        if end is None:
            word, quoted = self._string(",}])")
            special = {"true": True, "false": False, "none": None, "null": None}
            if quoted or word.lower() in special:
                return word if quoted else special[word.lower()]
            for kind in (int, float):
                with suppress(ValueError):
                    return kind(word)
            return word
        if depth == _MAX_DEPTH:
            raise self._error("brackets nested too deeply")
        self.at += 1
        mapping: dict[str, Any] = {}
        items: list[Any] = []
        while self._peek() != end:
            if end == "}":
                key, _ = self._string(":")
                self._take(":")
                if key in mapping:
                    raise self._error(f"{key!r} is given twice")
                mapping[key] = self._value(depth + 1)
            else:
                items.append(self._value(depth + 1))
            if self._peek() != end:
                self._take(",")
        self.at += 1
        return mapping if end == "}" else items

    def _string(self, ends: str) -> tuple[str, bool]:
        """The next string, up to its closing quote or a character of `ends`, and whether it has quotes."""
        quote, start = self._peek(), self.at
        if quote and quote in "\"'":
            self.at = self.text.find(quote, start + 1) + 1
            if not self.at:
                self.at = start
                raise self._error("a quote that is not closed")
            return self.text[start + 1 : self.at - 1], True
        while self.at < len(self.text) and self.text[self.at] not in ends:
            self.at += 1
        word = self.text[start : self.at].strip()
        if not word:
            raise self._error("a name or value is missing")
        return word, False


def parse_ignore_layers(value: str | Sequence[str] | None) -> tuple[str, ...]:
    """The tuple of patterns in a list or in a text such as "mlp, lm_head"."""
    if not value:
        return ()
    items = value.replace(";", ",").split(",") if isinstance(value, str) else list(value)
    for item in items:
        if not isinstance(item, str):
            raise ConfigError(f"ignore_layers: {item!r} is not a layer name; give names or patterns, such as 'mlp'")
    return tuple(item.strip() for item in items if item.strip())


def matching_layers(pattern: str, layers: Sequence[str]) -> list[str]:
    """The layers that a pattern matches: the one of that full name, else those that a regular expression or partial
    name matches. A number at either end of a partial name is a whole one: `layers.1` does not match `layers.10`."""
    if not isinstance(pattern, str) or not pattern.strip():
        raise ConfigError(f"layer pattern {pattern!r} is empty or not text; give a layer's name or a part of it")
    if pattern in layers:
        return [pattern]
    if _REGEX_CHARS.search(pattern):
        expression = pattern_regex(pattern)
    else:
        before = r"(?<!\d)" if pattern[0].isdigit() else ""
        after = r"(?!\d)" if pattern[-1].isdigit() else ""
        expression = before + re.escape(pattern) + after
    try:
        compiled = re.compile(expression)
    except re.error as error:
        raise ConfigError(f"layer pattern {pattern!r} is not a regular expression: {error}") from error
    return [name for name in layers if compiled.search(name)]


def pattern_regex(pattern: str) -> str:
    """A regular expression, such as `.*k_proj.*`, that finds every layer that a pattern matches, and may find more. The
    glob `*k_proj` becomes `.*k_proj`."""
    if _REGEX_CHARS.search(pattern):
        return "." + pattern if pattern.startswith("*") else pattern
    return f".*{re.escape(pattern)}.*"


def scheme_from_entry(name: str, entry: Any, default: QuantizationScheme) -> QuantizationScheme:
    """The scheme of one value of a layer configuration: a preset name, a scheme, bits, or fields that change `default`,
    or the scheme under the key `scheme`. Raises ConfigError for an unknown preset or field, or a wrong value."""
    if isinstance(entry, QuantizationScheme):
        return entry
    if isinstance(entry, str):
        if entry.lower() in ("fp16", "fp32", "float16", "float32", "bfloat16"):
            entry = "BF16"
        try:
            return preset_name_to_scheme(entry)
        except ConfigError as error:
            raise ConfigError(f"layer_config[{name!r}]={entry!r}: {error}") from error
    if isinstance(entry, int) and not isinstance(entry, bool):
        return default.with_overrides({"bits": entry})
    if isinstance(entry, Mapping):
        fields = {key: value for key, value in entry.items() if key not in (*INFO_KEYS, "scheme")}
        try:
            base = default if entry.get("scheme") is None else parse_scheme(entry["scheme"])
            scheme = base.with_overrides(fields)
        except ConfigError as error:
            raise ConfigError(f"layer_config[{name!r}]: {error}") from error
        if not scheme.quantizes_activations and not default.quantizes_activations:
            # Neither quantizes activations, so their other fields must not make the schemes differ.
            return replace(scheme, **{key: getattr(default, key) for key in ACTIVATION_KEYS})
        return scheme
    raise ConfigError(
        f"layer_config[{name!r}]={entry!r}: give a preset name, a dict such as {{'bits': 8}}, or a QuantizationScheme"
    )


def resolve_layers(
    layers: Iterable[str], default: QuantizationScheme, layer_config: Mapping[str, Any] | None = None,
    ignore_layers: str | Sequence[str] | None = None, outside_blocks: Iterable[str] = (), quant_lm_head: bool = False,
    own_defaults: Mapping[str, QuantizationScheme] | None = None, other_modules: Sequence[str] = (),
    unmatched: Callable[[str], None] | None = None,
) -> dict[str, QuantizationScheme]:  # fmt: skip
    """The scheme of every layer.

    Args:
        layers: names of the linear layers inside blocks.
        default: their scheme unless another is given.
        layer_config: {full name | partial name | regular expression: scheme, preset name or fields}. A full name takes
            precedence over a pattern, and a later pattern over an earlier one.
        ignore_layers: patterns of layers left in full precision; they take precedence over `layer_config`.
        outside_blocks: names of the linear layers outside blocks: full precision unless named or `quant_lm_head`.
        own_defaults: by layer, a default scheme that replaces `default`.
        other_modules: names of modules that are never quantized. An entry of 16 bits may name them.
        unmatched: called with the message about a pattern that matches no layer; None raises it as ConfigError.

    Raises ConfigError when an entry is not a scheme.
    """

    def report(message: str) -> None:
        if unmatched is None:
            raise ConfigError(message)
        unmatched(message)

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
                report(f"layer_config: {pattern!r} is {others[0]}, which is not quantized here; its entry is ignored")
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


def _no_match(argument: str, pattern: str, known: Sequence[str]) -> str:
    segments = sorted({part for name in known for part in name.split(".") if not part.isdigit()})
    kinds = {re.sub(r"\d+", "0", name): name for name in reversed(known)}  # one layer per name without its numbers
    hint = nearest(pattern, kinds.values()) or nearest(pattern.strip(".*"), segments) or "."
    return (
        f"{argument}: {pattern!r} matches no layer of this model{hint} Its layers are named like {', '.join(segments)}"
    )
