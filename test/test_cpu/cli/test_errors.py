from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from auto_round import errors
from auto_round.cli import main
from auto_round.cli.arguments import EVAL_GROUPS, QUANTIZE_GROUPS, spellings
from auto_round.cli.parser import NO_OP_FLAGS
from auto_round.later import REFUSED


def line(capsys: pytest.CaptureFixture[str]) -> str:
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = captured.err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("auto-round: error: "), captured.err
    return lines[0]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["m", "--grup_size", "64"], "unknown flag '--grup_size'; did you mean '--group_size'"),
        (["m", "--group-siz=64"], "did you mean '--group_size'"),
        (["m", "-v"], "unknown flag '-v'"),
        (["m", "--bits", "four"], "invalid int value: 'four'"),
        (["m", "--group_size", "1,2,3"], "not a group size"),
        (["m", "--model_dtype", "int3"], "invalid choice: 'int3'"),
        (["m", "--bits"], "expected one argument"),
        (["m", "n"], "more than one model"),
        (["m", "--model", "n"], "two models were given, 'n' and 'm'"),
        (["--bits", "4"], "no model was given"),
        (["m", "--sym", "--asym"], "--asym contradicts another flag that sets sym to True"),
        (["m", "--enable_opt_rtn", "--disable_opt_rtn"], "contradicts"),
        (["m", "--algorithm", "rtn", "--iters", "3"], "does no tuning"),
        (["m", "--layer_config", "{k:{bits:8}"], "--layer_config"),
        (["list", "colours"], "nothing called 'colours'"),
        (["list", "env", "scheme"], "one word"),
        (["eval", "--eval_bs", "1"], "no model was given"),
        (["m", "--algorithm", "autoroud"], "did you mean 'autoround', 'auto_round'"),
        (["m", "--algorithm", "rtn,auto_round"], "Use one of"),
        (["m", "--algorithm", "gpqt"], "did you mean 'gptq'"),
    ],
)
def test_mistakes(job: Any, capsys: pytest.CaptureFixture[str], words: list[str], says: str) -> None:
    assert main.run(words) == errors.ConfigError.exit_code
    assert says in line(capsys)
    assert not job.kwargs


@pytest.mark.parametrize(
    "words",
    [
        ["--algorithm", "awq"], ["--algorithm", "awq,auto_round"], ["--avg_bits", "6"], ["--target-bits=6"],
        ["--options", "mxfp4,mxfp8"], ["--duo-scaling", "both"], ["--n_grid", "20"],
        ["--rotation_type", "hadamard"], ["--tasks", "mmlu"], ["--tasks"],
        ["--eval", "--eval_backend", "vllm"], ["--eval_backend=vllm"], ["--vllm_args=a=1"], ["--svdquant-rank", "32"],
        ["--nblocks", "2"], ["--quant_nontext_module"], ["--num_hidden_layers", "2"], ["--option", "mxfp4"],
        ["--alg_config", "svdquant,rtn"], ["--enable_alg_ext"], ["--algorithm", "spinquant"],
    ],
)  # fmt: skip
def test_later_features_are_refused_at_once(job: Any, capsys: pytest.CaptureFixture[str], words: list[str]) -> None:
    assert main.run(["m", *words]) == errors.UnsupportedError.exit_code
    assert "is not available in this version; " in line(capsys)
    assert not job.kwargs


def test_no_flag_is_both_taken_and_refused() -> None:
    taken = set(spellings(QUANTIZE_GROUPS)) | set(spellings(EVAL_GROUPS))
    assert not taken & set(REFUSED)


def test_no_spelling_means_two_things() -> None:
    for groups in (QUANTIZE_GROUPS, EVAL_GROUPS):
        names = [n for g in groups for f in g.flags for n in (f.dest, *f.aliases, *f.off)]
        assert len(names) == len(set(names))


KINDS = [c for c in vars(errors).values() if isinstance(c, type) and issubclass(c, errors.AutoRoundError)]


@pytest.mark.parametrize("kind", KINDS, ids=lambda c: c.__name__)
def test_exit_codes(job: Any, capsys: pytest.CaptureFixture[str], kind: type[errors.AutoRoundError]) -> None:
    job.fails = kind("first line\nsecond line")
    assert main.run(["m"]) == kind.exit_code
    assert line(capsys) == "auto-round: error: first line second line"


def test_exit_codes_tell_kinds_apart() -> None:
    kinds = [c for c in KINDS if errors.AutoRoundError in (c, *c.__bases__)]
    assert len({c.exit_code for c in kinds}) == len(kinds) > 8


def test_interrupt(job: Any, capsys: pytest.CaptureFixture[str]) -> None:
    job.fails = KeyboardInterrupt()
    assert main.run(["m"]) == 130
    assert "stopped by the user" in line(capsys)


def test_unexpected_error_keeps_the_traceback_in_a_file(
    job: Any, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    job.fails = TypeError("odd thing")
    assert main.run(["m"]) == 1
    text = line(capsys)
    (log,) = (tmp_path / "WorkPlan").iterdir()
    assert "unexpected error: TypeError: odd thing" in text and str(log) in text
    assert "Traceback" in log.read_text() and "odd thing" in log.read_text()


def test_unexpected_error_on_the_screen_when_debugging(
    job: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("AR_LOG_LEVEL", "debug")
    job.fails = TypeError("odd thing")
    assert main.run(["m"]) == 1
    assert "Traceback" in capsys.readouterr().err
    assert not (tmp_path / "WorkPlan").exists()


def test_out_of_memory_says_what_to_lower(job: Any, capsys: pytest.CaptureFixture[str]) -> None:
    job.fails = MemoryError()
    assert main.run(["m"]) == 1
    assert "--batch_size" in line(capsys)


def test_wrong_log_level(job: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AR_LOG_LEVEL", "LOUD")
    assert main.run(["m"]) == 2
    assert "AR_LOG_LEVEL" in line(capsys)


def test_variables_without_meaning_are_said(
    job: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AR_DISK_STREM_MODEL", "1")
    monkeypatch.setenv("AR_ENABLE_COMPILE_PACKING", "1")
    assert main.run(["m"]) == 0
    said = capsys.readouterr().err
    assert "AR_DISK_STREM_MODEL is set but unknown" in said
    assert "AR_ENABLE_COMPILE_PACKING is set and has no effect: packing is vectorised" in said


# Every flag of the incumbent's command line (0.14 to 0.16).
INCUMBENT = """
model_name model model_name_or_path model_dtype platform batch_size train_bs bs seqlen seq_len nsamples nsample
device_map device devices dataset seed format formats algorithm algorithms alg algs output_dir avg_bits target_bits
options low_gpu_mem_usage low_cpu_mem_usage disable_low_cpu_mem_usage enable_torch_compile disable_torch_compile
disable_trust_remote_code layer_config shared_layers static_kv_dtype static_kv_granularity static_attention_dtype
static_attention_granularity tasks task eval_bs limit num_fewshot eval_gen_kwargs fewshot_as_multiturn
eval_task_by_task eval_backend vllm_args eval_model_dtype add_bos_token ignore_scale_zp_bits disable_amp
disable_deterministic_algorithms enable_deterministic_algorithms model_free disable_model_free mllm
quant_nontext_module extra_data_dir template prompt_file prompt metrics metric image_save_dir guidance_scale
num_inference_steps generator_seed scheme bits group_size asym data_type dtype act_bits act_group_size act_asym
act_data_type act_dtype disable_act_dynamic super_bits super_group_size scale_dtype ignore_layers fp_layers
quant_lm_head no_quant_lm_head to_quant_block_names awq_duo_scaling awq_n_grid awq_seqlen awq_smooth_batch_size
awq_apply_clip awq_clip_as_init disable_opt_rtn enable_opt_rtn iters iter lr minmax_lr momentum nblocks
enable_minmax_tuning no_enable_minmax_tuning disable_minmax_tuning enable_norm_bias_tuning
no_enable_norm_bias_tuning gradient_accumulate_steps enable_alg_ext no_enable_alg_ext not_use_best_mse
no_not_use_best_mse enable_quanted_input no_enable_quanted_input disable_quanted_input enable_adam no_enable_adam
enable_lfq no_enable_lfq rotation_type rotation_hadamard_type rotation_backend rotation_block_size
fuse_online_to_weight allow_online_rotation svdquant_rank enable_svdquant_smooth svdquant_smooth_num_grids
svdquant_smooth_max_calibration_calls svdquant_residual_iters enable_svdquant_residual_early_stop
svdquant_low_rank_dtype svdquant_target_modules svdquant_exclude_modules svdquant_model_adapter eval bit option
schemes alg_config alg_configs num_hidden_layers adam duo_scaling n_grid
""".split()
EVALUATION = """
model_name model model_name_or_path mllm device_map device devices tasks task disable_trust_remote_code seed eval_bs
bs batch_size eval_task_by_task eval_model_dtype limit num_fewshot eval_gen_kwargs fewshot_as_multiturn eval_backend
add_bos_token vllm_args
""".split()


@pytest.mark.parametrize(("names", "groups"), [(INCUMBENT, QUANTIZE_GROUPS), (EVALUATION, EVAL_GROUPS)])
def test_every_flag_of_the_incumbent_is_known(names: list[str], groups: Any) -> None:
    known = {*spellings(groups), *REFUSED, *NO_OP_FLAGS}
    assert [name for name in names if name not in known and name.removeprefix("no_") not in known] == []


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--format", "auto_rond"], "did you mean 'auto_round'"),
        (["--format", "gguf:q*_1"], "gguf:q4_1, "),
        (["--scheme", "W4A17"], "unknown scheme 'W4A17'"),
        (["--scheme", "gguf:q*_k_s"], "GGUF:Q4_K_S"),
        (["--device", "cdua:0"], "cdua:0"),
        (["--layer_config", "{k_proj:{bit:8}}"], "did you mean 'bits'"),
        (["--dataset", "mbpp:nume=3"], "nume"),
        (["--group_size", "-7"], "group_size=-7"),
        (["--format", "auto_awq", "--bits", "2"], "format 'auto_awq' cannot hold"),
    ],
)
def test_typing_errors_are_found_before_the_model(
    capsys: pytest.CaptureFixture[str], words: list[str], says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import socket

    monkeypatch.setattr(socket.socket, "connect", lambda *a: pytest.fail("the network was asked"))
    assert main.run(["some-org/no-such-model", *words]) in (2, 5, 7)
    assert says in line(capsys)


def test_an_output_that_cannot_be_made(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for place in ("file", "file/below"):
        words = ["some-org/no-such-model", "--output_dir", str(tmp_path / place)]
        assert main.run(words) == errors.OutputError.exit_code
        assert "is a file" in line(capsys)


def test_flags_without_effect_are_named(job: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.run(["m", "--mllm"]) == 0
    assert "--mllm has no effect: the kind of a model is found from its files" in capsys.readouterr().err
