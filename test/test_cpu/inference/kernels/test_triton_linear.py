"""The Triton kernel: its layout and plans here, its programs in a process of their own, through the interpreter."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from auto_round.inference.kernels import IntegerWeight, LayerSpec
from auto_round.inference.kernels.triton_linear import (
    Form,
    TilePlan,
    TritonLinear,
    form_of,
    pack_words,
    parts_for,
    tile_plans,
    tuned,
    unpack_words,
    vector_plan,
)

HERE = Path(__file__).parent
SPEC = LayerSpec(4, 128, True, 4096, 4096, torch.bfloat16, "cpu")


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_programs_through_the_interpreter() -> None:
    """Triton decides at import whether its programs are compiled or run in Python."""
    root = HERE.parents[3]
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", str(HERE / "triton_cases.py")],
        env=os.environ | {"TRITON_INTERPRET": "1"}, cwd=root, capture_output=True, text=True, timeout=500,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]
    assert " passed" in run.stdout and "skipped" not in run.stdout


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("inputs", [64, 200, 512, 1000])
def test_words_hold_every_code(bits: int, inputs: int) -> None:
    codes = torch.randint(0, 1 << bits, (21, inputs), dtype=torch.uint8)
    zeros = torch.zeros(21, 1, dtype=torch.uint8)
    spec = replace(SPEC, bits=bits, group_size=inputs, in_features=inputs, out_features=21)
    form = form_of(IntegerWeight(codes, zeros.half(), zeros, spec))
    words = pack_words(codes, form)
    assert words.dtype == torch.int32 and words.shape[1] == 32
    assert torch.equal(unpack_words(words, form), codes)
    # Word r of a block holds at place j the input j * width + r of the block.
    for k in (0, 17, inputs - 1):
        block, inside = divmod(k, form.block)
        place, row = divmod(inside, form.width)
        word = int(words[block * form.width + row, 5]) & 0xFFFFFFFF
        assert word >> (place * form.bits) & ((1 << form.bits) - 1) == int(codes[5, k])


def test_slices_never_cross_a_group() -> None:
    for bits in (2, 4, 8):
        for width in (16, 32):
            for group in (0, 16, 32, 48, 64, 80, 96, 128, 256, 384, 1024):
                if group % width:
                    continue
                form = Form(bits, width, group, 8, 4096, 64)
                run = form.slices * width
                assert form.per % form.slices == 0
                assert not group or all(k // group == (k + run - 1) // group for k in range(0, 4096, run))
    assert Form(4, 32, 128, 8, 4096, 64).slices == 4 and Form(4, 32, 0, 8, 4096, 64).slices == 8


def test_the_form_follows_groups_padding_and_zero_points() -> None:
    def form(zeros: torch.Tensor, **changes: int) -> Form:
        spec = replace(SPEC, out_features=4, **changes)
        return form_of(IntegerWeight(torch.zeros(4, 8, dtype=torch.uint8), zeros.half(), zeros, spec))

    mid, mixed = torch.full((4, 32), 8, dtype=torch.uint8), torch.arange(128, dtype=torch.uint8).view(4, 32)
    assert form(mid) == Form(4, 32, 128, 8, 4096, 4) and form(mixed).zero == -1
    assert form(mid, group_size=48).width == 16
    assert form(mid, in_features=896).width == 16, "7 whole blocks of 128, not three and a half of 256"
    assert form(mid, group_size=4096).group == 0
    assert form(mid, bits=3).bits == 4


def test_plans_keep_a_device_busy() -> None:
    for blocks, padded in ((16, 4096), (16, 1024), (56, 4096), (16, 14336), (4, 512), (1, 32)):
        columns, warps, parts = vector_plan(blocks, padded, 132)
        assert 1 <= parts <= max(1, blocks // 4) and warps <= -(-blocks // parts) and warps <= 16
        programs = padded // columns * parts
        assert programs >= 132 * 0.75 or parts == max(1, blocks // 4)
    assert vector_plan(16, 4096, 132) == (32, 16, 1)
    assert vector_plan(32, 8192, 132) == (32, 8, 1)
    assert vector_plan(16, 14336, 132) == (32, 4, 1)
    assert vector_plan(16, 1024, 132) == (16, 8, 2)
    assert parts_for(200, 16, 132) == 1 and parts_for(16, 16, 132) == 8 and parts_for(1, 1, 132) == 1
    for rows in (3, 30, 60, 300):
        plans = tile_plans(rows, 4, torch.bfloat16)
        assert len({plan.rows for plan in plans}) == 1, "the grid is made for the first"


def test_tuning_takes_the_fastest_once_and_skips_what_fails() -> None:
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed")
    plans = [TilePlan(16, columns, 4, 3) for columns in (32, 64, 128)]
    calls: list[int] = []

    def run(plan: TilePlan) -> float:
        calls.append(plan.columns)
        if plan.columns == 128:
            raise RuntimeError("out of resource")
        return float(100 - plan.columns)

    assert tuned(("a",), plans, run, None) == plans[0] and calls == []
    assert tuned(("a",), plans, run, lambda call: call()) == plans[1] and calls == [32, 64, 128]
    assert tuned(("a",), plans, run, lambda call: call()) == plans[1] and len(calls) == 3


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_it_says_why_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert "TRITON_INTERPRET=1" in str(TritonLinear.unsupported_reason(SPEC))
    if not torch.cuda.is_available():
        assert "no cuda device" in str(TritonLinear.unsupported_reason(replace(SPEC, device="cuda")))
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert TritonLinear.unsupported_reason(SPEC) is None
    for change, words in (
        (dict(group_size=40), "multiple of 16"), (dict(in_features=4095, group_size=4095), "even number"),
    ):  # fmt: skip
        assert words in str(TritonLinear.unsupported_reason(replace(SPEC, **change)))  # type: ignore[arg-type]


def test_asking_does_not_import_triton() -> None:
    code = (
        "import sys, auto_round.inference.kernels.triton_linear as t; from test_spec import SPEC\n"
        "t.TritonLinear.unsupported_reason(SPEC); assert 'triton' not in sys.modules"
    ).replace("from test_spec import SPEC", "import torch; from auto_round.inference.kernels import LayerSpec\n"
              "SPEC = LayerSpec(4, 128, True, 4096, 4096, torch.bfloat16, 'cuda')")  # fmt: skip
    subprocess.run([sys.executable, "-c", code], check=True, cwd=HERE.parents[3])
