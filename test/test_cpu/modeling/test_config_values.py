"""Configurations whose values vary by layer are read like others."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from auto_round.errors import ModelError
from auto_round.modeling.build import check_sizes
from auto_round.modeling.config import largest, layer_value, read_value, smallest, text_config


class ByLayer:
    """Refuses plain reads of what varies, as Transformers does, by an error that is no AttributeError."""

    hidden_size = 64
    num_hidden_layers = 2
    intermediate_size = (32, 96)
    per_layer_config = (SimpleNamespace(head_dim=16, num_key_value_heads=2), SimpleNamespace(head_dim=32))

    @property
    def head_dim(self) -> int:
        raise RuntimeError("head_dim varies by layer")

    @property
    def num_key_value_heads(self) -> int:
        raise RuntimeError("num_key_value_heads varies by layer")

    @property
    def rope_theta(self) -> float:
        raise ValueError("not to be read")


def test_values_by_layer() -> None:
    config = ByLayer()
    assert read_value(config, "head_dim") == [16, 32]
    assert largest(config, "head_dim") == 32 and smallest(config, "head_dim") == 16
    assert largest(config, "intermediate_size") == 96
    assert layer_value(config, "head_dim", 1) == 32 and layer_value(config, "hidden_size", 1) == 64
    assert largest(config, "num_key_value_heads") == 2
    assert read_value(config, "rope_theta", 3) == 3 and read_value(None, "x") is None


@pytest.mark.parametrize(
    ("value", "most", "least"),
    [(7, 7, 7), ([3, 5], 5, 3), ({"0": 4, "1": [6]}, 6, 4), (None, 0, None), (True, 0, None), ("big", 0, None)],
)
def test_numbers_lists_and_mappings(value: Any, most: int, least: int | None) -> None:
    config = SimpleNamespace(size=value)
    assert largest(config, "size") == most and smallest(config, "size") == least
    assert largest(SimpleNamespace(other=2), "size", "other") == 2, "the first spelling that is there"


def test_a_configuration_with_two_text_parts_is_its_own() -> None:
    class Two:
        def get_text_config(self) -> Any:
            raise ValueError("Multiple valid text configs were found")

    config = Two()
    assert text_config(config) is config


def test_sizes_by_layer_are_checked_too() -> None:
    check_sizes(Path("config.json"), ByLayer(), 40)
    config = SimpleNamespace(num_hidden_layers=2, intermediate_size=[32, 1 << 40])
    with pytest.raises(ModelError, match="intermediate_size="):
        check_sizes(Path("config.json"), config, 40)


def test_gemma_4() -> None:
    from families import tiny_config

    config = tiny_config("gemma4_text")
    assert len(set(read_value(config, "head_dim"))) == 2
    assert largest(config, "head_dim") == max(read_value(config, "head_dim"))
