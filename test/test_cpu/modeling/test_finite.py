from __future__ import annotations

import pytest
import torch

from auto_round.errors import NumericsError
from auto_round.modeling.source import check_finite, is_finite


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.float8_e5m2])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_one_bad_element_anywhere_is_found(dtype: torch.dtype, bad: float) -> None:
    for place in (0, 500, 998):
        tensor = torch.linspace(-3, 3, 999)
        assert is_finite(tensor.to(dtype))
        tensor[place] = bad
        with pytest.raises(NumericsError, match=r"'a.weight' holds [01] NaN and [01] Inf among 999"):
            check_finite("a.weight", tensor.to(dtype))


def test_large_finite_values_are_fine() -> None:
    """A sum of these would overflow."""
    check_finite("x", torch.full((1000,), torch.finfo(torch.float16).max, dtype=torch.float16))
    check_finite("x", torch.full((1000,), torch.finfo(torch.float32).max))


def test_integers_empty_and_meta_tensors_pass() -> None:
    for tensor in (torch.arange(3), torch.empty(0), torch.empty(3, device="meta"), torch.tensor(1.0)):
        check_finite("x", tensor)
