"""The Triton programs compile for a GPU that is not here: what the interpreter accepts the compiler may not."""

from __future__ import annotations

import importlib.util
import inspect
import os
import re
from typing import Any

import pytest

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed"),
    pytest.mark.skipif(
        os.environ.get("TRITON_INTERPRET", "0") == "1", reason="TRITON_INTERPRET=1: nothing is compiled"
    ),
]

LAYOUT = dict(BITS=4, PER=8, WIDTH=32, GROUP=128, ZERO=8)
EXPERTS = dict(EXPERTS=60, PADDED=64)
ONE = dict(EXPERTS=0, PADDED=1)
VECTOR = dict(SLICES=4, WARPS=8, LANES=4, COLUMNS=32, ROWS=1, KIND=1, MASKED=False)
TILE = dict(ROWS=16, COLUMNS=64, MASKED=False, WIDEN=False)
POINTERS = dict(words="*i32", scales="*fp16", zeros="*u8", offsets="*i32", partial="*fp32")


# Integers that Triton finds to be multiples of 16 where sizes are, and compiles for.
ALIGNED = ("columns", "row_stride", "x_stride", "in_features", "first_column", "numel", "word_stride", "scale_stride")


def compiled(name: str, half: str, constants: dict[str, Any], warps: int) -> str:
    """The program's PTX for compute capability 9.0."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    if "constexprs" not in inspect.signature(ASTSource).parameters:
        pytest.skip(f"the compiler of Triton {triton.__version__} is called in another way")

    from auto_round.inference.kernels import triton_programs

    program = getattr(triton_programs, name)
    pointers = POINTERS | {"x": "*i32" if name == "matvec" else half, "out": half}
    signature = {a: "constexpr" if a in constants else pointers.get(a, "i32") for a in program.arg_names}
    aligned = {
        (i,): [["tt.divisibility", 16]] for i, a in enumerate(program.arg_names)
        if a in pointers or a in ALIGNED
    }  # fmt: skip
    values = {(program.arg_names.index(key),): value for key, value in constants.items()}
    source = ASTSource(fn=program, signature=signature, constexprs=values, attrs=aligned)
    result = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps})
    return str(result.asm["ptx"])


@pytest.mark.parametrize(
    ("name", "half", "constants", "warps"),
    [
        ("matvec", "*bf16", LAYOUT | VECTOR | ONE, 8),
        ("matvec", "*fp16", LAYOUT | VECTOR | EXPERTS | dict(KIND=2, ZERO=-1, MASKED=True), 8),
        ("matmul", "*bf16", LAYOUT | TILE | ONE, 4),
        ("matmul", "*fp16", LAYOUT | TILE | EXPERTS | dict(ZERO=-1, MASKED=True), 4),
        ("matmul", "*bf16", LAYOUT | TILE | ONE | dict(ROWS=128, COLUMNS=128), 8),
        ("matmul", "*fp32", LAYOUT | TILE | ONE | dict(COLUMNS=32), 4),
        ("dense", "*bf16", LAYOUT | dict(COLUMNS=128), 8),
        ("add_parts", "*bf16", dict(PARTS=4, BLOCK=1024), 4),
    ],
)
def test_for_hopper(name: str, half: str, constants: dict[str, Any], warps: int) -> None:
    ptx = compiled(name, half, constants, warps)
    if name == "matvec":
        # The words come 16 bytes a thread, and nothing is exchanged through shared memory inside the loop.
        assert ptx.count("ld.global.v4.b32") >= 8 and ptx.count("bar.sync") <= 8
    if name == "matmul" and half != "*fp32":
        assert ("wgmma" if constants["ROWS"] == 128 else "mma.sync") in ptx
        assert "cp.async" in ptx, "inputs and words are fetched ahead"
    assert not re.search(r"^\s*(@%p\d+ )?(atom|red)\.", ptx, re.M), "sums in an order of their own"
