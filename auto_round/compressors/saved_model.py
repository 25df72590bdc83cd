"""A saved model that is opened when it is first used."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from threading import Lock
from typing import Any

import torch

from auto_round.errors import AutoRoundError, ConfigError, ModelError, nearest

_TOLD = ("bits", "group_size", "sym", "data_type", "act_bits")
_OPTIONS = (
    "output_dir", "format", "inplace", "return_folders", "safe_serialization", "overwrite", "max_shard_size", "resume",
)  # fmt: skip


def check_save_options(safe_serialization: bool, unknown: Mapping[str, Any]) -> None:
    """Raise ConfigError for keywords that saving does not have, and for pickles."""
    if not safe_serialization:
        raise ConfigError(
            "safe_serialization=False is not supported: it writes pickles, which run code when they are opened; leave "
            "it out, and the weights are written as safetensors"
        )
    for name in unknown:
        raise ConfigError(
            f"unknown argument {name!r} of saving{nearest(name, _OPTIONS)}; it takes {', '.join(_OPTIONS)}"
        )


def open_saved(folder: str, trust_remote_code: bool = False) -> torch.nn.Module:
    """Open a folder that a run wrote, with Transformers. A GGUF file is dequantized, as Transformers does it.

    Raises ModelError when Transformers cannot open it.
    """
    from transformers import AutoModelForCausalLM, AutoRoundConfig

    files = sorted(path.name for path in Path(folder).glob("*.gguf"))
    options: dict[str, Any] = {"gguf_file": files[0]} if files else {"dtype": "auto"}
    if not files and _quant_method(folder) in ("gptq", "awq"):
        options["quantization_config"] = AutoRoundConfig()  # our own layers run them, without another package
    try:
        model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=trust_remote_code, **options)
    except (OSError, ValueError, KeyError, ImportError, TypeError, AttributeError, RuntimeError) as error:
        raise ModelError(
            f"the model in {folder} cannot be opened with Transformers ({error}); open it with the engine that its "
            "format is for"
        ) from error
    assert isinstance(model, torch.nn.Module)
    return model.eval()


def _quant_method(folder: str) -> str | None:
    """What the config.json in a folder says about its weights."""
    try:
        config = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
        return str(config["quantization_config"]["quant_method"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def describe_layers(model: torch.nn.Module, fields: Mapping[str, Mapping[str, Any]]) -> None:
    """Give each layer the attributes that tell its scheme (`bits`, `group_size`, ...), unless it has its own.

    `fields`: by layer, as in `AutoRound.layer_config`. Layers that the model does not have as modules are left out.
    """
    modules = dict(model.named_modules())
    for name in fields.keys() & modules.keys():
        for attribute in _TOLD:
            if not hasattr(modules[name], attribute):
                setattr(modules[name], attribute, fields[name][attribute])


class SavedModel(torch.nn.Module):
    """The model in a folder, which turns into the opened model when anything of it is asked for.

    Nothing is read before that, so a result that is ignored costs nothing. Printing, pickling and copying do not open
    it. Once open it is what `from_pretrained` gives: its class, its attributes, its modules.

    Args:
        folder: what a run wrote.
        trust_remote_code: run the code that comes with the model.
        layer_fields: gives the scheme of every layer, which the layers of the opened model then tell.
    """

    def __init__(
        self, folder: str, trust_remote_code: bool = False,
        layer_fields: Callable[[], Mapping[str, Mapping[str, Any]]] | None = None,
    ) -> None:  # fmt: skip
        # No call of the base class: every attribute belongs to the model that is not open yet.
        values = {"_saved": (folder, trust_remote_code), "_fields": layer_fields, "_opening": Lock()}
        object.__setattr__(self, "__dict__", values)

    def __getattribute__(self, name: str) -> Any:
        if name.startswith(("_repr_", "_ipython_")) or (name.startswith("__") and name not in _OPENING):
            return object.__getattribute__(self, name)
        _open(self)
        return getattr(self, name)

    def __setattr__(self, name: str, value: Any) -> None:
        _open(self)
        setattr(self, name, value)

    def __delattr__(self, name: str) -> None:
        _open(self)
        delattr(self, name)

    def __repr__(self) -> str:
        return f"SavedModel({object.__getattribute__(self, '__dict__')['_saved'][0]!r}), opened when it is first used"

    def __dir__(self) -> list[str]:
        _open(self)
        return dir(self)

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return SavedModel, object.__getattribute__(self, "__dict__")["_saved"]

    def __deepcopy__(self, memo: Any) -> SavedModel:
        values = object.__getattribute__(self, "__dict__")
        folder, trusted = values["_saved"]
        return SavedModel(folder, trusted, values["_fields"])


_OPENING = ("__call__", "__getitem__", "__len__", "__iter__")


def _open(proxy: SavedModel) -> None:
    """Turn `proxy` into the opened model. Calling it again does nothing."""
    values = object.__getattribute__(proxy, "__dict__")
    if "_saved" not in values:
        return
    with values["_opening"]:
        if type(proxy) is not SavedModel:  # another thread was faster
            return
        model = open_saved(*values["_saved"])
        if values["_fields"] is not None:
            with suppress(AutoRoundError):  # the source is gone: the model is as good without
                describe_layers(model, values["_fields"]())
        object.__setattr__(proxy, "__dict__", model.__dict__)
        object.__setattr__(proxy, "__class__", type(model))
