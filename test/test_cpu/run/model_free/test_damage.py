"""Damaged input and full disks: one typed error each that names file and tensor, and nothing half-written."""

from __future__ import annotations

import errno
import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from auto_round.errors import AutoRoundError, ConfigError, ModelError, NumericsError, OutputError

G32: dict[str, Any] = {"scheme": "W4A16", "group_size": 32}
INDEX = "model.safetensors.index.json"


@pytest.fixture
def split(resharded: Callable[..., Path], packable_folder: Callable[..., str]) -> Path:
    """A fresh checkpoint of two shards."""
    return resharded(packable_folder("llama"), 2)


def second(folder: Path) -> Path:
    return folder / "model-00002-of-00002.safetensors"


def header_of(file: Path) -> dict[str, Any]:
    data = file.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    return dict(json.loads(data[8 : 8 + length]))


def with_header(file: Path, change: Callable[[dict[str, Any]], None]) -> None:
    data = file.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


def refused(free: Callable[..., Path], folder: Path, kind: type[AutoRoundError], *words: str) -> None:
    with pytest.raises(kind) as caught:
        free(folder, **G32)
    for word in words:
        assert word in str(caught.value)


def test_truncated(free: Callable[..., Path], split: Path) -> None:
    file = second(split)
    last = max((v["data_offsets"][1], k) for k, v in header_of(file).items() if k != "__metadata__")[1]
    file.write_bytes(file.read_bytes()[:-100])
    refused(free, split, ModelError, file.name, last, "cut short")


def test_truncated_while_it_runs(free: Callable[..., Path], split: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from auto_round.run.model_free import driver as drive

    file, real = second(split), drive.plan_work

    def cut(*args: Any) -> Any:
        file.write_bytes(file.read_bytes()[:-100])
        return real(*args)

    monkeypatch.setattr(drive, "plan_work", cut)
    refused(free, split, ModelError, file.name, "tensor")


def test_missing(free: Callable[..., Path], split: Path) -> None:
    name = next(k for k in header_of(second(split)) if k != "__metadata__")
    second(split).unlink()
    refused(free, split, ModelError, second(split).name, name)


def test_a_shard_that_is_a_copy_of_the_other(free: Callable[..., Path], split: Path) -> None:
    other = split / "model-00001-of-00002.safetensors"
    name = next(k for k in header_of(second(split)) if k != "__metadata__")
    second(split).write_bytes(other.read_bytes())
    refused(free, split, ModelError, name, second(split).name)


def test_a_tensor_in_two_shards(free: Callable[..., Path], split: Path) -> None:
    other = split / "model-00001-of-00002.safetensors"
    tensors = load_file(second(split))
    name, tensor = next(iter(load_file(other).items()))
    save_file({**tensors, name: tensor}, second(split))
    refused(free, split, ModelError, name, other.name, second(split).name)


@pytest.mark.parametrize("target", ["../other/model.safetensors", "/etc/model.safetensors", "model.bin"])
def test_an_index_that_leads_outside(free: Callable[..., Path], split: Path, target: str) -> None:
    index = json.loads((split / INDEX).read_text())
    name = next(iter(index["weight_map"]))
    index["weight_map"][name] = target
    (split / INDEX).write_text(json.dumps(index))
    refused(free, split, ModelError, name, target)


def test_an_index_with_a_name_twice(free: Callable[..., Path], split: Path) -> None:
    text = (split / INDEX).read_text()
    name = next(iter(json.loads(text)["weight_map"]))
    entry = json.dumps({name: second(split).name})[1:-1]
    (split / INDEX).write_text(text.replace('"weight_map": {', f'"weight_map": {{{entry}, '))
    refused(free, split, ModelError, name, "twice")


@pytest.mark.parametrize("dtype", ["F4", "I64", "F32"])
def test_wrong_dtypes(free: Callable[..., Path], split: Path, dtype: str) -> None:
    name = next(k for k, v in header_of(second(split)).items() if k != "__metadata__" and len(v["shape"]) == 2)

    def change(header: dict[str, Any]) -> None:
        header[name]["dtype"] = dtype
        if dtype == "F32":  # as many bytes as before: the shape is wrong then
            header[name]["shape"] = [1, *header[name]["shape"][1:]]

    with_header(second(split), change)
    refused(free, split, ModelError, name, second(split).name)


def test_overlapping_tensors(free: Callable[..., Path], split: Path) -> None:
    def change(header: dict[str, Any]) -> None:
        names = [k for k, v in header.items() if k != "__metadata__" and len(v["shape"]) == 1]
        header[names[0]]["data_offsets"] = header[names[1]]["data_offsets"]

    with_header(second(split), change)
    refused(free, split, ModelError, second(split).name, "tensor")


def test_bits_that_make_a_weight_infinite(free: Callable[..., Path], split: Path) -> None:
    header = header_of(second(split))
    name = next(k for k, v in header.items() if k.endswith("_proj.weight"))
    tensors = load_file(second(split))
    tensors[name].view(-1).view(torch.int32)[7] |= 0x7F800000
    save_file(tensors, second(split))
    refused(free, split, NumericsError, name)


def test_an_unexpected_tensor_is_not_lost_unseen(
    free: Callable[..., Path], split: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tensors = load_file(second(split))
    save_file({**tensors, "extra.table": torch.ones(4)}, second(split))
    with caplog.at_level("WARNING", "auto_round"):
        free(split, **G32)
    assert "extra.table" in caplog.text


def whole(folder: Path) -> bool:
    """Whether every file under a final name is one that safetensors opens."""
    for file in folder.glob("*.safetensors"):
        load_file(file)
    return True


@pytest.mark.parametrize("step", [5, pytest.param(1, marks=pytest.mark.slow)])
def test_a_disk_that_is_full_at_any_write(
    free: Callable[..., Path], split: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, step: int
) -> None:
    """Every write in turn; afterwards the same command resumes and gives the same bytes."""
    wanted = free(split, "wanted", **G32)
    calls = [0]
    at = [0]
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    for name in ("pwrite", "posix_fallocate", "fsync"):
        real = getattr(os, name)

        def watched(*args: Any, _real: Any = real, **kwargs: Any) -> Any:
            calls[0] += 1
            if calls[0] == at[0]:
                raise full
            return _real(*args, **kwargs)

        monkeypatch.setattr(os, name, watched)
    free(split, "counted", **G32)
    count = calls[0]
    assert count > 20
    for moment in range(1, count + 1, step):
        calls[0], at[0] = 0, moment
        name = f"full-{moment}"
        with pytest.raises(OutputError, match="cannot (write|be written|bring)|cannot be made") as caught:
            free(split, name, **G32)
        assert str(tmp_path / name) in str(caught.value)
        # Nothing opens before all is shown: the last writes are the folder's own, while its files get their names.
        shown = {file.name for file in (tmp_path / name).iterdir() if file.is_file()}
        every = {file.name for file in wanted.iterdir() if file.is_file()}
        assert shown == every or "config.json" not in shown, (moment, shown)
        assert whole(tmp_path / name)
        at[0] = 0
        made = free(split, name, **G32)
        for file in wanted.iterdir():
            if file.name != "report.json":
                assert (made / file.name).read_bytes() == file.read_bytes(), (moment, file.name)


def test_another_run_is_not_resumed(
    free: Callable[..., Path], split: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from auto_round.run.model_free import driver as drive

    with monkeypatch.context() as patch:
        patch.setattr(drive, "write_config", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            free(split, **G32)
    assert (tmp_path / "free" / ".partial" / ".journal" / "run.json").is_file()
    with pytest.raises(ConfigError, match="interrupted run that differs: settings.bits: 4 then, 8 now"):
        free(split, scheme="W8A16", group_size=32)
    made = free(split, scheme="W8A16", group_size=32, overwrite=True)
    assert json.loads((made / "config.json").read_text())["quantization_config"]["bits"] == 8
    (made / "mine.txt").write_text("kept")
    with pytest.raises(OutputError, match="not empty: no earlier run wrote mine.txt"):
        free(split, **G32)
    (made / "mine.txt").unlink()
    assert json.loads((free(split, **G32) / "config.json").read_text())["quantization_config"]["bits"] == 4


def test_a_run_of_a_changed_input_is_not_resumed(
    free: Callable[..., Path], split: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from auto_round.run.model_free import driver as drive

    with monkeypatch.context() as patch:
        patch.setattr(drive, "write_config", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            free(split, **G32)
    os.utime(second(split))
    with pytest.raises(ConfigError, match=f"differs: .*{second(split).name}"):
        free(split, **G32)


def test_a_flipped_bit_in_the_output_is_seen(
    free: Callable[..., Path], split: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from auto_round.errors import VerifyError
    from auto_round.output.writer import PartialFile

    real = PartialFile.sync

    def sync(self: Any) -> None:
        real(self)
        with open(self.path, "r+b") as file:
            file.seek(-3, 2)
            byte = file.read(1)[0]
            file.seek(-3, 2)
            file.write(bytes([byte ^ 4]))

    monkeypatch.setattr(PartialFile, "sync", sync)
    with pytest.raises(VerifyError, match="tensor .* is not what was written"):
        free(split, **G32)
    assert not list((tmp_path / "free").glob("*.safetensors"))
