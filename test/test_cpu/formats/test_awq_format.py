"""The auto_awq format: its config, and what it cannot say."""

from __future__ import annotations

from typing import Any

import pytest

from auto_round.errors import UnsupportedError
from auto_round.formats.base import ExportPlan, get_format, require_plan, require_scheme
from auto_round.schemes import QuantizationScheme as Scheme

DENSE = Scheme(bits=16)


def plan(changes: dict[str, Scheme], default: Scheme | None = None) -> ExportPlan:
    default = default or Scheme()
    names = [f"model.layers.{i}.{leaf}" for i in (0, 1, 11) for leaf in ("attn.q_proj", "mlp.up_proj")]
    return ExportPlan(
        default, {**dict.fromkeys(names, default), "project_in": DENSE, "lm_head": DENSE, **changes},
        tuple(f"model.layers.{i}" for i in (0, 1, 11)), version="1",
    )  # fmt: skip


@pytest.mark.parametrize("sym", [True, False])
def test_a_plain_config(sym: bool) -> None:
    made = plan({}, Scheme(sym=sym))
    fmt = get_format("auto_awq")
    assert fmt.check_plan(made) is None
    assert fmt.config(made) == {
        "autoround_version": "1", "bits": 4, "data_type": "int", "group_size": 128,
        "modules_to_not_convert": ["project_in", "lm_head"], "provider": "auto-round", "quant_method": "awq",
        "sym": sym, "to_quant_block_names": "model.layers", "version": "gemm", "zero_point": not sym,
    }  # fmt: skip


def test_dense_layers_by_full_name() -> None:
    """Block 1 must not mean block 11."""
    made = plan({"model.layers.1.mlp.up_proj": DENSE})
    fmt = get_format("auto_awq")
    assert fmt.check_plan(made) is None
    config = fmt.config(made)
    assert config is not None and "model.layers.1.mlp.up_proj" in config["modules_to_not_convert"]


def test_one_asymmetric_layer_makes_the_file_asymmetric() -> None:
    """Zero points are stored either way; readers that are told of none would not look."""
    config = get_format("auto_awq").config(plan({"model.layers.1.mlp.up_proj": Scheme(sym=False)}))
    assert config is not None and config["zero_point"] and not config["sym"]


@pytest.mark.parametrize(("changes", "reason"), [
    ({"model.layers.1.mlp.up_proj": Scheme(group_size=32)}, "one group size, not 32 and 128"),
    ({"lm_head": Scheme()}, "treat lm_head as unquantized"),
    ({"model.layers.0.mlp": DENSE}, "would leave out model.layers.0.mlp.up_proj"),
])  # fmt: skip
def test_what_cannot_be_said(changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(UnsupportedError, match=reason) as error:
        require_plan(get_format("auto_awq"), plan(changes))
    assert "formats that can: auto_gptq, auto_round," in str(error.value)


def test_other_bits_are_refused_with_the_formats_that_take_them() -> None:
    with pytest.raises(UnsupportedError, match="not 8-bit ones; formats that can: auto_gptq, auto_round"):
        require_scheme(get_format("auto_awq"), Scheme(bits=8), "layer x")
