from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from auto_round.cli import main
from auto_round.cli.arguments import QUANTIZE_GROUPS
from auto_round.cli.quantize import _VERB_FLAGS
from auto_round.errors import DeviceError

DEFAULT = {"batch_size": 8, "iters": 200, "seqlen": 2048, "nsamples": 128, "disable_opt_rtn": False}


def test_plain_call(job: Any) -> None:
    assert main.run(["--model", "org/m", "--scheme", "W4A16", "--format", "auto_round", "--output_dir", "out"]) == 0
    assert job.kwargs == {"model": "org/m", "scheme": "W4A16", **DEFAULT}
    assert job.saved == {"output_dir": "out", "format": "auto_round"}


@pytest.mark.parametrize(
    "words",
    [["org/m"], ["quantize", "org/m"], ["--model_name", "org/m"], ["--model-name-or-path=org/m"], ["--asym", "org/m"]],
)
def test_ways_to_name_the_model(job: Any, words: list[str]) -> None:
    assert main.run(words) == 0
    assert job.kwargs["model"] == "org/m"
    assert job.saved == {"output_dir": "./tmp_autoround", "format": None}


EVERY_FLAG: list[tuple[str, dict[str, Any]]] = [
    ("--bits 2 --group_size 64 --asym", {"bits": 2, "group_size": 64, "sym": False}),
    ("--group_size -1 --sym", {"group_size": -1, "sym": True}),
    ("--group_size 128,64", {"group_size": (128, 64)}),
    ("--group-size=32 --data_type int", {"group_size": 32, "data_type": "int"}),
    (
        "--iters 20 --lr 5e-3 --minmax_lr 0.01 --momentum 0.9",
        {"iters": 20, "lr": 5e-3, "minmax_lr": 0.01, "momentum": 0.9},
    ),
    ("--iter 3", {"iters": 3}),
    ("--bs 4 --gradient_accumulate_steps 8", {"batch_size": 4, "gradient_accumulate_steps": 8}),
    ("--train_bs 4", {"batch_size": 4}),
    ("--batch_size 4", {"batch_size": 4}),
    ("--nsample 16 --seq_len 256 --seed 7", {"nsamples": 16, "seqlen": 256, "seed": 7}),
    ("--nsamples 16 --seqlen 256", {"nsamples": 16, "seqlen": 256}),
    ("--dataset ./tmp.json,mbpp:num=3", {"dataset": "./tmp.json,mbpp:num=3"}),
    ("--device_map 0", {"device_map": 0}),
    ("--device 0,1", {"device_map": "0,1"}),
    ("--devices cpu", {"device_map": "cpu"}),
    ("--enable_torch_compile", {"enable_torch_compile": True}),
    ("--disable_torch_compile", {"enable_torch_compile": False}),
    ("--low_gpu_mem_usage --low_cpu_mem_usage", {"low_gpu_mem_usage": True, "low_cpu_mem_usage": True}),
    ("--disable_low_cpu_mem_usage", {"low_cpu_mem_usage": False}),
    ("--adam", {"enable_adam": True}),
    ("--enable-adam", {"enable_adam": True}),
    (
        "--static_kv_dtype fp8 --static_kv_granularity head",
        {"static_kv_dtype": "fp8", "static_kv_granularity": "head"},
    ),
    (
        "--static_attention_dtype float8_e4m3fn --static-attention-granularity tensor",
        {"static_attention_dtype": "float8_e4m3fn", "static_attention_granularity": "tensor"},
    ),
    ("--disable_opt_rtn", {"disable_opt_rtn": True}),
    ("--enable_opt_rtn", {"disable_opt_rtn": False}),
    ("--ignore_layers mlp,lm_head", {"ignore_layers": "mlp,lm_head"}),
    ("--fp_layers mlp", {"ignore_layers": "mlp"}),
    ("--quant_lm_head", {"quant_lm_head": True}),
    ("--no-quant_lm_head", {"quant_lm_head": False}),
    ("--enable_deterministic_algorithms", {"enable_deterministic_algorithms": True}),
    ("--trust_remote_code", {"trust_remote_code": True}),
    ("--disable_trust_remote_code", {"trust_remote_code": False}),
    ("--model_dtype bf16 --platform model_scope", {"model_dtype": "bf16", "platform": "model_scope"}),
    ("--scale_dtype fp32", {"scale_dtype": "fp32"}),
    ("--disable_minmax_tuning", {"enable_minmax_tuning": False}),
    ("--no-enable_minmax_tuning", {"enable_minmax_tuning": False}),
    ("--enable_quanted_input", {"enable_quanted_input": True}),
    ("--disable_quanted_input --not_use_best_mse", {"enable_quanted_input": False, "not_use_best_mse": True}),
    ("--disable_amp", {"amp": False}),
    ("--to_quant_block_names model.layers", {"to_quant_block_names": "model.layers"}),
    ("--no_verify", {"verify": False}),
    ("--algorithm auto_round", {}),
    ("--alg rtn", {"iters": 0}),
    ("--alg_configs rtn", {"iters": 0}),
    ("--algorithm gptq", {"algorithm": "gptq"}),
    ("--alg GPTQ --iters 0 --disable_opt_rtn", {"algorithm": "gptq", "iters": 0, "disable_opt_rtn": True}),
    ("--alg-config auto-round", {}),
    ("--bit 8 --schemes w2a16", {"bits": 8, "scheme": "w2a16"}),
    ("--no-enable_adam", {"enable_adam": False}),
    ("--strict", {"strict": True}),
    ("--nblocks 1 --no-enable_lfq --no-enable_alg_ext --guidance_scale 7.5 --rotation_backend=auto --mllm", {}),
    ("--disable_model_free", {}),
]


@pytest.mark.parametrize(("flags", "want"), EVERY_FLAG, ids=[f for f, _ in EVERY_FLAG])
def test_flag_reaches_the_facade(job: Any, flags: str, want: dict[str, Any]) -> None:
    assert main.run(["org/m", *flags.split()]) == 0
    assert job.kwargs == {"model": "org/m", **DEFAULT, **want}


def test_layer_config_of_the_guide(job: Any) -> None:
    assert main.run(["org/m", "--layer_config", "{k_proj:{bits:8},v_proj:{bits:8}}"]) == 0
    assert job.kwargs["layer_config"] == {"k_proj": {"bits": 8}, "v_proj": {"bits": 8}}


def test_output_flags(job: Any) -> None:
    assert main.run(["org/m", "--formats", "auto_round,fake", "--overwrite", "--max_shard_size", "2GB"]) == 0
    want = {"output_dir": "./tmp_autoround", "format": "auto_round,fake", "overwrite": True, "max_shard_size": "2GB"}
    assert job.saved == want and job.named == "auto_round,fake"


def test_dry_run_prints_the_plan_and_writes_nothing(job: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.run(["org/m", "--dry_run", "--format", "fake"]) == 0
    assert capsys.readouterr().out == "the plan\n"
    assert job.planned == {"format": "fake", "output_dir": "./tmp_autoround"} and not job.saved


# For each keyword of AutoRound that a flag sets: a value other than its default.
CHANGED: dict[str, Any] = {
    "model_dtype": "bf16", "platform": "model_scope", "trust_remote_code": True, "scheme": "W8A16", "bits": 2,
    "group_size": 32, "sym": False, "data_type": "mx_int", "scale_dtype": "fp32",
    "act_bits": 8, "act_group_size": 0, "act_sym": False, "act_data_type": "int", "act_dynamic": False,
    "layer_config": {"k_proj": {"bits": 8}}, "ignore_layers": "mlp", "quant_lm_head": True,
    "to_quant_block_names": "model.layers.0", "dataset": "mbpp",
    "nsamples": 3, "seqlen": 16, "batch_size": 2, "seed": 7, "iters": 3, "lr": 0.5, "minmax_lr": 0.25, "momentum": 0.9,
    "gradient_accumulate_steps": 2, "enable_adam": True, "enable_minmax_tuning": False, "enable_quanted_input": False,
    "not_use_best_mse": True, "disable_opt_rtn": True, "enable_torch_compile": True, "amp": False,
    "low_gpu_mem_usage": True, "low_cpu_mem_usage": False, "enable_deterministic_algorithms": True, "verify": False,
    "super_bits": 6, "super_group_size": 8, "imatrix": "a.gguf", "save_imatrix": "b.gguf",
    "static_kv_dtype": "fp8", "static_kv_granularity": "head", "static_attention_dtype": "fp8",
    "static_attention_granularity": "head", "model_free": True, "parallelism": 3, "max_memory": "1GB",
    "on_nan": "keep", "allow_pickle": True, "strict": True,
}  # fmt: skip
# What has no effect without another keyword, and is refused or warned about.
NEEDED: dict[str, dict[str, Any]] = {
    "act_group_size": {"act_bits": 8},
    "act_sym": {"act_bits": 8},
    "act_data_type": {"act_bits": 8},
    "act_dynamic": {"act_bits": 8, "act_group_size": -1},
    "static_kv_granularity": {"static_kv_dtype": "fp8"},
    "static_attention_granularity": {"static_attention_dtype": "fp8"},
    "parallelism": {"model_free": True},
    "max_memory": {"model_free": True},
}


def test_every_flag_has_a_use() -> None:
    """No flag is parsed and ignored: it is a keyword of AutoRound, or one that the verb uses itself."""
    flags = {f.dest for g in QUANTIZE_GROUPS for f in g.flags}
    # Plugins are loaded, by the same function as AutoRound's, when the flags have been parsed.
    assert flags - set(_VERB_FLAGS) - {"model", "device_map", "plugins"} == set(CHANGED)
    assert set(_VERB_FLAGS) <= flags


@pytest.mark.parametrize("name", CHANGED)
def test_every_value_changes_the_job(name: str, tiny_folder: Any) -> None:
    """AutoRound takes the keyword, and the resolved settings or the opened model are others because of it."""
    from auto_round.autoround import AutoRound

    folder = tiny_folder("llama")
    plain, changed = (
        AutoRound(folder, tokenizer=object(), device_map="cpu", **NEEDED.get(name, {}), **given)
        for given in ({}, {name: CHANGED[name]})
    )
    free = [getattr(job._runs, "options", None) for job in (plain, changed)]
    assert (
        plain.settings != changed.settings
        or free[0] != free[1]
        or plain._runs.source.dtype != changed._runs.source.dtype
        or (type(plain._runs.source) is not type(changed._runs.source))
    )


def test_the_device_is_used(tiny_folder: Any) -> None:
    from auto_round.autoround import AutoRound

    with pytest.raises(DeviceError, match="cuda:7"):
        AutoRound(tiny_folder("llama"), device_map="cuda:7")


@pytest.mark.parametrize(
    ("run", "want"),
    [
        (main.run, DEFAULT),
        (main.run_best, {**DEFAULT, "iters": 1000, "nsamples": 512}),
        (main.run_light, {**DEFAULT, "iters": 50, "lr": 5e-3}),
        (main.run_opt_rtn, {**DEFAULT, "iters": 0}),
        (main.run_rtn, {**DEFAULT, "iters": 0, "nsamples": 0, "disable_opt_rtn": True, "model_free": "auto"}),
    ],
)
def test_recipes(job: Any, run: Any, want: dict[str, Any]) -> None:
    assert run(["org/m"]) == 0
    assert job.kwargs == {"model": "org/m", **want}
    assert run(["org/m", "--seqlen", "64", "--bs", "2"]) == 0
    assert job.kwargs == {"model": "org/m", **want, "seqlen": 64, "batch_size": 2}


@pytest.mark.parametrize(
    ("words", "want"),
    [
        (["--model_free"], True), (["--iters", "0", "--disable_opt_rtn"], "auto"),
        (["--iters", "0", "--disable_opt_rtn", "--disable_model_free"], None), (["--iters", "0"], None),
    ],
)  # fmt: skip
def test_who_gets_model_free_mode(job: Any, words: list[str], want: Any) -> None:
    assert main.run(["org/m", *words]) == 0
    assert job.kwargs.get("model_free") == want
    if want is True:
        assert (job.kwargs["iters"], job.kwargs["disable_opt_rtn"]) == (0, True)


@pytest.mark.parametrize("run", [main.run_best, main.run_opt_rtn, main.run_light])
def test_recipes_that_do_more_refuse_it(job: Any, run: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["org/m", "--model_free"]) == 2
    assert "--model_free only rounds to nearest" in capsys.readouterr().err


def test_recipe_without_tuning_refuses_steps(job: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.run_rtn(["org/m", "--iters", "5"]) == 2
    assert "does no tuning" in capsys.readouterr().err
    assert main.run_rtn(["org/m", "--iters", "0"]) == 0


def test_eval_after_quantizing_takes_the_last_format(job: Any, evaluated: list[dict[str, Any]]) -> None:
    assert main.run(["org/m", "--format", "auto_round,fake", "--output_dir", "o", "--eval", "--max_windows", "3"]) == 0
    assert job.saved["output_dir"] == "o"
    (call,) = evaluated
    assert (call["model"], call["reference"], call["max_windows"]) == ("o/last", "org/m", 3)
    assert call["record_in"] == Path("o/last"), "the card and report of what was saved get the figures"


def test_eval_alone_only_evaluates(job: Any, evaluated: list[dict[str, Any]]) -> None:
    assert main.run(["org/m", "--eval", "--device_map", "cpu", "--bs", "4", "--seqlen", "128"]) == 0
    assert not job.kwargs
    assert evaluated == [{"model": "org/m", "eval": True, "device_map": "cpu", "eval_bs": 4, "eval_seqlen": 128}]


def test_evaluation_settings_without_eval_are_an_error(job: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.run(["org/m", "--eval_text", "f.txt"]) == 2
    assert "--eval_text has no effect without --eval" in capsys.readouterr().err
    assert not job.kwargs
