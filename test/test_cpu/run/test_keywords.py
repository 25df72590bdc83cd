"""What keywords and configurations say together."""

from __future__ import annotations

from typing import Any

import pytest

from auto_round import AdamRoundConfig, OptimizedRTNConfig, QuantizationScheme, RTNConfig, SignRoundConfig
from auto_round.errors import ConfigError
from auto_round.run.keywords import (
    checked_options,
    choose_algorithm,
    given_algorithm,
    resolve_scheme,
    symmetric_if_required,
)
from auto_round.schemes import PRESET_SCHEMES


def chosen(alg_configs: Any, **given: Any) -> Any:
    options = checked_options(given)
    return choose_algorithm(given_algorithm(alg_configs, options), options)[0]


@pytest.mark.parametrize(
    ("alg_configs", "want"),
    [
        (None, SignRoundConfig()),
        ("signround", SignRoundConfig()),
        ("AutoRound", SignRoundConfig()),
        (["auto-round"], SignRoundConfig()),
        (("rtn",), RTNConfig()),
        ([SignRoundConfig(iters=3)], SignRoundConfig(iters=3)),
        (SignRoundConfig(iters=0), RTNConfig()),
        (SignRoundConfig(bits=2, iters=5), SignRoundConfig(iters=5)),
        (AdamRoundConfig(iters=4), AdamRoundConfig(iters=4)),
        (RTNConfig(enable_opt_rtn=True), RTNConfig(disable_opt_rtn=False)),
        (OptimizedRTNConfig(), OptimizedRTNConfig()),
    ],
)
def test_algorithms(alg_configs: Any, want: Any) -> None:
    found = chosen(alg_configs)
    assert type(found) is type(want) and found == want


def test_iters_zero_rounds_whatever_the_name() -> None:
    for name in (None, "auto_round", "signround"):
        assert chosen(name, iters=0, disable_opt_rtn=True) == RTNConfig(disable_opt_rtn=True)
    assert chosen(SignRoundConfig(iters=0), disable_opt_rtn=True) == RTNConfig(disable_opt_rtn=True)


def test_arguments_that_both_have_are_taken_from_the_one_that_says_something() -> None:
    assert chosen(SignRoundConfig(iters=3), batch_size=2, gradient_accumulate_steps=4).batch_size == 2
    assert chosen(SignRoundConfig(batch_size=2)).batch_size == 2
    with pytest.raises(ConfigError, match="batch_size=4 contradicts"):
        chosen(SignRoundConfig(batch_size=2), batch_size=4)


@pytest.mark.parametrize(
    ("alg_configs", "given", "says"),
    [
        (SignRoundConfig(bits=2), {"bits": 4}, "bits=4 contradicts alg_configs=SignRoundConfig.bits=2."),
        (RTNConfig(sym=False), {"sym": True}, "sym=True contradicts"),
        (SignRoundConfig(lr=0.1), {"lr": 0.2}, "lr=0.2 contradicts"),
        (["rtn", "auto_round"], {}, "give one algorithm"),
        (3, {}, "give auto_round, gptq, rtn, or one RTNConfig"),
        ("rtnn", {}, "did you mean 'rtn'"),
        ("rtn", {"algorithm": "rtn"}, "cannot be used together"),
    ],
)
def test_contradictions(alg_configs: Any, given: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        chosen(alg_configs, **given)


def test_scheme_fields_of_a_config_join_the_scheme() -> None:
    options = checked_options({"sym": False})
    given_algorithm(SignRoundConfig(bits=2, group_size=64), options)
    found = resolve_scheme("W4A16", options)
    assert (found.bits, found.group_size, found.sym) == (2, 64, False)


def test_configs_take_keywords_only_and_are_frozen() -> None:
    with pytest.raises(TypeError):
        SignRoundConfig(3)  # type: ignore[misc]
    with pytest.raises(AttributeError):
        RTNConfig().bits = 3  # type: ignore[misc]
    assert repr(SignRoundConfig(bits=2, iters=5)) == "SignRoundConfig(bits=2, iters=5)"
    with pytest.raises(ConfigError, match="contradict"):
        RTNConfig(disable_opt_rtn=True, enable_opt_rtn=True)


@pytest.mark.parametrize("scheme", ["MXFP4", "MXFP8", "MXINT4", "NVFP4", "FP8_STATIC", "FPW8A16"])
def test_types_without_a_zero_point_stay_symmetric(scheme: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("WARNING", logger="auto_round"):
        found = resolve_scheme(scheme, checked_options({"sym": False, "act_sym": False}))
    assert found == PRESET_SCHEMES[scheme] and found.sym
    assert "sym=False is not used: data type" in caplog.text and "no zero point" in caplog.text


def test_types_with_a_zero_point_may_be_asymmetric(caplog: pytest.LogCaptureFixture) -> None:
    assert not resolve_scheme("W4A16", checked_options({"sym": False})).sym
    assert not resolve_scheme("INT8", checked_options({"act_sym": False})).activations.sym  # type: ignore[union-attr]
    assert caplog.text == ""
    weights_only = QuantizationScheme(bits=4, sym=False, act_bits=8, act_data_type="fp")
    settled, changed = symmetric_if_required(weights_only)
    assert changed == ["act_sym"] and not settled.sym and settled.activations.sym  # type: ignore[union-attr]


def test_a_gguf_scheme_keeps_its_types(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("WARNING", logger="auto_round"):
        found = resolve_scheme("gguf:q2_k_s", checked_options({"data_type": "fp", "group_size": 64}))
    assert found == PRESET_SCHEMES["GGUF:Q2_K_S"] and "group_size, data_type not used" in caplog.text


def test_details_of_activations_that_are_not_quantized(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("WARNING", logger="auto_round"):
        assert resolve_scheme("W4A16", checked_options({"act_sym": False})) == PRESET_SCHEMES["W4A16"]
        assert "act_sym has no effect: activations are not quantized without act_bits" in caplog.text
        caplog.clear()
        resolve_scheme("W4A16", checked_options({"act_sym": False, "act_bits": 8}))
        assert caplog.text == ""
