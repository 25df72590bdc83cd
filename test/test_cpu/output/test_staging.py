"""A folder shows its files when all are there, config.json last; and one run at a time works on it."""

from __future__ import annotations

import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from auto_round.errors import OutputError
from auto_round.files import file_sha256
from auto_round.output.folders import SWAP, ensure_output_folder
from auto_round.output.staging import FolderLock, Staging, all_files_present, is_lock_held, sync_and_hash

FILES = {"config.json": b"{}", "model.safetensors": b"weights", "extra/notes.txt": b"notes", "README.md": b"card"}


def fill(folder: Path, files: dict[str, bytes]) -> None:
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)


def contents(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_nothing_is_shown_before_publish_and_nothing_of_ours_is_left(tmp_path: Path) -> None:
    with Staging(tmp_path) as stage:
        fill(stage.path, FILES)
        assert [p.name for p in tmp_path.iterdir()] == [".partial"]
        files = sync_and_hash(stage.path, {"model.safetensors": "known"})
        assert set(files) == set(FILES) and files.pop("model.safetensors") == "known"
        assert all(file_sha256(stage.path / name) == digest for name, digest in files.items())
        stage.publish([*files, "model.safetensors"])
    assert contents(tmp_path) == FILES


def test_what_was_not_published_goes(tmp_path: Path) -> None:
    with Staging(tmp_path) as stage:
        fill(stage.path, FILES)
    assert not list(tmp_path.iterdir())
    with Staging(tmp_path) as stage:
        fill(stage.path, FILES)
        stage.retain = True
    assert contents(tmp_path / ".partial") == FILES
    with Staging(tmp_path) as stage:
        stage.clear()
        assert [p.name for p in stage.path.iterdir()] == ["lock"]


@pytest.mark.parametrize("cut", range(7))
def test_publishing_is_resumed_after_any_move(cut: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """config.json is there only when everything else is; what it replaces opens until the first move."""
    old = {"config.json": b"old", "model-00001-of-00002.safetensors": b"1", "model.safetensors.index.json": b"i"}
    fill(tmp_path, {**old, "mine.txt": b"kept"})
    stage = Staging(tmp_path)
    fill(stage.path, FILES)
    files = sync_and_hash(stage.path)
    real, moves = os.replace, [0]

    def replace(one: Path, other: Path) -> None:
        if Path(other).name == SWAP:
            return real(one, other)
        if moves[0] == cut:
            raise OSError(28, "no space left on device")
        moves[0] += 1
        real(one, other)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", replace)
        if cut < len(FILES):
            with pytest.raises(OutputError, match="no space left"):
                stage.publish(files)
            assert not (tmp_path / "config.json").exists()
        else:
            stage.publish(files)
    assert all_files_present(tmp_path, files)
    stage.publish(files)
    stage.close()
    assert contents(tmp_path) == {**FILES, "mine.txt": b"kept"}


def test_a_changed_file_cannot_be_published(tmp_path: Path) -> None:
    with Staging(tmp_path) as stage:
        fill(stage.path, FILES)
        files = sync_and_hash(stage.path)
        assert all_files_present(tmp_path, files)
        (stage.path / "README.md").write_bytes(b"other")
        assert not all_files_present(tmp_path, files)
        (stage.path / "README.md").unlink()
        assert not all_files_present(tmp_path, files)


def test_names_that_an_interrupted_run_leaves(tmp_path: Path) -> None:
    (tmp_path / ".partial").mkdir()
    ensure_output_folder(tmp_path)
    (tmp_path / "other").touch()
    with pytest.raises(OutputError, match="not empty"):
        ensure_output_folder(tmp_path)
    ensure_output_folder(tmp_path, ours={".partial", "other"})


def test_one_run_at_a_time(tmp_path: Path) -> None:
    pytest.importorskip("fcntl")
    with Staging(tmp_path):
        with pytest.raises(OutputError, match=rf"is being written by process {os.getpid()} on "):
            Staging(tmp_path)
    with Staging(tmp_path):
        pass


def test_whether_a_lock_is_held(tmp_path: Path) -> None:
    file = tmp_path / "lock"
    assert not is_lock_held(file)
    file.touch()  # of a process that was killed
    assert not is_lock_held(file)
    with FolderLock(file, tmp_path):
        assert is_lock_held(file) and is_lock_held(file)
        started = time.monotonic()
        with pytest.raises(OutputError, match="is being written by"):
            FolderLock(file, tmp_path, patience=0.1)
        assert time.monotonic() - started >= 0.1
    assert not is_lock_held(file)


def test_a_lock_waits_for_those_who_ask(tmp_path: Path) -> None:
    """Asking takes a shared lock for a moment."""
    fcntl = pytest.importorskip("fcntl")
    file = tmp_path / "lock"
    file.touch()
    with open(file) as asking, ThreadPoolExecutor(1) as pool:
        fcntl.flock(asking, fcntl.LOCK_SH)
        assert not is_lock_held(file)
        taken = pool.submit(FolderLock, file, tmp_path, patience=60)
        time.sleep(0.1)
        assert not taken.done()
        fcntl.flock(asking, fcntl.LOCK_UN)
        with taken.result():
            assert is_lock_held(file)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs a process of its own that can be killed")
def test_the_lock_of_a_killed_process_is_free(tmp_path: Path) -> None:
    pid = os.fork()
    if pid == 0:
        FolderLock(tmp_path / "lock", tmp_path)
        (tmp_path / "ready").touch()
        time.sleep(600)
    while not (tmp_path / "ready").exists():
        time.sleep(0.01)
    with pytest.raises(OutputError, match=rf"process {pid} on "):
        FolderLock(tmp_path / "lock", tmp_path)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    with FolderLock(tmp_path / "lock", tmp_path):
        assert (tmp_path / "lock").exists()
    assert not (tmp_path / "lock").exists()
