"""Who gets into model-free mode, what is refused, and what a plan says."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from families import known_families

from auto_round import AutoRound, RTNConfig, SignRoundConfig
from auto_round.cli import main
from auto_round.errors import ConfigError, ModelError, UnsupportedError
from auto_round.run.model_free.driver import model_free_options
from auto_round.run.model_free.units import Unit
from auto_round.run.model_free.workers import run_units


@pytest.fixture
def folder(packable_folder: Callable[..., str]) -> str:
    return packable_folder("llama")


@pytest.mark.parametrize(
    "kwargs, words",
    [
        ({"scheme": "FP8_STATIC"}, "FP8_STATIC .*come from calibration data.*act_bits=16"),
        ({"scheme": "NVFP4"}, "NVFP4 .*come from calibration data"),
        ({"scheme": "GGUF:Q4_K_M"}, "GGUF"),
        ({"scheme": "GGUF:Q4_0"}, "GGUF"),
        ({"layer_config": {"k_proj": "FP8_STATIC"}}, "of layer k_proj"),
        ({"static_kv_dtype": "fp8"}, "key-value cache"),
    ],
)
def test_what_needs_data(kwargs: dict[str, Any], words: str, folder: str) -> None:
    with pytest.raises(UnsupportedError, match=words):
        AutoRound(folder, model_free=True, **kwargs)


@pytest.mark.parametrize(
    "kwargs, words",
    [
        ({"iters": 5}, "iters=5 contradicts model_free"),
        ({"enable_opt_rtn": True}, "enable_opt_rtn contradicts"),
        ({"alg_configs": SignRoundConfig()}, "rounds to nearest without calibration data"),
        ({"algorithm": "auto_round"}, "rounds to nearest without calibration data"),
        ({"disable_model_free": True}, "contradict"),
        ({"parallelism": 0}, "parallelism=0"),
        ({"max_memory": "much"}, "max_memory|size"),
    ],
)
def test_contradictions(kwargs: dict[str, Any], words: str, folder: str) -> None:
    with pytest.raises(ConfigError, match=words):
        AutoRound(folder, model_free=True, **kwargs)


def test_other_arguments(folder: str, packable_model: Callable[..., Any]) -> None:
    with pytest.raises(ConfigError, match="not a model object"):
        AutoRound(packable_model("llama"), tokenizer=object(), model_free=True)
    with pytest.raises(ConfigError, match="add model_free=True"):
        AutoRound(folder, parallelism=2)
    with pytest.raises(ConfigError, match="model_free='yes'"):
        AutoRound(folder, model_free="yes")
    job = AutoRound(folder, model_free=True, alg_configs=RTNConfig(disable_opt_rtn=True))
    assert job.model is None
    with pytest.raises(UnsupportedError, match="no model in memory"):
        job.quantize()


def test_the_command_line(folder: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    words = [folder, "--group_size", "32", "--output_dir", str(tmp_path / "out")]
    assert main.run_rtn([*words, "--parallelism", "2", "--max_memory", "1GB"]) == 0
    assert '"model_free": true' in (tmp_path / "out" / "report.json").read_text()
    assert (tmp_path / "out" / "tokenizer.json").is_file()
    assert (
        main.run([*words[:-1], str(tmp_path / "regular"), "--iters", "0", "--disable_opt_rtn", "--disable_model_free"])
        == 0
    )
    assert "model_free" not in (tmp_path / "regular" / "report.json").read_text()


def test_unsupported_settings_use_the_regular_flow(
    folder: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO", "auto_round"):
        job = AutoRound(folder, model_free="auto", iters=0, save_imatrix=tmp_path / "imatrix.gguf")
    assert not job._runs.model_free and "using the regular flow: model-free mode rounds to nearest" in caplog.text
    with pytest.raises(UnsupportedError, match="importance files weight a search"):
        AutoRound(folder, model_free=True, save_imatrix=tmp_path / "imatrix.gguf")


def test_several_stacks_of_blocks(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The regular flow cannot quantize them either, and says the same."""
    known_families()["hrm_text"].build().save_pretrained(tmp_path)
    with pytest.raises(UnsupportedError, match="several stacks of the same blocks"):
        AutoRound(str(tmp_path), model_free=True)
    with caplog.at_level("INFO", "auto_round"), pytest.raises(UnsupportedError, match="several stacks"):
        AutoRound(str(tmp_path), tokenizer=object(), model_free="auto", iters=0)
    assert "using the regular flow: HrmText" in caplog.text


def test_a_folder_that_is_not_there(folder: str) -> None:
    with pytest.raises(ModelError, match="no model folder .*did you mean"):
        AutoRound(f"{folder}x", model_free=True)


def test_encoder_decoders_and_folders_without_weights(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"is_encoder_decoder": true, "model_type": "t5"}')
    with pytest.raises(ModelError, match="holds no weights"):
        AutoRound(str(tmp_path), model_free=True)


def test_a_plan(packable_folder: Callable[..., str]) -> None:
    job = AutoRound(packable_folder("mixtral"), model_free=True, scheme="W4A16", group_size=32, parallelism=3).plan()
    text = job.render()
    assert "3 tensors at a time" in text and "other weights in the blocks, unquantized: it chooses experts" in text
    assert job.peak_ram > 0 and job.bytes_on_disk["auto_round"] > 0


def test_ranks_and_workers_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "4")
    options = model_free_options(2, 10**9)
    assert (options.workers, options.memory, options.rank, options.world) == (2, 10**9, 1, 4)
    monkeypatch.setenv("RANK", "4")
    with pytest.raises(ConfigError, match="RANK=4 is not below WORLD_SIZE=4"):
        model_free_options()
    monkeypatch.setenv("WORLD_SIZE", "many")
    with pytest.raises(ConfigError, match="WORLD_SIZE='many'"):
        model_free_options()


def units(count: int, memory: int) -> list[Unit]:
    return [Unit((), (f"u{i}",), (f"u{i}",), (), (), memory) for i in range(count)]


def test_memory_is_bounded() -> None:
    held, most, lock = [0], [0], threading.Lock()

    def work(unit: Unit) -> None:
        with lock:
            held[0] += unit.memory
            most[0] = max(most[0], held[0])
        time.sleep(0.001)
        with lock:
            held[0] -= unit.memory

    run_units(units(40, 10), work, 8, 35)
    assert most[0] <= 30
    run_units(units(3, 100), work, 8, 35)  # larger than the bound: one at a time
    assert most[0] == 100


def test_the_first_error_ends_the_run() -> None:
    started: list[str] = []

    def work(unit: Unit) -> None:
        started.extend(unit.dense)
        if unit.dense == ("u3",):
            raise ValueError("u3 is bad")

    with pytest.raises(ValueError, match="u3 is bad"):
        run_units(units(500, 1), work, 2, 10)
    assert len(started) < 50


def test_threads_are_given_back() -> None:
    before = torch.get_num_threads()
    seen: list[int] = []
    run_units(units(2, 1), lambda unit: seen.append(torch.get_num_threads()), 64, 10)
    assert torch.get_num_threads() == before and set(seen) == {1}
