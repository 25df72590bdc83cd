"""Documents from Python objects: lists of strings or ids, tensors, dicts, a DataLoader, anything that can be iterated.

Tensors of two dimensions, and columns of lists, are batches and are taken apart into samples.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch

from auto_round.calibration.documents import (
    ANSWER_KEYS,
    ASK_KEYS,
    TEXT_KEYS,
    Document,
    TokenDocument,
    document_from_row,
    is_ids,
)
from auto_round.errors import ConfigError, DataError

_TOKEN_KEYS = ("input_ids", "attention_mask", "labels")
IGNORED = -100


def documents_of(data: Any, seed: int) -> Iterator[Document]:
    """Documents of a user's object, in its own order.

    `data` is what `load_calibration` takes other than a dataset string. A DataLoader that shuffles draws from a random
    state made from `seed`; the state of the program is put back. Raises ConfigError when `data` is not one of the
    known kinds, DataError for a sample that is not.
    """
    if isinstance(data, (Mapping, torch.Tensor)) or is_ids(data) or _is_conversation(data):
        yield from expand(data, "the dataset")
        return
    if isinstance(data, (str, bytes)) or not isinstance(data, Iterable):
        raise ConfigError(
            f"dataset is a {type(data).__name__}; give a dataset string, a list of strings or of token ids, or a "
            "DataLoader"
        )
    state = torch.get_rng_state()
    torch.manual_seed(seed)
    try:  # samplers draw their seed when the first item is asked for
        items = iter(data)
        first = list(_take_one(items))
    finally:
        torch.set_rng_state(state)
    count = 0
    for group in (first, items):
        for item in group:
            yield from expand(item, f"item {count} of the dataset")
            count += 1


def _take_one(items: Iterator[Any]) -> Iterator[Any]:
    for item in items:
        yield item
        return


def expand(item: Any, where: str) -> Iterator[Document]:
    """Documents of one item, which may be a batch; `where` names it in errors. Raises DataError when it is neither."""
    if hasattr(item, "data") and isinstance(item.data, Mapping) and not isinstance(item, Mapping):
        item = item.data  # BatchEncoding and other UserDicts
    item = _to_tensor(item)
    if isinstance(item, Mapping) and "input_ids" in item:
        yield from _from_columns(item, where)
    elif isinstance(item, Mapping) and (lists := _text_columns(item)):
        for row in zip(*lists.values(), strict=True):
            yield document_from_row(dict(zip(lists, row, strict=True)), where)
    elif isinstance(item, torch.Tensor):
        yield from _from_columns({"input_ids": item}, where)
    elif isinstance(item, (str, Mapping)) or is_ids(item) or _is_conversation(item):
        yield document_from_row(item, where)
    elif isinstance(item, (list, tuple)):
        parts = [_to_tensor(part) for part in item]
        keys = _columns_of(parts)
        if keys:
            yield from _from_columns(dict(zip(keys, parts, strict=True)), where)
            return
        for part in parts:
            yield from expand(part, where)
    else:
        raise DataError(
            f"{where} is a {type(item).__name__}; an item is a string, a list or tensor of token ids, or a dict with "
            "'input_ids' or 'text'"
        )


def _from_columns(columns: Mapping[str, Any], where: str) -> Iterator[TokenDocument]:
    """Samples of a dict of `[T]` or `[B, T]` ids, masks and labels."""
    rows = {k: _rows(columns[k], f"{k!r} of {where}") for k in _TOKEN_KEYS if columns.get(k) is not None}
    sizes = {k: len(v) for k, v in rows.items()}
    if len(set(sizes.values())) != 1:
        raise DataError(f"{where} holds different numbers of samples: {sizes}; give one row of each per sample")
    for i in range(sizes["input_ids"]):
        parts = {k: v[i] for k, v in rows.items()}
        yield TokenDocument(parts["input_ids"], parts.get("attention_mask"), parts.get("labels"))


def _rows(value: Any, where: str) -> list[list[int]]:
    """A `[T]` or `[B, T]` tensor or list as lists of ints."""
    value = _to_tensor(value)
    if isinstance(value, torch.Tensor):
        if value.is_floating_point() or value.is_complex():
            raise DataError(f"{where} has the dtype {value.dtype}; token ids are whole numbers")
        if value.dim() not in (1, 2):
            raise DataError(f"{where} has {value.dim()} dimensions; give [tokens] or [samples, tokens]")
        value = value.to(torch.int64).tolist()
    if is_ids(value):
        return [list(value)]
    if isinstance(value, (list, tuple)):
        rows = [r.tolist() if isinstance(r, torch.Tensor) else r for r in map(_to_tensor, value)]
        if all(is_ids(r) for r in rows):
            return [list(r) for r in rows]
    raise DataError(f"{where} is no list of whole numbers; give [tokens] or [samples, tokens]")


def _text_columns(item: Mapping[str, Any]) -> dict[str, list[str]]:
    """The columns of a batch of texts, as a DataLoader makes one from rows of strings. Empty for a single row."""
    texts = {k: item[k] for k in (*TEXT_KEYS, *ASK_KEYS, *ANSWER_KEYS) if k in item}
    if not all(isinstance(v, (list, tuple)) and all(isinstance(t, str) for t in v) for v in texts.values()):
        return {}
    return {k: list(v) for k, v in texts.items()}


def _columns_of(parts: list[Any]) -> tuple[str, ...]:
    """What the tensors of a tuple are, where they are columns, as a TensorDataset gives them: (ids, mask), (ids,
    labels) or (ids, mask, labels). Empty where each is a sample, or several, of its own."""
    if len(parts) not in (2, 3) or not all(isinstance(p, torch.Tensor) and p.dim() == 2 for p in parts):
        return ()
    if len({p.shape for p in parts}) > 1:
        return ()
    ids, second = parts[:2]
    if bool(((second == 0) | (second == 1)).all()) and not torch.equal(ids, second):
        return _TOKEN_KEYS[: len(parts)]
    if len(parts) == 2 and bool(((second == ids) | (second == IGNORED)).all()) and bool((second == IGNORED).any()):
        return ("input_ids", "labels")
    return ()


def _is_conversation(item: Any) -> bool:
    return (
        isinstance(item, (list, tuple))
        and bool(item)
        and all(isinstance(m, Mapping) and ("role" in m or "from" in m) for m in item)
    )


def _to_tensor(value: Any) -> Any:
    """numpy arrays as tensors, everything else as it is."""
    if type(value).__module__.startswith("numpy") and hasattr(value, "dtype") and hasattr(value, "shape"):
        return torch.as_tensor(value)
    return value
