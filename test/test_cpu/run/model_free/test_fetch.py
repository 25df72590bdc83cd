"""A hub, simulated by a folder: files are downloaded one at a time, checked, and removed."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from auto_round.errors import ModelError
from auto_round.formats.base import parse_formats
from auto_round.run.model_free import inputs as fetch
from auto_round.run.model_free.driver import open_model_free
from auto_round.run.model_free.inputs import RemoteFile, fetch_checked

G32: dict[str, Any] = {"scheme": "W4A16", "group_size": 32}


class FakeHub(fetch.HubFetcher):
    """A folder as a repository. `spoil(name, attempt, file)` may damage what is fetched."""

    def __init__(self, folder: Path, small: Path, spoil: Any = None) -> None:
        super().__init__("org/model")
        self.folder, self.small, self.spoil = folder, small, spoil
        self.fetched: list[str] = []
        self.staged: list[int] = []
        small.mkdir()
        shutil.copytree(folder, small, dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.safetensors"))

    def small_files(self, trust_remote_code: bool) -> Path:
        return self.small

    def weight_files(self) -> dict[str, RemoteFile]:
        files = sorted(self.folder.glob("*.safetensors"))
        return {f.name: RemoteFile(f.stat().st_size, hashlib.sha256(f.read_bytes()).hexdigest()) for f in files}

    def head(self, name: str, start: int, end: int) -> bytes:
        return (self.folder / name).read_bytes()[start:end]

    def fetch(self, name: str, folder: Path) -> Path:
        self.fetched.append(name)
        real = [file for file in folder.parent.glob("*.safetensors") if file.stat().st_blocks * 512 > 40_000]
        self.staged.append(len(real))
        shutil.copyfile(self.folder / name, folder / name)
        if self.spoil is not None:
            self.spoil(name, self.fetched.count(name), folder / name)
        return folder / name


@pytest.fixture
def hub_run(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, packable_folder: Callable[..., str],
    resharded: Callable[..., Path],
) -> Callable[..., tuple[FakeHub, Path]]:  # fmt: skip
    """`hub_run(spoil)`: a run whose input is such a hub of four shards: (hub, output folder)."""
    from auto_round import AutoRound

    monkeypatch.setenv("AR_WORK_SPACE", str(tmp_path / "space"))
    monkeypatch.setattr(fetch.time, "sleep", lambda seconds: None)

    def start(spoil: Any = None, family: str = "llama", more: tuple[str, ...] = ()) -> tuple[FakeHub, Path]:
        folder = resharded(packable_folder(family), 4)
        for name in more:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(name)
        shutil.rmtree(tmp_path / "small", ignore_errors=True)
        hub = FakeHub(folder, tmp_path / "small", spoil)
        settings = AutoRound(str(folder), model_free=True, parallelism=1, device_map="cpu", **G32).settings
        monkeypatch.setattr(fetch, "HubFetcher", lambda repo: hub)
        job = open_model_free("org/model", settings)
        assert job is not None
        job.to_folders(str(tmp_path / "hub"), parse_formats("auto_round"), False, "5GB")
        return hub, folder

    return start


def test_one_shard_at_a_time(
    hub_run: Callable[..., Any], free: Callable[..., Path], same_tensors: Callable[..., None], tmp_path: Path
) -> None:
    hub, folder = hub_run()
    assert hub.fetched == sorted(hub.fetched) and len(set(hub.fetched)) == 4 == len(hub.fetched)
    assert max(hub.staged) <= 2, "one in work and one on its way"
    assert not any((tmp_path / "space" / "model_free").iterdir())
    local = free(folder, **G32)
    for file in local.glob("model*"):
        assert (tmp_path / "hub" / file.name).read_bytes() == file.read_bytes()
    same_tensors(local, tmp_path / "hub")


_BESIDE = ("LICENSE", "additional_chat_templates/tool.jinja", "assets/deep/sign.png", "extra.tiktoken", "weird name")


def test_files_beside_the_weights_come_along(hub_run: Callable[..., Any], tmp_path: Path) -> None:
    hub_run(more=_BESIDE)
    assert all((tmp_path / "hub" / name).read_text() == name for name in _BESIDE)


def test_which_small_files_are_asked_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """All but weights, other models in folders, and without trust code."""
    from huggingface_hub.utils import filter_repo_objects

    asked: dict[str, Any] = {}

    def download(repo: str, **options: Any) -> str:
        asked.update(options, repo=repo)
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    files = [
        *_BESIDE, "config.json", "model.safetensors.index.json", "spiece.model", "chat_template.jinja", "run.py",
        "model.safetensors", "pytorch_model.bin", "original/tokenizer.model", "onnx/model.onnx", "q4.gguf",
    ]  # fmt: skip
    for trusted, wanted in ((False, files[:9]), (True, files[:10])):
        assert fetch.HubFetcher("org/model").small_files(trusted) == tmp_path
        patterns = {k: asked.get(k) for k in ("allow_patterns", "ignore_patterns")}
        assert list(filter_repo_objects(files, **patterns)) == wanted


def test_damage_on_the_way_is_fetched_again(hub_run: Callable[..., Any]) -> None:
    def spoil(name: str, attempt: int, file: Path) -> None:
        if "model-00002" in name and attempt == 1:
            data = bytearray(file.read_bytes())
            data[-5] ^= 1
            file.write_bytes(bytes(data))
        if "model-00003" in name and attempt <= 2:
            raise OSError("connection lost")

    hub, _ = hub_run(spoil)
    counts = {name[6:11]: hub.fetched.count(name) for name in hub.fetched}
    assert counts == {"00001": 1, "00002": 2, "00003": 3, "00004": 1}


def test_what_stays_damaged_is_named(hub_run: Callable[..., Any]) -> None:
    def spoil(name: str, attempt: int, file: Path) -> None:
        if "model-00003" in name:
            file.write_bytes(file.read_bytes()[:-1])

    with pytest.raises(ModelError, match="model-00003-of-00004.safetensors could not be fetched .* bytes instead of"):
        hub_run(spoil)


def test_a_broken_run_is_resumed(hub_run: Callable[..., Any], free: Callable[..., Path], tmp_path: Path) -> None:
    broken = [True]

    def spoil(name: str, attempt: int, file: Path) -> None:
        if broken[0] and "model-00004" in name:
            raise OSError("the network is down")

    with pytest.raises(ModelError, match="the network is down"):
        hub_run(spoil)
    broken[0] = False
    hub, folder = hub_run(spoil)
    assert not any("model-00001" in name for name in hub.fetched), (hub.fetched, "what is done is not fetched again")
    for file in free(folder, **G32).glob("model*"):
        assert (tmp_path / "hub" / file.name).read_bytes() == file.read_bytes()


def test_waiting_grows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Never(fetch.HubFetcher):
        def fetch(self, name: str, folder: Path) -> Path:
            raise OSError("no")

    waits: list[float] = []
    monkeypatch.setattr(fetch.time, "sleep", waits.append)
    with pytest.raises(ModelError, match="x could not be fetched in 5 tries: no"):
        fetch_checked(Never("org/model"), "x", RemoteFile(1), tmp_path)
    assert waits == [2.0, 4.0, 8.0, 16.0]
