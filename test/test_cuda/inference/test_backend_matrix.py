"""Every backend that is usable on this machine's GPU gives what the formula gives."""

from __future__ import annotations

import pytest
import torch
from backend_matrix import check_row, rows_and_dtypes

from auto_round.inference.table import Backend

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.parametrize(("row", "dtype"), rows_and_dtypes("cuda"))
def test_matrix(row: Backend, dtype: torch.dtype) -> None:
    check_row(row, dtype, "cuda")
