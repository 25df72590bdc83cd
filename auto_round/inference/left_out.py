"""Telling Transformers which tensors of a checkpoint a model does not read, so that it opens without a warning."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

_IGNORED = "_keys_to_ignore_on_load_unexpected"


def leave_out(model: Any, patterns: Iterable[str]) -> None:
    """Tensors whose names match one of these regular expressions are passed over when this model is loaded.

    Transformers joins what is set here with more of its own: a list in 5.3 to 5.8, in 5.12 and newer a set, which a
    model then holds from its start. The other kind would be a TypeError when the model is loaded.
    """
    before = getattr(model, _IGNORED, None)
    merged = dict.fromkeys([*(before or ()), *patterns])
    setattr(model, _IGNORED, set(merged) if isinstance(before, (set, frozenset)) else list(merged))
