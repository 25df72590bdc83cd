"""A feature that is missing is refused with one sentence, as a flag, a keyword or an import."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import pytest

import auto_round
from auto_round import later
from auto_round.cli import main
from auto_round.errors import AutoRoundError, MissingFeatureError, UnsupportedError
from auto_round.layer_config import scheme_from_entry
from auto_round.schemes import QuantizationScheme

CLASSES = [
    ("auto_round", "AutoScheme"),
    ("auto_round", "AWQConfig"),
    ("auto_round", "RotationConfig"),
    ("auto_round", "SpinQuantConfig"),
    ("auto_round.auto_scheme", "AutoScheme"),
    ("auto_round.algorithms.transforms.awq", "AWQConfig"),
    ("auto_round.algorithms.transforms.awq.config", "AWQConfig"),
    ("auto_round.algorithms.quantization.awq.config", "AWQConfig"),
    ("auto_round.algorithms.transforms.spinquant", "SpinQuantConfig"),
    ("auto_round.algorithms.transforms.hadamard.config", "RotationConfig"),
]


@pytest.mark.parametrize(("module", "name"), CLASSES)
def test_importing_a_class_says_what_works_instead(module: str, name: str) -> None:
    found = importlib.import_module(module)
    with pytest.raises(ImportError) as error:
        exec(f"from {module} import {name}", {})
    feature = next(f for f in later.FEATURES if name in f.classes)
    assert str(error.value) == feature.sentence(name)
    assert isinstance(error.value, MissingFeatureError) and isinstance(error.value, (AutoRoundError, ValueError))
    with pytest.raises(AttributeError, match="no attribute 'Elephant'"):
        found.Elephant  # noqa: B018


@pytest.mark.parametrize(
    ("keyword", "value", "flags"),
    [
        ("nblocks", 2, ["--nblocks", "2"]),
        ("enable_alg_ext", True, ["--enable_alg_ext"]),
        ("enable_lfq", True, ["--enable_lfq"]),
        ("rotation_config", "quarot", ["--rotation_config", "quarot"]),
        ("fuse_online_to_weight", True, ["--fuse_online_to_weight", "true"]),
        ("n_grid", 20, ["--n-grid", "20"]),
        ("avg_bits", 3.0, ["--avg_bits", "3"]),
        ("quant_nontext_module", True, ["--quant_nontext_module"]),
        ("num_inference_steps", 3, ["--num_inference_steps", "3"]),
        ("num_hidden_layers", 2, ["--num_hidden_layers", "2"]),
    ],
)
def test_python_and_the_command_line_say_the_same(
    keyword: str, value: Any, flags: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    feature = later.REFUSED.get(keyword)
    assert feature is not None
    with pytest.raises(UnsupportedError) as error:
        auto_round.AutoRound("no/model", **{keyword: value})
    assert str(error.value) == feature.sentence(f"{keyword}={value!r}")
    assert main.run(["no/model", *flags]) == UnsupportedError.exit_code
    assert feature.sentence(f"--{keyword}") in capsys.readouterr().err


@pytest.mark.parametrize("algorithm", ["awq", "awq,auto_round", "svdquant", "hadamard"])
def test_algorithms(algorithm: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UnsupportedError, match="is not available in this version"):
        auto_round.AutoRound("no/model", alg_configs=algorithm)
    assert main.run(["no/model", "--alg_configs", algorithm]) == UnsupportedError.exit_code
    assert later.ALGORITHMS[algorithm.split(",")[0]].what in capsys.readouterr().err


@pytest.mark.parametrize("scheme", ["MXFP6", "mxfp6", "NVFP4_E5M3", "nvfp4-e5m3"])
def test_presets(scheme: str, capsys: pytest.CaptureFixture[str]) -> None:
    feature = later.SCHEMES[scheme.upper().replace("-", "_")]
    with pytest.raises(UnsupportedError) as error:
        auto_round.AutoRound("no/model", scheme=scheme)
    assert str(error.value) == feature.sentence(f"scheme {scheme!r}")
    assert main.run(["no/model", "--scheme", scheme]) == UnsupportedError.exit_code
    assert feature.sentence(f"scheme {scheme!r}") in capsys.readouterr().err
    with pytest.raises(UnsupportedError, match=feature.what.split(" ")[0]):
        scheme_from_entry("k_proj", scheme, QuantizationScheme())


def test_a_configuration_of_a_missing_algorithm() -> None:
    feature = later.REFUSED.get("enable_alg_ext")
    assert feature is not None
    with pytest.raises(UnsupportedError, match=feature.what):
        auto_round.SignRoundV2Config(iters=3)
    with pytest.raises(UnsupportedError, match=feature.what):
        auto_round.SignRoundConfig(enable_alg_ext=True)
    with pytest.raises(UnsupportedError, match="nblocks=2"):
        auto_round.SignRoundConfig(nblocks=2)


@pytest.mark.parametrize(
    "neutral",
    [
        {"rotation_config": None, "enable_lfq": False, "nblocks": 1, "guidance_scale": 7.5, "processor": None},
        {"dynamic_max_gap": -1, "template": None, "disable_deterministic_algorithms": True, "mllm": False},
    ],
)
def test_values_that_ask_for_nothing_pass(neutral: dict[str, Any], tiny_folder: Callable[..., Any]) -> None:
    auto_round.AutoRound(tiny_folder("llama"), tokenizer=object(), **neutral)


def test_older_names_are_autoround(tiny_folder: Callable[..., Any], tmp_path: Any) -> None:
    folder = tiny_folder("llama")
    for name in ("AutoRoundLLM", "AutoRoundMLLM", "AutoRoundDiffusion"):
        made = getattr(auto_round, name)(folder, tokenizer=object(), bits=3)
        assert isinstance(made, auto_round.AutoRound) and made.bits == 3 and not made.enable_adam
    assert auto_round.AutoRoundAdam(folder, tokenizer=object()).enable_adam
    (tmp_path / "model_index.json").write_text("{}")
    with pytest.raises(UnsupportedError, match="diffusion models"):
        auto_round.AutoRoundDiffusion(str(tmp_path))


def test_every_command_is_there_for_scripts() -> None:
    from auto_round import __main__ as module

    for name in ("run", "run_best", "run_eval", "run_light", "run_mllm", "run_opt_rtn", "run_rtn"):
        assert getattr(module, name) is getattr(main, name)
