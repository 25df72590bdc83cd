"""Every backend that is usable on this machine's GPU gives what the formula gives."""

from __future__ import annotations

import pytest
import torch
from backend_matrix import cases, check, rows_here

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("row", rows_here("cuda"), ids=lambda row: row.name)
def test_matrix(row: object, dtype: torch.dtype) -> None:
    name = str(dtype).removeprefix("torch.")
    if name not in row.dtypes:  # type: ignore[attr-defined]
        pytest.skip(f"the row does not compute in {name}")
    ran = [check(row, case, "cuda") for case in cases(row, dtype)]  # type: ignore[arg-type]
    assert any(ran), "the row refuses every layer"
