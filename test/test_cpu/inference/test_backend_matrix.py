"""Every backend that is usable on this machine's CPU gives what the formula gives."""

from __future__ import annotations

import pytest
import torch
from backend_matrix import check_row, rows_and_dtypes

from auto_round.inference.table import Backend


@pytest.mark.parametrize(("row", "dtype"), rows_and_dtypes("cpu"))
def test_matrix(row: Backend, dtype: torch.dtype) -> None:
    check_row(row, dtype, "cpu")
