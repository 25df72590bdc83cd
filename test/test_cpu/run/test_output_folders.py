"""Where a run may write: what an earlier run left is replaced, everything else is kept."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from auto_round import AutoRound
from auto_round.errors import OutputError
from auto_round.output import staging
from auto_round.output.folders import inspect_folder
from auto_round.output.staging import Staging
from auto_round.run import driver as run_module

RTN: dict[str, Any] = {"iters": 0, "disable_opt_rtn": True, "group_size": 32}


def tree(folder: Path) -> dict[str, bytes]:
    """What a folder holds, but for what tells of the run's time."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in ("report.json", "README.md")
    }


@pytest.fixture
def write(
    packable_folder: Callable[..., str], token_ids: list[torch.Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Path]:
    """`write(name, formats, save={...}, **settings)`: one run into a folder; returns it."""
    monkeypatch.setenv("AR_WORK_SPACE", str(tmp_path / "space"))

    def start(
        name: str = "out", formats: str = "auto_round", save: Any = None, model: Any = None, **given: Any
    ) -> Path:
        model = packable_folder("llama") if model is None else model
        settings = {"dataset": token_ids, "nsamples": 8, "seqlen": 24, **RTN, **given}
        AutoRound(model, **settings).quantize_and_save(tmp_path / name, format=formats, **(save or {}))
        return tmp_path / name

    return start


@pytest.fixture
def wide_write(write: Callable[..., Path], gguf_folder: Callable[..., str]) -> Callable[..., Path]:
    """The same of a model that GGUF types take."""
    return lambda *args, **given: write(*args, model=gguf_folder("llama"), **given)


CELLS = ["auto_round", "fake", "auto_gptq,fake", "gguf:q4_0", "gguf:q4_0,gguf:q8_0", "gguf:q8_0,auto_round"]


@pytest.mark.parametrize("new", CELLS)
def test_a_result_of_any_kind_is_replaced_by_any_other(
    new: str, wide_write: Callable[..., Path], tmp_path: Path
) -> None:
    wanted = tree(wide_write("wanted", new))
    for old in CELLS:
        if old != new:
            wide_write("out", old)
            shutil.rmtree(tmp_path / "space", ignore_errors=True)
            assert tree(wide_write("out", new)) == wanted, old
            assert not inspect_folder(tmp_path / "out").foreign


def test_other_settings_replace_and_the_same_end_at_once(
    write: Callable[..., Path], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    write("out", bits=8)
    made = write("out", bits=4)
    assert json.loads((made / "config.json").read_text())["quantization_config"]["bits"] == 4
    before = {path: path.stat().st_mtime_ns for path in made.iterdir()}
    with monkeypatch.context() as patch, caplog.at_level(logging.INFO, "auto_round"):
        patch.setattr(run_module, "quantize_blocks", lambda *_: pytest.fail("it is made again"))
        write("out", bits=4)
    assert "holds the result of this command already" in caplog.text
    assert {path: path.stat().st_mtime_ns for path in made.iterdir()} == before
    write("out", bits=4, save={"overwrite": True})
    assert {path: path.stat().st_mtime_ns for path in made.iterdir()} != before


CHANGES: dict[str, dict[str, Any]] = {
    "bits": {"bits": 3}, "format": {"formats": "auto_gptq"}, "data": {"dataset": [torch.arange(5, 29)] * 8},
    "seed": {"seed": 3}, "shards": {"save": {"max_shard_size": "40KB"}}, "layers": {"ignore_layers": "k_proj"},
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_what_makes_it_another_command(
    change: str, write: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    given: dict[str, Any] = {"iters": 1}
    write("out", **given)
    with caplog.at_level(logging.INFO, "auto_round"):
        write("out", **{**given, **CHANGES[change]})
    assert "already" not in caplog.text


def test_a_result_is_made_again_when_it_is_not_whole_or_the_model_changed(
    write: Callable[..., Path], packable_folder: Callable[..., str], caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    model = shutil.copytree(packable_folder("llama"), tmp_path / "model")
    made = write("out", model=str(model))
    wanted = tree(made)
    (made / "model.safetensors").unlink()
    (tmp_path / "lists").mkdir()
    with caplog.at_level(logging.INFO, "auto_round"):
        assert tree(write("out", model=str(model))) == wanted
        assert "already" not in caplog.text
        file = model / "model.safetensors"
        data = bytearray(file.read_bytes())
        data[-1] ^= 1
        file.write_bytes(data)
        write("out", model=str(model))
        assert "already" not in caplog.text
        write("out", model=str(model))
        assert "already" in caplog.text


def test_data_from_files_and_from_iterators(
    write: Callable[..., Path], caplog: pytest.LogCaptureFixture, tmp_path: Path, token_ids: list[torch.Tensor]
) -> None:
    text = tmp_path / "text.jsonl"
    for rows, said in ((token_ids, False), (token_ids, True), (token_ids[::-1], False)):
        text.write_text("\n".join(json.dumps({"input_ids": ids.tolist()}) for ids in rows))
        caplog.clear()
        with caplog.at_level(logging.INFO, "auto_round"):
            write("out", dataset=str(text), disable_opt_rtn=False)
        assert ("already" in caplog.text) == said
    for _ in range(2):  # what can be read only once is not read to compare it
        caplog.clear()
        with caplog.at_level(logging.INFO, "auto_round"):
            write("once", dataset=iter(token_ids), disable_opt_rtn=False)
        assert "already" not in caplog.text


def test_model_free_results_too(write: Callable[..., Path], caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    free: dict[str, Any] = {"model_free": True, "iters": None, "disable_opt_rtn": None}
    wanted = tree(write("wanted", **free))
    write("out", "auto_gptq,fake")
    assert tree(write("out", **free)) == wanted
    with caplog.at_level(logging.INFO, "auto_round"):
        write("out", **free)
    assert "already" in caplog.text
    assert set(tree(write("out", bits=8))) >= {"config.json", "model.safetensors"}
    assert tree(write("out", **free)) == wanted


@pytest.mark.parametrize(
    "name", ["notes.txt", "sub/notes.txt", "model-00001-of-00001.safetensors", ".hidden", "fake/mine.txt"]
)
@pytest.mark.parametrize("free", [False, True], ids=["regular", "model-free"])
def test_what_is_somebody_elses_is_kept(name: str, free: bool, write: Callable[..., Path], tmp_path: Path) -> None:
    more: dict[str, Any] = {"model_free": True, "iters": None, "disable_opt_rtn": None} if free else {}
    made = write("out", "auto_gptq,fake")
    (made / name).parent.mkdir(exist_ok=True)
    (made / name).write_text("mine")
    before = tree(made)
    for formats in ("auto_round", "fake"):
        with pytest.raises(
            OutputError, match=rf"no earlier run wrote {name}, or they were changed since; choose another folder"
        ):
            write("out", formats, **more)
    assert tree(made) == before


def test_a_file_of_ours_that_was_changed_is_somebody_elses(write: Callable[..., Path]) -> None:
    made = write("out")
    (made / "tokenizer_config.json").write_text("{}")
    with pytest.raises(OutputError, match="no earlier run wrote tokenizer_config.json, or they were changed"):
        write("out", bits=8)


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("free", [False, True], ids=["regular", "model-free"])
def test_the_model_itself_is_never_written_over(
    overwrite: bool, free: bool, write: Callable[..., Path], packable_folder: Callable[..., str], tmp_path: Path
) -> None:
    model = shutil.copytree(packable_folder("llama"), tmp_path / "models" / "one" / "llama")
    (tmp_path / "link").symlink_to(model)
    before = tree(tmp_path / "models")
    more: dict[str, Any] = {"model_free": True, "iters": None, "disable_opt_rtn": None} if free else {}
    for place in ("models/one/llama", "link", "models/one", "models", "models/one/llama/../llama"):
        for formats in ("auto_round", "auto_gptq,fake"):
            with pytest.raises(OutputError, match=r"the model's own folder.*choose another"):
                write(place, formats, model=str(model), save={"overwrite": overwrite}, **more)
    with pytest.raises(OutputError, match="own folder"):
        AutoRound(str(model), **RTN).plan("auto_round", str(tmp_path / "link"))
    assert tree(tmp_path / "models") == before


@pytest.mark.parametrize(
    ("old", "free"), [("fake", False), ("auto_gptq,fake", False), ("gguf:q4_0", False), ("fake", True)]
)
def test_a_swap_that_is_cut_short_anywhere(
    old: str, free: bool, wide_write: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """At any moment the folder holds the whole old result, the whole new one, or what the same command completes."""
    more: dict[str, Any] = {"model_free": True, "iters": None, "disable_opt_rtn": None} if free else {}
    wanted, moment = tree(wide_write("wanted", **more)), 0
    before = tree(wide_write("old", old))
    while True:
        moment += 1
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        shutil.copytree(tmp_path / "old", tmp_path / "out")
        with monkeypatch.context() as patch:
            if not _stops(patch, moment, lambda: wide_write("out", **more)):
                break
        if (tmp_path / "out" / "config.json").is_file():  # a loader opens it
            found = {name: data for name, data in tree(tmp_path / "out").items() if not name.startswith(".")}
            assert found == wanted or before.items() <= found.items(), moment
        assert tree(wide_write("out", **more)) == wanted, moment
        assert not inspect_folder(tmp_path / "out").foreign
    assert moment > 5


class Killed(BaseException):
    """Stands for kill -9: nothing is cleaned up."""


def _stops(patch: pytest.MonkeyPatch, moment: int, work: Callable[[], Any]) -> bool:
    """Whether `work` was stopped, at the `moment`-th change of a name in the swap."""
    count, armed = [0], [False]
    real_show, real_replace, real_unlink = staging.publish_files, os.replace, Path.unlink

    def tick() -> None:
        if armed[0]:
            count[0] += 1
            if count[0] == moment:
                raise Killed

    def show(*args: Any, **kwargs: Any) -> Any:
        armed[0] = True
        return real_show(*args, **kwargs)

    def replace(*args: Any, **kwargs: Any) -> Any:
        tick()
        return real_replace(*args, **kwargs)

    def unlink(path: Path, *args: Any, **kwargs: Any) -> Any:
        if path.name not in (staging.LOCK, "begun"):  # the system frees them
            tick()
        return real_unlink(path, *args, **kwargs)

    patch.setattr(staging, "publish_files", show)
    patch.setattr(os, "replace", replace)
    patch.setattr(Path, "unlink", unlink)
    patch.setattr(Staging, "clear", lambda self, keep=(): None)  # nobody tidies up after a kill
    try:
        work()
    except Killed:
        return True
    return False


def test_disk_must_hold_old_and_new(write: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    made = write("out")
    size = sum(path.stat().st_size for path in made.iterdir())
    monkeypatch.setattr("auto_round.output.folders.free_bytes", lambda path: size // 2)
    with pytest.raises(OutputError, match="needs .* GB but its disk has"):
        write("out", bits=8)
    assert (made / "config.json").is_file()
