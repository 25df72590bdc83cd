from __future__ import annotations

import pytest
import torch

from auto_round.errors import ConfigError
from auto_round.inference import linear as compute
from auto_round.inference.linear import compute_dtype_for
from auto_round.modeling.source import resolve_dtype


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_half_precision_only_where_the_cpu_has_it(
    monkeypatch: pytest.MonkeyPatch, native: bool, half: torch.dtype
) -> None:
    monkeypatch.setattr(compute, "cpu_multiplies", lambda dtype: native)
    assert compute_dtype_for("cpu", half) is (half if native else torch.float32)
    assert compute_dtype_for("cpu", torch.float64) is torch.float64
    assert compute_dtype_for("cuda:0", half) is half


def test_dtype_names() -> None:
    assert resolve_dtype("bf16") is torch.bfloat16
    with pytest.raises(ConfigError, match="float32"):
        resolve_dtype("int7")
