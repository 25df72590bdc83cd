"""config.json as it is, with the few questions that Transformers' configurations answer. No Transformers needed."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

from auto_round.errors import ModelError
from auto_round.modeling.json_text import read_object
from auto_round.modeling.links import inside

_TEXT_PARTS = ("text_config", "llm_config", "language_config", "thinker_config")


class RawConfig:
    """The values of a config.json as attributes; a mapping inside stays one, but for the text part.

    Args:
        values: of the file. They are not changed.
    """

    def __init__(self, values: dict[str, Any]) -> None:
        self.__dict__.update(copy.deepcopy(values))
        for key in _TEXT_PARTS:
            part = self.__dict__.get(key)
            if isinstance(part, dict):
                self.__dict__[key] = RawConfig(part)
        if "dtype" not in self.__dict__ and "torch_dtype" in self.__dict__:
            self.__dict__["dtype"] = self.__dict__.pop("torch_dtype")

    def get_text_config(self) -> RawConfig:
        """The part that describes the language model; itself where there is one part only."""
        for key in _TEXT_PARTS:
            part = self.__dict__.get(key)
            if isinstance(part, RawConfig):
                return part.get_text_config()
        return self

    def values(self) -> dict[str, Any]:
        """As read, but for what was deleted."""
        return {k: v.values() if isinstance(v, RawConfig) else copy.deepcopy(v) for k, v in self.__dict__.items()}

    def to_json_string(self, use_diff: bool = True) -> str:
        """The same as JSON; `use_diff` is of no consequence, since nothing is known of defaults."""
        return json.dumps(self.values(), indent=2, sort_keys=True)

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"config.json has no {name!r}")


def read_config(folder: Path) -> RawConfig:
    """The config.json of a folder. Raises ModelError when there is none, or it is no JSON object."""
    file = folder / "config.json"
    if not file.is_file():
        raise ModelError(f"{folder} has no config.json; give the folder of a model with config.json and safetensors")
    return RawConfig(read_object(inside(folder, file)))
