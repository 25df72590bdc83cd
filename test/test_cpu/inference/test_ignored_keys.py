from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from auto_round.inference.convert_model import ignore_unexpected_keys

ATTRIBUTE = "_keys_to_ignore_on_load_unexpected"


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (None, ["b", "a"]), (["x", "a"], ["x", "a", "b"]), (("x",), ["x", "b", "a"]), (set(), {"a", "b"}),
        ({"x"}, {"x", "a", "b"}),
    ],
)  # fmt: skip
def test_it_stays_what_transformers_makes_of_it(before: Any, after: Any) -> None:
    """Older versions add a list to it and newer ones a set."""
    model = SimpleNamespace(**{ATTRIBUTE: before})
    ignore_unexpected_keys(model, ["b", "a"])
    assert getattr(model, ATTRIBUTE) == after


def test_transformers_can_join_it(tiny_model: Callable[..., Any]) -> None:
    model = tiny_model("llama")
    ignore_unexpected_keys(model, [r"\.g_idx$"])
    info = SimpleNamespace(unexpected_keys={"model.layers.0.self_attn.q_proj.g_idx", "odd"}, missing_keys=set())
    model._adjust_missing_and_unexpected_keys(info)
    assert set(info.unexpected_keys) == {"odd"}
