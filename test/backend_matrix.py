"""Every backend that runs packed integer layers, against the formula in float64.

A row of the table that is usable on this machine is in here by itself: bits x group size x symmetry x dtype x rows of
inputs x shapes, as far as the row takes them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from integer_weights import int_format, pack_codes

from auto_round.inference.config import LayerFormat
from auto_round.inference.linear import QuantLinear
from auto_round.inference.table import BACKENDS, Backend, available_devices, usable

PACKINGS = ("gptq", "gptq_zp+-1", "awq")
ROWS_OF_INPUTS = (1, 7, 512)
# Inputs, outputs: multiples of everything; a short last group; few and no powers of two.
SHAPES = ((256, 128), (288, 96), (96, 40))
GROUP_SIZES = (32, 128, -1)
# Twice the rounding step of a half precision: one for the weights or inputs, one for the result. Kernels for float32
# may round inputs to 16 bits of fixed point.
BOUNDS = {torch.float32: 1e-4, torch.float16: 2 * 2.0**-11, torch.bfloat16: 2 * 2.0**-8}


@dataclass(frozen=True)
class Case:
    """One layer."""

    fmt: LayerFormat
    inputs: int
    outputs: int
    dtype: torch.dtype
    scale_dtype: torch.dtype = torch.float16
    act_order: bool = False


def rows_here(device: str) -> list[Backend]:
    """Rows for packed integers that can be used on `device`."""
    return [
        row for row in BACKENDS
        if device in row.devices and set(row.packings) & set(PACKINGS) and usable(row, available_devices())[0]
    ]  # fmt: skip


def rows_and_dtypes(device: str) -> list[Any]:
    """For parametrizing (row, dtype): those rows, with each dtype that they compute in."""
    return [
        pytest.param(row, dtype, id=f"{row.name}-{dtype}")
        for row in rows_here(device) for dtype in BOUNDS if str(dtype).removeprefix("torch.") in row.dtypes
    ]  # fmt: skip


def cases(row: Backend, dtype: torch.dtype) -> Iterator[Case]:
    """The layers that the row's columns promise."""
    for packing in row.packings:
        for bits in row.bits:
            for inputs, outputs in SHAPES:
                whole = (inputs, outputs) == SHAPES[0]
                for size in GROUP_SIZES:
                    for sym in (True, False) if whole else (False,):
                        fmt = int_format(bits, size, sym, packing)
                        if fmt.layout.mismatch(fmt.scheme, inputs, outputs) is None:
                            yield Case(fmt, inputs, outputs, dtype)
            if packing != "awq":
                fmt = int_format(bits, 32, False, packing)
                yield Case(fmt, 256, 128, dtype, act_order=True)
                yield Case(fmt, 256, 128, dtype, torch.float32)
                yield Case(int_format(bits, 32, True, packing), 256, 128, dtype, torch.bfloat16)


def build(case: Case, device: str) -> tuple[QuantLinear, torch.Tensor]:
    """The layer with random values, and its weight [out, in] in float64 on the CPU."""
    fmt, gen = case.fmt, torch.Generator().manual_seed(case.inputs + case.fmt.scheme.bits)
    module = QuantLinear(
        case.inputs, case.outputs, fmt, bias=True, g_idx=case.act_order, dtype=case.dtype,
        stored={"scales": case.scale_dtype},
    )  # fmt: skip
    top, groups = 1 << fmt.scheme.bits, module.groups
    codes = torch.randint(0, top, (case.outputs, case.inputs), generator=gen, dtype=torch.uint8)
    zeros = torch.randint(0, top, (case.outputs, groups), generator=gen, dtype=torch.uint8)
    if fmt.scheme.sym:
        zeros.fill_(top // 2)
    scales = ((torch.rand(case.outputs, groups, generator=gen) + 0.1) / top).to(case.scale_dtype)
    order = torch.arange(case.inputs) // module.group_size
    if case.act_order:
        order = order[torch.randperm(case.inputs, generator=gen)]
        module.g_idx = order.int()
    pack = pack_codes(fmt, codes, zeros)
    module.qweight, module.qzeros = pack
    module.scales = scales.T.contiguous()
    assert module.bias is not None
    module.bias.copy_(torch.randn(case.outputs, generator=gen))
    weight = scales.double()[:, order] * (codes.double() - zeros.double()[:, order])
    module.to(device).prepare()
    return module.eval(), weight


@torch.no_grad()
def check(row: Backend, case: Case, device: str) -> bool:
    """Run the case. False when the row's kernel refuses it."""
    module, weight = build(case, device)
    spec = case.fmt.spec(case.inputs, case.outputs, module.dtype, device)
    if row.unsupported_reason(case.fmt, device, spec) is not None:
        return False
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    module.kernel_path, module.kernel_device, module.backend = row.kernel, device, row.name
    module.start_kernel()
    assert (module.kernel is not None) is bool(row.kernel) and module.backend == row.name, case
    assert module.bias is not None
    bias, gen = module.bias.double().cpu(), torch.Generator().manual_seed(1)
    for count in ROWS_OF_INPUTS if case.fmt.scheme.group_size == 32 else ROWS_OF_INPUTS[:2]:
        x = torch.randn(count, case.inputs, generator=gen).to(case.dtype)
        want = x.double() @ weight.T + bias
        y = module(x.to(device))
        assert y.dtype == case.dtype and y.shape == want.shape
        error = float((y.double().cpu() - want).norm() / want.norm())
        assert error < BOUNDS[case.dtype], (row.name, case, count, error)
    wide = torch.randn(2, case.inputs, 3, generator=gen).to(case.dtype).to(device)
    strided = wide.transpose(1, 2)
    assert not strided.is_contiguous()
    want = strided.double().cpu() @ weight.T + bias
    assert float((module(strided).double().cpu() - want).norm() / want.norm()) < BOUNDS[case.dtype], (row.name, case)
    assert module(strided[:, :0]).shape == (2, 0, case.outputs)
    after = module.state_dict()
    assert set(before) == set(after) and all(torch.equal(before[k], after[k]) for k in before), (row.name, case)
    return True


def check_row(row: Backend, dtype: torch.dtype, device: str) -> None:
    """Run all cases of the row, some of which its kernel may refuse."""
    ran = [check(row, case, device) for case in cases(row, dtype)]
    assert any(ran), "the row refuses every layer"
