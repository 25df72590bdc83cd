"""The backend table: what is chosen, what is refused and why."""

from __future__ import annotations

import pytest

from auto_round.errors import ConfigError, DeviceError, UnsupportedError
from auto_round.inference.backend import BACKENDS, backend_names, choose_backend, device_kind, list_backends
from auto_round.inference.config_reader import LayerFormat

V1, PLAIN, AWQ = (LayerFormat(4, 128, True, *kind) for kind in (("gptq", 1), ("gptq", 0), ("awq", 0)))


@pytest.mark.parametrize("device", ["cpu", "cuda", "cuda:1", "xpu"])
@pytest.mark.parametrize("requested", ["auto", "torch", "auto_round:torch", "auto_round:torch_zp", "TORCH"])
@pytest.mark.parametrize(("fmt", "name"), [(V1, "torch_zp"), (PLAIN, "torch"), (AWQ, "torch_awq")])
def test_the_packing_decides_between_the_torch_rows(fmt: LayerFormat, name: str, requested: str, device: str) -> None:
    if requested == "auto" and device in ("cpu", "xpu"):
        requested = "torch"  # faster rows stand above it there
    assert choose_backend(fmt, device, requested).backend.name == f"auto_round:{name}"


def test_rows_passed_over_say_why() -> None:
    choice = choose_backend(V1, "cuda")
    assert "marlin: not part of this version" in choice.passed_over
    assert all(": " in reason for reason in choice.passed_over)


@pytest.mark.parametrize("name", [b.name for b in BACKENDS if not b.built] + ["exllamav2", "gptqmodel:awq"])
def test_a_backend_that_is_not_here(name: str) -> None:
    with pytest.raises(UnsupportedError, match="not part of this version; use backend='torch'"):
        choose_backend(V1, "cuda", name)


def test_an_unknown_backend() -> None:
    with pytest.raises(ConfigError, match="did you mean 'marlin'"):
        choose_backend(V1, "cuda", "marlinn")


def test_a_device_that_no_backend_runs_on() -> None:
    with pytest.raises(UnsupportedError, match=r"on 'hpu' .*auto_round:torch: runs on cpu, cuda, xpu, not hpu"):
        choose_backend(V1, "hpu")
    with pytest.raises(UnsupportedError, match="8 bits, not 5"):
        choose_backend(LayerFormat(5, 128, True, "gptq", 1), "cpu")


def test_table_for_display() -> None:
    rows = {row.name: row for row in list_backends()}
    assert len(rows) == len(BACKENDS)
    assert rows["auto_round:torch"].usable and "cpu" in rows["auto_round:torch"].reason
    assert not rows["marlin"].usable and rows["marlin"].requirements == ("gptqmodel",)
    assert {"auto", "torch", "ark", "exllamav2", "awq", "hpu"} <= set(backend_names())


def test_device_maps() -> None:
    assert device_kind(None) == "cpu" and device_kind("xpu:0") == "xpu"
    assert device_kind({"a": "disk", "b": "cpu"}) == "cpu"
    assert device_kind({"a": 0}) != "cpu" and device_kind("auto") in ("cpu", "cuda", "xpu")
    with pytest.raises(DeviceError, match="device_map"):
        device_kind(1.5)
