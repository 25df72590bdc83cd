from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest

from auto_round import envs
from auto_round.errors import ConfigError

REPO = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in envs.VARIABLES:
        monkeypatch.setenv(variable.name, "x")  # so that set_config's changes are undone too
        monkeypatch.delenv(variable.name)


def test_defaults_and_types(monkeypatch: pytest.MonkeyPatch) -> None:
    assert envs.AR_LOG_LEVEL == "INFO"
    assert envs.AR_USE_MODELSCOPE is False
    assert envs.AR_OMP_NUM_THREADS is None
    monkeypatch.setenv("AR_LOG_LEVEL", "debug")
    monkeypatch.setenv("AR_USE_MODELSCOPE", "Yes")
    monkeypatch.setenv("AR_OMP_NUM_THREADS", "3")
    assert (envs.AR_LOG_LEVEL, envs.AR_USE_MODELSCOPE, envs.AR_OMP_NUM_THREADS) == ("DEBUG", True, 3)


def test_work_space_keeps_case(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AR_WORK_SPACE", "/Data/MixedCase")
    assert envs.AR_WORK_SPACE == "/Data/MixedCase"
    assert envs.work_space() == Path("/Data/MixedCase")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("AR_LOG_LEVEL", "LOUD"),
        ("AR_USE_MODELSCOPE", "maybe"),
        ("AR_OMP_NUM_THREADS", "0"),
        ("AR_OMP_NUM_THREADS", "two"),
    ],
)
def test_wrong_value_names_variable_and_choices(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=f"{name}='{value}' is not allowed; use "):
        getattr(envs, name)


def test_empty_counts_as_unset(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AR_LOG_LEVEL", " ")
    assert envs.AR_LOG_LEVEL == "INFO"
    assert not envs.is_set("AR_LOG_LEVEL")


def test_set_config_checks_all_before_setting_any() -> None:
    with pytest.raises(ConfigError, match="AR_OMP_NUM_THREADS"):
        envs.set_config(AR_LOG_LEVEL="ERROR", AR_OMP_NUM_THREADS=-1)
    assert not envs.is_set("AR_LOG_LEVEL")
    envs.set_config(AR_LOG_LEVEL="ERROR", AR_USE_MODELSCOPE=True)
    assert envs.is_set("AR_LOG_LEVEL") and envs.AR_USE_MODELSCOPE is True
    envs.set_config(AR_LOG_LEVEL=None)
    assert "AR_LOG_LEVEL" not in os.environ


def test_unknown_names_suggest_the_nearest() -> None:
    with pytest.raises(ConfigError, match="AR_LOG_LEVEL"):
        envs.is_set("AR_LOG_LEVELS")
    with pytest.raises(AttributeError, match="AR_WORK_SPACE"):
        envs.AR_WORKSPACE  # noqa: B018


def test_unknown_lists_foreign_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AR_ACT_SCLE", "1.0")
    monkeypatch.setenv("AR_TEST_SHARED", "/x")
    assert "AR_ACT_SCLE" in envs.unknown()
    assert "AR_TEST_SHARED" not in envs.unknown()
    assert "AR_LOG_LEVEL" not in envs.unknown()


def test_documentation_is_made_from_the_table() -> None:
    done = subprocess.run(
        [sys.executable, str(REPO / "tools" / "make_env_docs.py"), "--check"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(REPO)},
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_logging_is_silent_until_asked_and_never_doubled(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    from auto_round import logger as module

    before, level = list(module.logger.handlers), module.logger.level
    try:
        module.setup_logging("WARNING")
        module.setup_logging("INFO", tmp_path / "deep" / "run.log")
        module.logger.info("seen once")
        module.logger.debug("only in the file")
        shown = capsys.readouterr().err
        assert shown.count("seen once") == 1 and "only in the file" not in shown
        for handler in module.logger.handlers:
            handler.flush()
        assert "only in the file" in (tmp_path / "deep" / "run.log").read_text()
        with pytest.raises(ConfigError, match="TRACE"):
            module.setup_logging("NOISE")
    finally:
        module._remove_own_handlers()
        module.logger.handlers[:] = before
        module.logger.setLevel(level)


def test_ensure_logging_leaves_a_program_with_its_own_setup_alone() -> None:
    from auto_round import logger as module

    root = logging.getLogger()
    handler = logging.NullHandler()
    root.addHandler(handler)
    before = list(module.logger.handlers)
    try:
        module.ensure_logging()
        assert module.logger.handlers == before
    finally:
        root.removeHandler(handler)


def test_warn_once(caplog: pytest.LogCaptureFixture) -> None:
    from auto_round.logger import warn_once

    with caplog.at_level("WARNING", logger="auto_round"):
        for layer in ("a", "b"):
            warn_once("odd layer %s", layer, key="test-odd-layer")
        warn_once("plain %s", "text of this test")
        warn_once("plain %s", "text of this test")
    assert [r.getMessage() for r in caplog.records] == ["odd layer a", "plain text of this test"]


def test_import_sets_up_nothing() -> None:
    code = (
        "import sys, logging; import auto_round.logger as l;"
        "assert 'torch' not in sys.modules; assert not logging.getLogger().handlers;"
        "assert [type(h).__name__ for h in l.logger.handlers] == ['NullHandler']; assert l.logger.level == 0"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": str(REPO)})


INCUMBENT = """
AR_LOG_LEVEL AR_ENABLE_COMPILE_PACKING AR_NVFP4_FUSED_LAYER_GLOBAL_SCALE AR_USE_MODELSCOPE AR_WORK_SPACE
AR_DISABLE_OFFLOAD AR_DISABLE_DATASET_SUBPROCESS AR_ACT_SCALE AR_ENABLE_ACT_MINMAX_TUNING AR_SEARCH_SCALE_RATIO
AR_DYNAMO_CACHE_SIZE_LIMIT AR_MODEL_FREE_SHARD_PARALLELISM AR_AUTO_SCHEME_NSAMPLES AR_AUTO_SCHEME_BATCH_SIZE
AR_AUTO_SCHEME_SEQLEN AR_AUTO_SCHEME_CACHE AR_ENABLE_AUTO_SCHEME_PARALLEL AR_NVFP4_E5M3_CACHE_HP_WEIGHT
AR_DISK_STREAM_MODEL AR_RESUME_DIR AR_ENABLE_UNIFY_MOE_INPUT_SCALE AR_OMP_NUM_THREADS AR_DISABLE_COPY_MTP_WEIGHTS
AR_CALIB_STREAM_DEVICE AR_FUSE_ONLINE_ROTATION AUTO_ROUND_CACHE AUTO_ROUND_GGUF_AUTO_UPDATE LLAMA_CPP_ROOT
AR_FORCE_MOE_ROUTING_ALL_EXPERTS AR_MLLM_DATASET_CACHE_SIZE
""".split()


@pytest.mark.parametrize("name", INCUMBENT)
def test_every_variable_of_the_incumbent_is_known(name: str) -> None:
    getattr(envs, name)
    assert not envs.is_set(name)
    assert name in (REPO / "docs" / "environments.md").read_text()


def test_variables_without_effect_say_why(monkeypatch: pytest.MonkeyPatch) -> None:
    assert envs.without_effect() == []
    envs.set_config(AR_ENABLE_COMPILE_PACKING=True, AR_ACT_SCALE=0.9, AR_WORK_SPACE="w", AR_MLLM_DATASET_CACHE_SIZE=0)
    assert (envs.AR_ENABLE_COMPILE_PACKING, envs.AR_ACT_SCALE, envs.AR_MLLM_DATASET_CACHE_SIZE) == (True, 0.9, 0)
    first, second, third = envs.without_effect()
    assert first.startswith("AR_ACT_SCALE is set and has no effect: ") and second.startswith("AR_ENABLE_COMPILE")
    assert third.startswith("AR_MLLM")
    with pytest.raises(ConfigError, match="a number of 0 or more"):
        envs.set_config(AR_ACT_SCALE="wide")


def test_journals_have_a_folder_of_their_own_where_one_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    from auto_round.run.journal import journal_folder

    monkeypatch.setenv("AR_WORK_SPACE", "w")
    assert journal_folder(Path("out")).parts[0] == "w"
    monkeypatch.setenv("AR_RESUME_DIR", "/Resume")
    assert journal_folder(Path("out")).parts[:2] == ("/", "Resume")


def test_parallelism_of_model_free_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    from auto_round.run.model_free.driver import model_free_options

    monkeypatch.setenv("AR_MODEL_FREE_SHARD_PARALLELISM", "5")
    assert model_free_options().workers == 5
    assert model_free_options(2).workers == 2
