"""Every backend that is usable on this machine's CPU gives what the formula gives."""

from __future__ import annotations

import pytest
import torch
from backend_matrix import cases, check, rows_here


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("row", rows_here("cpu"), ids=lambda row: row.name)
def test_matrix(row: object, dtype: torch.dtype) -> None:
    name = str(dtype).removeprefix("torch.")
    if name not in row.dtypes:  # type: ignore[attr-defined]
        pytest.skip(f"the row does not compute in {name}")
    ran = [check(row, case, "cpu") for case in cases(row, dtype)]  # type: ignore[arg-type]
    assert any(ran)
