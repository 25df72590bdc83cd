"""Groups that fill the rows, where a format needs it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from auto_round.errors import UnsupportedError
from auto_round.formats.base import get_format
from auto_round.run.planner import fit_groups
from auto_round.schemes import QuantizationScheme as Scheme

WIDTHS = {"a": 576, "b": 1536, "c": 576, "d": 48}


def fit(schemes: dict[str, Scheme], name: str = "auto_gptq") -> tuple[dict[Scheme, Scheme], list[str]]:
    return fit_groups(schemes, WIDTHS, [get_format("fake"), get_format(name)])


def test_one_size_for_all_layers_of_a_scheme() -> None:
    default, other = Scheme(), Scheme(bits=8)
    instead, notes = fit({"a": default, "b": default, "c": Scheme(bits=16)})
    assert instead == {default: Scheme(group_size=64)}
    assert notes == [
        "groups of 64 instead of 128: a has 576 inputs, and auto_gptq files have no short last group",
    ]
    assert fit({"a": default, "b": other})[0] == {default: Scheme(group_size=64)}


@pytest.mark.parametrize(
    "scheme", [Scheme(group_size=64), Scheme(group_size=-1), Scheme(group_size=0), Scheme(bits=16)]
)
def test_what_fits_stays(scheme: Scheme) -> None:
    assert fit({"a": scheme, "b": scheme}) == ({}, [])
    assert fit({"a": Scheme()}, "auto_round") == ({}, [])


def test_a_layer_that_no_group_fits_does_not_shrink_the_others() -> None:
    assert fit({"b": Scheme(), "d": Scheme()}) == ({}, [])


@pytest.mark.parametrize("name", ["auto_gptq", "auto_awq"])
def test_a_whole_run(
    make: Callable[..., Any], logits: Callable[[Any], torch.Tensor], tmp_path: Path, name: str
) -> None:
    """Tiny layers have 64 and 96 inputs: groups of 64 become groups of 32, in every format of the run."""
    ar = make("llama", group_size=64, iters=0, disable_opt_rtn=True)
    ar.quantize_and_save(tmp_path / "out", format=f"{name},auto_round")
    for folder in (name.replace("_", "-"), "auto-round"):
        config = json.loads((tmp_path / "out" / folder / "config.json").read_text())["quantization_config"]
        assert config["group_size"] == 32 and not {"dynamic", "extra_config"} & set(config)


def test_layers_that_are_quantized_already_keep_their_groups(make: Callable[..., Any], tmp_path: Path) -> None:
    ar = make("llama", group_size=64, iters=0, disable_opt_rtn=True)
    ar.quantize()
    ar.save_quantized(tmp_path / "a", format="auto_round")
    with pytest.raises(UnsupportedError, match="not a multiple of group_size 64.*quantize_and_save"):
        ar.save_quantized(tmp_path / "b", format="auto_gptq")
