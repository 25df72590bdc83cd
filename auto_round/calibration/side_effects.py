"""What a block leaves in attributes of modules while it runs, where a later block might find it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

_ABSENT = object()
_OF_TORCH = frozenset({"training", "forward", *nn.Module().__dict__}) - {"_buffers"}


class Attributes:
    """Attributes of modules as they are, to find those that change and to put them back.

    Attributes:
        before: by owner's id and name, (owner, value) of every attribute that changed since it was first looked at.
    """

    def __init__(self) -> None:
        self._seen: dict[int, tuple[Any, dict[Any, Any]]] = {}
        self.before: dict[tuple[int, Any], tuple[Any, Any]] = {}

    def look_at(self, modules: Iterable[nn.Module]) -> None:
        """Take down what these modules have now."""
        self._seen = {}
        for module in modules:
            self._seen[id(module)] = (module, _plain(vars(module)))
            for value in self._seen[id(module)][1].values():
                if _is_store(value):
                    self._seen[id(value)] = (value, dict(_entries(value)))

    def note_changes(self) -> None:
        """Remember what has changed since, unless an earlier value is known already."""
        for key, (owner, old) in self._seen.items():
            now = _plain(vars(owner)) if isinstance(owner, nn.Module) else dict(_entries(owner))
            for name in {*old, *now}:
                if old.get(name, _ABSENT) is not now.get(name, _ABSENT):
                    self.before.setdefault((key, name), (owner, old.get(name, _ABSENT)))

    @contextmanager
    def as_before(self) -> Iterator[None]:
        """While this is open, everything that changed has its first value."""
        now = {key: (owner, _get(owner, key[1])) for key, (owner, _) in self.before.items()}
        try:
            for (_, name), (owner, value) in self.before.items():
                _set(owner, name, value)
            yield
        finally:
            for (_, name), (owner, value) in now.items():
                _set(owner, name, value)


def _plain(attributes: Mapping[str, Any]) -> dict[Any, Any]:
    return {k: v for k, v in attributes.items() if k not in _OF_TORCH and not isinstance(v, nn.Module)}


def _is_store(value: Any) -> bool:
    """Whether a value may be filled in place: a mapping, a list, or a plain object that is no configuration."""
    if isinstance(value, (dict, list)):
        return True
    if value is None or isinstance(value, (torch.Tensor, nn.Module, type, str, int, float)) or callable(value):
        return False
    return hasattr(value, "__dict__") and not hasattr(value, "to_dict")


def _entries(store: Any) -> Mapping[Any, Any]:
    if isinstance(store, dict):
        return store
    return dict(enumerate(store)) if isinstance(store, list) else vars(store)


def _get(owner: Any, name: Any) -> Any:
    return (vars(owner) if isinstance(owner, nn.Module) else _entries(owner)).get(name, _ABSENT)


def _set(owner: Any, name: Any, value: Any) -> None:
    if isinstance(owner, list):
        if value is _ABSENT:
            del owner[name:]
        elif name < len(owner):
            owner[name] = value
        else:
            owner.append(value)
        return
    store = owner if isinstance(owner, dict) else vars(owner)
    if value is _ABSENT:
        store.pop(name, None)
    else:
        store[name] = value
