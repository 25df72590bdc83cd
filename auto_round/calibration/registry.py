"""Names of calibration datasets and the functions that read them.

    from auto_round.calib_dataset import register_dataset

    @register_dataset("my_notes", description="notes of my team")
    def my_notes(tokenizer, seqlen, dataset_name, split, seed):
        for path in sorted(Path("notes").glob("*.md")):
            yield path.read_text()

A function is called with those of the arguments below that it names (all of them when it takes `**kwargs`), and gives
documents: strings, mappings with `text`, `messages` or `input_ids`, or lists of messages. It may give more than is
needed, and is read only as far as needed.

tokenizer, seqlen (tokens per sample), dataset_name (the registered name used), split (None, one name, or several
joined by `+`), seed, apply_chat_template (bool), system_prompt (None or text). A function that names
`apply_chat_template` renders the template itself.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, TypeVar

from auto_round.errors import ConfigError

DatasetFunction = Callable[..., Iterable[Any]]
_F = TypeVar("_F", bound=DatasetFunction)

ARGUMENTS = ("tokenizer", "seqlen", "dataset_name", "split", "seed", "apply_chat_template", "system_prompt")
"""Arguments a dataset function may name."""


@dataclass(frozen=True)
class DatasetEntry:
    """A registered dataset.

    Attributes:
        name: as written in a dataset string.
        function: gives the documents, see the module's text.
        description: a few words for `list dataset`.
        where: where the data comes from, e.g. "Hugging Face hub".
        concat: the value of `concat` when the dataset string gives none; True suits sets of short documents.
        takes: which of `ARGUMENTS` the function names.
    """

    name: str
    function: DatasetFunction
    description: str
    where: str
    concat: bool
    takes: frozenset[str]

    def documents(self, **arguments: Any) -> Iterable[Any]:
        """Call the function with the arguments it takes."""
        return self.function(**{k: v for k, v in arguments.items() if k in self.takes})


BY_PROGRAM = "registered by this program"
DATASETS: dict[str, DatasetEntry] = {}
"""Registered datasets by name."""


def register_dataset(
    names: str | Iterable[str],
    *,
    description: str = "",
    where: str = BY_PROGRAM,
    concat: bool = False,
) -> Callable[[_F], _F]:
    """Decorator that makes a function the reader of one or several dataset names; see the module's text.

    Registering a name again replaces it. Raises ConfigError for an empty name, a name that the dataset string could
    not hold (`,`, `:`, `+`), or a function that has to be given an argument we do not know.
    """
    wanted = (names,) if isinstance(names, str) else tuple(names)
    if not wanted or not all(isinstance(n, str) and n for n in wanted):
        raise ConfigError(f"register_dataset got the names {names!r}; give a name or a list of names")
    for name in wanted:
        if any(c in name for c in ",:+\"'"):
            raise ConfigError(f"dataset name {name!r} has one of , : + or a quote, which the dataset string uses")

    def register(function: _F) -> _F:
        takes = _arguments(function)
        text = description or (inspect.getdoc(function) or "").split("\n")[0]
        for name in wanted:
            DATASETS[name] = DatasetEntry(name, function, text, where, concat, takes)
        return function

    return register


def _arguments(function: DatasetFunction) -> frozenset[str]:
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
    return frozenset(takes)
