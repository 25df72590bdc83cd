"""The dataset string: `./tmp.json,NeelNanda/pile-10k:num=256:split=train+test,mbpp:concat=True`.

`,` separates datasets, `:` separates the options of one dataset, `+` adds values of one option. Single or double
quotes keep all three from having that meaning, in names as well as in values; inside quotes a backslash before the
quote keeps it. A word without `=` is a switch (`concat`, `apply_chat_template`) or else a split, so that
`NeelNanda/pile-10k:train` is short for `NeelNanda/pile-10k:split=train`. The `:` of a Windows drive (`C:\\data.json`)
and of `://` belongs to the name.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from auto_round.errors import ConfigError, nearest

OPTIONS = ("num", "split", "concat", "apply_chat_template", "system_prompt")
"""Option names a dataset string takes."""

_SWITCHES = ("concat", "apply_chat_template")
_TRUE = ("true", "1", "yes", "on")
_FALSE = ("false", "0", "no", "off")
_DRIVE = re.compile(r"[A-Za-z]:[\\/]")
_EXAMPLE = "./tmp.json,NeelNanda/pile-10k:num=256:split=train+test,mbpp:concat=True"


@dataclass(frozen=True)
class DatasetSpec:
    """One dataset of a dataset string.

    Attributes:
        name: registered name, hub id or path of a local file.
        num: samples wanted from this dataset; None shares what the others leave.
        splits: split names in the order given; empty takes the dataset's default.
        concat: join all documents, then cut them into samples; None takes the dataset's default.
        apply_chat_template: render every document with the tokenizer's chat template.
        system_prompt: system message of the template; None leaves it to the template.
    """

    name: str
    num: int | None = None
    splits: tuple[str, ...] = ()
    concat: bool | None = None
    apply_chat_template: bool = False
    system_prompt: str | None = None

    @property
    def bare(self) -> bool:
        """Whether nothing but the name was given."""
        return self == DatasetSpec(self.name)


def parse_dataset_string(text: str) -> list[DatasetSpec]:
    """Datasets named by `text`, in order.

    Raises ConfigError for an empty string or name, a quote that is not closed, an unknown or repeated option, or a
    value that the option does not take.
    """
    return [_parse_one(part, text) for part in _split(text, ",", text)]


def _parse_one(part: str, whole: str) -> DatasetSpec:
    pieces = _split(part, ":", whole)
    name = _unquote(pieces[0])
    if not name:
        raise ConfigError(f"dataset {whole!r} has an empty name; write it like {_EXAMPLE!r}")
    values: dict[str, str] = {}
    for piece in pieces[1:]:
        key, value = _key_and_value(piece, whole)
        if key in values:
            raise ConfigError(f"dataset {name!r} gives {key} twice; give it once")
        values[key] = value
    spec = DatasetSpec(
        name=name,
        num=_positive(values["num"], name) if "num" in values else None,
        splits=_splits(values["split"], name) if "split" in values else (),
        concat=_boolean("concat", values["concat"], name) if "concat" in values else None,
        apply_chat_template=_boolean("apply_chat_template", values.get("apply_chat_template", "false"), name),
        system_prompt=_unquote(values["system_prompt"]) if "system_prompt" in values else None,
    )
    if spec.system_prompt is not None and not spec.apply_chat_template:
        raise ConfigError(f"dataset {name!r} has a system_prompt but no chat template; add ':apply_chat_template'")
    return spec


def _key_and_value(piece: str, whole: str) -> tuple[str, str]:
    key, equals, value = piece.partition("=")
    key = key.strip()
    if equals and key[:1] not in "'\"":
        if key not in OPTIONS:
            raise ConfigError(
                f"dataset {whole!r} has the unknown option {key!r}{nearest(key, OPTIONS)} Known: {', '.join(OPTIONS)}"
            )
        return key, value.strip()
    word = piece.strip()
    if not word:
        raise ConfigError(f"dataset {whole!r} has nothing between two ':'; write options like {_EXAMPLE!r}")
    if word in _SWITCHES:
        return word, "true"
    if word in OPTIONS:
        raise ConfigError(f"dataset {whole!r} gives {word} without a value; write ':{word}=…'")
    return "split", word


def _splits(value: str, name: str) -> tuple[str, ...]:
    splits = tuple(_unquote(s) for s in _split(value, "+", value))
    if not all(splits):
        raise ConfigError(f"dataset {name!r} has an empty split in {value!r}; write split=train+test")
    return splits


def _positive(value: str, name: str) -> int:
    word = _unquote(value)
    if not word.isdecimal() or int(word) < 1:
        raise ConfigError(f"dataset {name!r} has num={value}; num is a whole number of samples, 1 or more")
    return int(word)


def _boolean(key: str, value: str, name: str) -> bool:
    word = _unquote(value).lower()
    if word not in _TRUE + _FALSE:
        raise ConfigError(f"dataset {name!r} has {key}={value}; write {key}=True or {key}=False")
    return word in _TRUE


def _split(text: str, separator: str, whole: str) -> list[str]:
    """Parts of `text` between separators that stand outside quotes."""
    parts = [""]
    for char, plain in _marked(text, whole):
        if plain and char == separator:
            parts.append("")
        else:
            parts[-1] += char
    return parts


def _marked(text: str, whole: str) -> Iterator[tuple[str, bool]]:
    """Each character with whether it can be a separator. Quotes are passed on, so that parts can be split again."""
    quote = ""
    escaped = False
    start_of_word = True
    for i, char in enumerate(text):
        if quote:
            yield char, False
            if char == quote and not escaped:
                quote = ""
            escaped = char == "\\"
            continue
        if char in "'\"" and start_of_word:
            quote, escaped, start_of_word = char, False, False
            yield char, False
            continue
        inside_name = char == ":" and (text.startswith("://", i) or _is_drive(text, i))
        yield char, not inside_name
        start_of_word = char in ",:=+" or (start_of_word and char == " ")
    if quote:
        raise ConfigError(
            f"dataset {whole!r} has a quote {quote} that is not closed; close it, and look at what the shell does"
        )


def _is_drive(text: str, colon: int) -> bool:
    """Whether the colon belongs to a Windows drive that starts a dataset's name."""
    before = text[: colon - 1].rstrip() if colon else "x"
    return bool(_DRIVE.match(text, colon - 1)) and (not before or before[-1] in ",'\"")


def _unquote(value: str) -> str:
    word = value.strip()
    if len(word) >= 2 and word[0] == word[-1] and word[0] in "'\"":
        return re.sub(r"\\(['\"])", r"\1", word[1:-1])
    return word
