"""Dataset strings, the registry of named datasets, and the number of samples of each; docs/datasets.md is the guide."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from auto_round.errors import ConfigError, nearest
from auto_round.report.run_report import redact_path

_BOOLS = dict.fromkeys(("true", "1", "yes", "on"), True) | dict.fromkeys(("false", "0", "no", "off"), False)
_DRIVE = re.compile(r"[A-Za-z]:[\\/]")
_EXAMPLE = "./tmp.json,NeelNanda/pile-10k:num=256:split=train+test,mbpp:concat=True"
_SWITCHES = ("concat", "apply_chat_template")
_OPTIONS = ("num", "split", *_SWITCHES, "system_prompt")

DatasetFunction = Callable[..., Iterable[Any]]
_F = TypeVar("_F", bound=DatasetFunction)

ARGUMENTS = ("tokenizer", "seqlen", "dataset_name", "split", "seed", "apply_chat_template", "system_prompt")
"""Arguments that a dataset function may name."""
BY_PROGRAM = "registered by this program"


@dataclass(frozen=True)
class DatasetSpec:
    """One dataset of a dataset string; None and empty values take the dataset's default."""

    name: str  # registered, hub id, or path of a local file
    num: int | None = None  # samples; None: a share of the rest
    splits: tuple[str, ...] = ()
    concat: bool | None = None
    apply_chat_template: bool = False
    system_prompt: str | None = None


def parse_dataset_string(text: str) -> list[DatasetSpec]:
    """Parse a dataset string into its datasets, in order. Raises ConfigError when it is malformed."""
    specs = []
    for part in _split(text, ",", text):
        first, *pieces = _split(part, ":", text)
        name = _unquote(first)
        if not name:
            raise ConfigError(f"dataset {text!r} has an empty name; write it like {_EXAMPLE!r}")
        values: dict[str, Any] = {}
        for piece in pieces:
            key, value = _key_and_value(piece, text)
            if key in values:
                raise ConfigError(f"dataset {name!r} gives {key} twice; give it once")
            values[key] = _parse_value(key, value, name)
        spec = DatasetSpec(name, splits=values.pop("split", ()), **values)
        if spec.system_prompt is not None and not spec.apply_chat_template:
            raise ConfigError(f"dataset {name!r} has a system_prompt but no chat template; add ':apply_chat_template'")
        specs.append(spec)
    return specs


def redact_dataset(text: str) -> str:
    """A dataset string without the folders of files."""

    def redact(word: str) -> str:
        path = _unquote(word)
        return word.replace(path, redact_path(path)) if path else word

    datasets = []
    for part in _split(text, ",", text):
        name, *options = _split(part, ":", text)
        parts = [key + equals + redact(value) for key, equals, value in (o.partition("=") for o in options)]
        datasets.append(":".join([redact(name), *parts]))
    return ",".join(datasets)


def _key_and_value(piece: str, whole: str) -> tuple[str, str]:
    """The option `key=value`; a word alone is a switch or a split."""
    key, equals, value = piece.partition("=")
    key, word = key.strip(), piece.strip()
    if equals and key[:1] not in "'\"":
        if key not in _OPTIONS:
            raise ConfigError(
                f"dataset {whole!r} has the unknown option {key!r}{nearest(key, _OPTIONS)} Known: {', '.join(_OPTIONS)}"
            )
        return key, value.strip()
    if not word:
        raise ConfigError(f"dataset {whole!r} has nothing between two ':'; write options like {_EXAMPLE!r}")
    if word in _SWITCHES:
        return word, "true"
    if word in _OPTIONS:
        raise ConfigError(f"dataset {whole!r} gives {word} without a value; write ':{word}=…'")
    return "split", word


def _parse_value(key: str, value: str, name: str) -> Any:
    word = _unquote(value)
    if key == "split":
        splits = tuple(_unquote(s) for s in _split(value, "+", value))
        if not all(splits):
            raise ConfigError(f"dataset {name!r} has an empty split in {value!r}; write split=train+test")
        return splits
    if key == "num":
        if not word.isdecimal() or int(word) < 1:
            raise ConfigError(f"dataset {name!r} has num={value}; num is an integer of 1 or more")
        return int(word)
    if key in _SWITCHES:
        if word.lower() not in _BOOLS:
            raise ConfigError(f"dataset {name!r} has {key}={value}; write {key}=True or {key}=False")
        return _BOOLS[word.lower()]
    return word


def _split(text: str, separator: str, whole: str) -> list[str]:
    """Split `text` at separators outside quotes. Quotes are kept, so that parts can be split again."""
    parts, quote, escaped, start_of_word = [""], "", False, True
    for i, char in enumerate(text):
        if quote:
            if char == quote and not escaped:
                quote = ""
            escaped = char == "\\"
        elif char in "'\"" and start_of_word:
            quote, escaped, start_of_word = char, False, False
        else:
            start_of_word = char in ",:=+" or (start_of_word and char == " ")
            before = text[: i - 1].rstrip() if i else "x"
            # The colon of a Windows drive (`C:\data.json`) or of `://` belongs to the name.
            drive = _DRIVE.match(text, i - 1) and (not before or before[-1] in ",'\"")
            if char == separator and not (char == ":" and (drive or text.startswith("://", i))):
                parts.append("")
                continue
        parts[-1] += char
    if quote:
        raise ConfigError(
            f"dataset {whole!r} has a quote {quote} that is not closed; close it, and check the quoting of your shell"
        )
    return parts


def _unquote(value: str) -> str:
    word = value.strip()
    if len(word) >= 2 and word[0] == word[-1] and word[0] in "'\"":
        return re.sub(r"\\(['\"])", r"\1", word[1:-1])
    return word


@dataclass(frozen=True)
class DatasetEntry:
    """A registered dataset."""

    name: str
    function: DatasetFunction
    description: str  # a few words for `list dataset`
    where: str  # where the data comes from, e.g. "Hugging Face hub"
    concat: bool  # default of `concat`; True suits datasets of short documents
    takes: frozenset[str]  # the members of `ARGUMENTS` that the function names

    def documents(self, **arguments: Any) -> Iterable[Any]:
        """Call the function with the arguments that it takes."""
        return self.function(**{k: v for k, v in arguments.items() if k in self.takes})


DATASETS: dict[str, DatasetEntry] = {}  # registered datasets by name


def register_dataset(
    names: str | Iterable[str], *, description: str = "", where: str = BY_PROGRAM, concat: bool = False
) -> Callable[[_F], _F]:
    """Decorator: the function reads one or several dataset names, in place of earlier ones. It gets those of
    `ARGUMENTS` that it names (all with `**kwargs`), and yields strings, mappings with `text`, `messages` or
    `input_ids`, or lists of messages. Raises ConfigError for an unusable name, or a function that requires an unknown
    argument."""
    wanted = (names,) if isinstance(names, str) else tuple(names)
    if not wanted or not all(isinstance(n, str) and n for n in wanted):
        raise ConfigError(f"register_dataset got the names {names!r}; give a name or a list of names")
    for name in wanted:
        if any(c in name for c in ",:+\"'"):
            raise ConfigError(f"dataset name {name!r} has one of , : + or a quote, which the dataset string uses")

    def register(function: _F) -> _F:
        takes: set[str] = set()
        for parameter in inspect.signature(function).parameters.values():
            if parameter.kind is parameter.VAR_KEYWORD:
                takes.update(ARGUMENTS)
            elif parameter.name in ARGUMENTS and parameter.kind is not parameter.POSITIONAL_ONLY:
                takes.add(parameter.name)
            elif parameter.default is parameter.empty and parameter.kind is not parameter.VAR_POSITIONAL:
                raise ConfigError(
                    f"dataset function {function.__name__!r} needs {parameter.name!r}, which is not one of the "
                    f"arguments it can be given: {', '.join(ARGUMENTS)}; rename it or give it a default"
                )
        text = description or (inspect.getdoc(function) or "").split("\n")[0]
        for name in wanted:
            DATASETS[name] = DatasetEntry(name, function, text, where, concat, frozenset(takes))
        return function

    return register


def samples_per_dataset(wanted: Sequence[int | None], total: int) -> list[int]:
    """Samples per dataset, at most `total` in all and one each if possible; `wanted` is the `num=` of each. If the
    numbers fit, they are used, and the others share the rest evenly. Else each dataset without a number gets an even
    part of `total`, and the others share the rest by their numbers."""
    unset = [i for i, n in enumerate(wanted) if n is None]
    asked = sum(n or 0 for n in wanted)
    if asked + len(unset) <= total:
        result = [n or 0 for n in wanted]
        for position, i in enumerate(unset):
            result[i] = (total - asked) // len(unset) + (position < (total - asked) % len(unset))
        return result
    weights = [float(n or 0) for n in wanted]
    even = total / len(wanted)
    rest = total - even * len(unset)
    for i in unset:  # an even part of the total, on the scale of the numbers
        weights[i] = even * asked / rest if rest > 0 and asked else 1.0
    exact = [w * total / sum(weights) for w in weights]
    result = [int(e) for e in exact]
    by_remainder = sorted(range(len(exact)), key=lambda i: (result[i] - exact[i], i))  # largest first
    for i in by_remainder[: total - sum(result)]:
        result[i] += 1
    while 0 in result and max(result) > 1:
        result[result.index(max(result))] -= 1
        result[result.index(0)] += 1
    return result
