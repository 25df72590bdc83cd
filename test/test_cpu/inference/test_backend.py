"""The choice of a backend: what is chosen, what is refused and why."""

from __future__ import annotations

import pytest
import torch
from integer_weights import int_format

from auto_round.errors import ConfigError, UnsupportedError
from auto_round.inference import table as backend_table
from auto_round.inference.config import LayerFormat
from auto_round.inference.kernels import LayerSpec
from auto_round.inference.table import (
    BACKENDS,
    Backend,
    available_devices,
    backend_names,
    choose_backend,
    requested_rows,
    usable,
)

V1, PLAIN, AWQ = (int_format(4, packing=packing) for packing in ("gptq_zp+-1", "gptq", "awq"))


@pytest.mark.parametrize("device", ["cpu", "cuda", "cuda:1", "xpu"])
@pytest.mark.parametrize("requested", ["torch", "auto_round:torch", "auto_round:torch_zp", "TORCH"])
@pytest.mark.parametrize(("fmt", "name"), [(V1, "torch_zp"), (PLAIN, "torch"), (AWQ, "torch_awq")])
def test_the_packing_decides_between_the_torch_rows(fmt: LayerFormat, name: str, requested: str, device: str) -> None:
    if requested == "auto" and device in ("cpu", "xpu"):
        requested = "torch"  # faster rows stand above it there
    assert choose_backend(fmt, device, requested).backend.name == f"auto_round:{name}"


def spec(dtype: torch.dtype = torch.float16, device: str = "cuda", **sizes: int) -> LayerSpec:
    values = {"bits": 4, "group_size": 128, "in_features": 256, "out_features": 256} | sizes
    return LayerSpec(
        values["bits"], values["group_size"], True, values["in_features"], values["out_features"], dtype, device
    )


ROW = Backend("x", ("cuda",), (4, 8), ("float16",), 9, ("gptq",), ("no-such-package>=2.0",), kernel="not.asked:X")


@pytest.mark.parametrize(("fmt", "device", "dtype", "reason"), [
    (V1, "cpu", torch.float32, "runs on cuda, not cpu"),
    (int_format(3, 128, True, "gptq_zp+-1"), "cuda", torch.float32, "runs 4, 8 bits, not 3"),
    (V1, "cuda", torch.float32, "reads packing gptq, not gptq_zp+-1"),
    (PLAIN, "cuda", torch.float32, "computes in float16, not float32"),
    (PLAIN, "cuda", torch.float16, "needs no-such-package>=2.0, which is not installed"),
])  # fmt: skip
def test_a_row_says_the_first_reason_against_it(fmt: LayerFormat, device: str, dtype: torch.dtype, reason: str) -> None:
    assert ROW.unsupported_reason(fmt, device, spec(dtype)) == reason


def test_rows_passed_over_say_why_and_what_could_be_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend_table, "BACKENDS", (ROW, *BACKENDS))
    choice = choose_backend(PLAIN, "cuda", "x,torch", spec())
    assert choice.backend.name == "auto_round:torch" and choice.missing == (ROW,)
    assert choice.rejected[0] == "x: needs no-such-package>=2.0, which is not installed"
    assert choose_backend(PLAIN, "cpu", "x,torch", spec()).missing == ()


@pytest.mark.parametrize("row", [b for b in BACKENDS if b.instead], ids=lambda b: b.name)
def test_rows_of_packages_that_do_not_work_with_this_one_name_another(row: Backend) -> None:
    fmt = AWQ if "awq" in row.packings else V1
    with pytest.raises(UnsupportedError, match=f"use {row.instead}"):
        choose_backend(fmt, "cuda", row.name)
    known = backend_names()
    assert all(name in known for name in row.instead.split(" or "))


def test_an_unknown_backend() -> None:
    for requested in ("marlinn", "torch,marlinn"):
        with pytest.raises(ConfigError, match="unknown backend 'marlinn'; did you mean 'marlin'"):
            choose_backend(V1, "cuda", requested)


def test_a_list_of_backends_means_any_of_them() -> None:
    names = [b.name for b in requested_rows("Triton, marlin")]
    assert names == ["marlin", "triton"]
    assert {b.group for b in requested_rows("gptqmodel:exllamav2")} == {"exllamav2"}
    assert [b.name for b in requested_rows("gptq:exllamav2")] == ["gptq:exllamav2"]
    assert len(requested_rows("auto")) == sum(not b.by_name for b in BACKENDS)


def test_a_device_that_no_backend_runs_on() -> None:
    with pytest.raises(UnsupportedError, match=r"on 'npu' .*auto_round:torch: runs on cpu, cuda, xpu, not npu"):
        choose_backend(V1, "npu")
    with pytest.raises(UnsupportedError, match="backend 'auto_round:torch' does not run 4-bit .*use backend='auto'"):
        choose_backend(V1, "npu", "auto_round:torch")
    with pytest.raises(UnsupportedError, match="8 bits, not 5"):
        choose_backend(int_format(5, 128, True, "gptq_zp+-1"), "cpu")


def test_table_for_display() -> None:
    rows = {row.name: usable(row, available_devices()) for row in BACKENDS}
    assert len(rows) == len(BACKENDS)
    assert rows["auto_round:torch"][0] and "cpu" in rows["auto_round:torch"][1]
    if not torch.cuda.is_available():
        assert (rows["marlin"][0], rows["triton"][1]) == (False, "no xpu or cuda here")
    assert "use gptqmodel:exllamav2" in rows["gptq:exllamav2"][1]


# Names, devices, bits, dtypes, priority and packings of the user guide, section 4, "Specify Inference Backend".
GUIDE = """
ark | cpu | 2,4,8 | FP32/FP16/BF16 | 6 | gptq/gptq_zp+-1
ark | cpu | 4 | FP32/FP16/BF16 | 6 | awq
ark | xpu | 4,8 | FP32/FP16/BF16 | 6 | gptq/gptq_zp+-1
ark | xpu | 4 | FP32/FP16/BF16 | 6 | awq
marlin | cuda | 4,8 | BF16/FP16 | 6 | gptq/gptq_zp+-1
gptqmodel:exllamav2 | cuda | 4 | BF16/FP16 | 5 | gptq/gptq_zp+-1
gptq:exllamav2 | cuda | 4 | FP16 | 3 | gptq_zp+-1
gptq:cuda | cuda | 2,3,4,8 | FP16 | 1 | gptq_zp+-1
triton | xpu/cuda | 2,4,8 | BF16/FP16 | 2 | gptq/gptq_zp+-1
awq | cuda | 4 | FP16 | 5 | awq
gptqmodel:awq_exllamav2 | cuda | 4 | BF16/FP16 | 6 | awq
gptqmodel:awq_marlin | cuda | 4,8 | FP16 | 5 | awq
gptqmodel:awq_gemm | cuda | 4 | FP16 | 3 | awq
gptqmodel:awq_torch | cuda/cpu | 4 | FP16 | 2 | awq
hpu | hpu | 4 | BF16 | 0 | gptq/gptq_zp+-1
torch | xpu/cpu/cuda | 2,3,4,8 | BF16/FP16 | 0 | gptq/gptq_zp+-1
"""
SHORT = {"FP32": "float32", "FP16": "float16", "BF16": "bfloat16"}


@pytest.mark.parametrize("line", GUIDE.strip().splitlines())
def test_every_row_of_the_guide_is_here(line: str) -> None:
    name, devices, bits, dtypes, priority, packings = (cell.strip() for cell in line.split("|"))
    rows = [b for b in requested_rows(name) if set(devices.split("/")) <= set(b.devices)]
    for packing in packings.split("/"):
        (row,) = [b for b in rows if packing in b.packings]
        assert row.priority == int(priority)
        assert set(map(int, bits.split(","))) <= set(row.bits)
        assert {SHORT[d] for d in dtypes.split("/")} <= set(row.dtypes)


def test_groups_and_names_of_the_guide() -> None:
    assert {"auto", "torch", "ark", "exllamav2", "awq", "hpu", "gptqmodel:awq", "triton"} <= set(backend_names())
    assert len({b.name for b in BACKENDS}) == len(BACKENDS)
    assert backend_table.SCALED_MM in backend_names()
