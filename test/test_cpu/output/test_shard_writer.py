"""Shards: readable by safetensors, whole or absent, equal for equal input, inside their folder."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file

from auto_round.errors import ConfigError, OutputError
from auto_round.files import file_sha256, path_inside, write_json
from auto_round.output.folders import check_disk, ensure_output_folder, free_bytes
from auto_round.output.writer import ShardWriter, parse_size

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.int32, torch.int64, torch.uint8, torch.bool]


def some_tensors() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {
        "odd.bytes": torch.arange(13, dtype=torch.uint8),
        "a.weight": torch.randn(64, 32).bfloat16(),
        "a.qweight": torch.randint(-(2**31), 2**31 - 1, (8, 32), dtype=torch.int32),
        "a.scales": torch.randn(3, 5).half(),
        "scalar": torch.tensor(1.5),
        "empty": torch.zeros(0, 4),
        "e4m3": torch.randn(7).to(torch.float8_e4m3fn),
        'quoted "name" é': torch.ones(3, dtype=torch.float64),
    }


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))


def test_one_shard_is_read_back_exactly(tmp_path: Path) -> None:
    tensors = some_tensors()
    with ShardWriter(tmp_path) as writer:
        for name, tensor in tensors.items():
            writer.add(name, tensor)
    assert [p.name for p in tmp_path.iterdir()] == ["model.safetensors"]
    path = tmp_path / "model.safetensors"
    loaded = load_file(path)
    assert set(loaded) == set(tensors) and all(same(loaded[n], t) for n, t in tensors.items())
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"format": "pt"}
    assert int.from_bytes(path.read_bytes()[:8], "little") % 8 == 0
    assert writer.sha256 == {"model.safetensors": file_sha256(path)}
    assert writer.total_size == sum(t.nbytes for t in tensors.values())


def test_several_shards_and_their_index(tmp_path: Path) -> None:
    tensors = {f"layer.{i}.weight": torch.full((10, 10), float(i)) for i in range(7)}
    tensors["big"] = torch.ones(40, 40)  # larger than a shard: one of its own
    with ShardWriter(tmp_path, max_shard_size=1000) as writer:
        for name, tensor in tensors.items():
            writer.add(name, tensor)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors.values())
    files = sorted(p.name for p in tmp_path.glob("*.safetensors"))
    assert files == [f"model-{i:05d}-of-00005.safetensors" for i in range(1, 6)] == sorted(writer.sha256)
    assert set(index["weight_map"].values()) == set(files)
    for name, tensor in tensors.items():
        assert same(load_file(tmp_path / index["weight_map"][name])[name], tensor)
    assert not list(tmp_path.glob(".*"))


def test_a_full_header_starts_a_new_shard(tmp_path: Path) -> None:
    tensors = {f"name.{'x' * 200}.{i}": torch.ones(2) for i in range(600)}
    with ShardWriter(tmp_path, "10MB") as writer:
        for name, tensor in tensors.items():
            writer.add(name, tensor)
    files = list(tmp_path.glob("*.safetensors"))
    assert len(files) > 1
    assert {n for f in files for n in load_file(f)} == set(tensors)


@settings(max_examples=25, deadline=None)
@given(
    sizes=st.lists(st.tuples(st.integers(0, 9), st.sampled_from(DTYPES)), min_size=1, max_size=12),
    limit=st.integers(1, 200), cut=st.data(),
)  # fmt: skip
def test_any_mixture_of_shapes_also_in_two_runs(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[tuple[int, torch.dtype]], limit: int, cut: st.DataObject
) -> None:
    """A writer that continues after another one, which went on for a while, gives the same bytes."""
    whole, folder = tmp_path_factory.mktemp("whole"), tmp_path_factory.mktemp("shards")
    tensors = {f"t{i}": torch.arange(n).to(dtype) for i, (n, dtype) in enumerate(sizes)}
    with ShardWriter(whole, limit) as writer:
        for name, tensor in tensors.items():
            writer.add(name, tensor)
    loaded = {k: v for f in whole.glob("*.safetensors") for k, v in load_file(f).items()}
    assert set(loaded) == set(tensors) and all(same(loaded[n], t) for n, t in tensors.items())
    marked = cut.draw(st.integers(1, len(tensors)))
    stopped = cut.draw(st.integers(marked, len(tensors) + 1))  # one more: all its files have their names
    first = ShardWriter(folder, limit)
    records, late = [], {}
    for number, name in enumerate([*tensors][:stopped]):
        first.add(name, tensors[name])
        if number < marked:
            records += first.take_records()
            late |= first.take_late()
    if stopped > len(tensors):
        first.finish()
    first.close()
    with ShardWriter(folder, limit) as second:
        second.restore(records, late)
        for name in [*tensors][marked:]:
            second.add(name, tensors[name])
        for path in {*folder.glob(".*.partial")} - {file.path for file in second.partial}:
            path.unlink()  # a later shard of the first writer
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == {p.name: p.read_bytes() for p in whole.iterdir()}


@pytest.mark.parametrize("how", ["flip", "cut", "removed"])
def test_damage_between_two_runs_is_found(tmp_path: Path, how: str) -> None:
    first = ShardWriter(tmp_path, 300)
    for i in range(3):
        first.add(f"t{i}", torch.ones(64))
    first.close()
    path = tmp_path / ".model-00002.partial"
    data = bytearray(path.read_bytes())
    data[-5] ^= 4
    path.write_bytes(data[:-1] if how == "cut" else data)
    if how == "removed":
        path.unlink()
    with pytest.raises(OutputError, match="output of the interrupted run is damaged: .*00002.*--overwrite"):
        ShardWriter(tmp_path, 300).restore(first.take_records(), {})


def test_equal_input_gives_equal_bytes(tmp_path: Path) -> None:
    digests = []
    for run in ("one", "two"):
        (tmp_path / run).mkdir()
        with ShardWriter(tmp_path / run, 3000) as writer:
            for name, tensor in some_tensors().items():
                writer.add(name, tensor)
        digests.append({p.name: file_sha256(p) for p in (tmp_path / run).iterdir()})
    assert digests[0] == digests[1]


def test_nothing_shows_before_it_is_whole(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path, 300)
    for i in range(5):
        writer.add(f"t{i}", torch.ones(64))
        assert not list(tmp_path.glob("*.safetensors*")) and not list(tmp_path.glob("*.json"))
    writer.abort()
    assert not list(tmp_path.iterdir())


def test_a_crash_leaves_no_checkpoint(tmp_path: Path) -> None:
    """The process dies without any chance to tidy up."""
    code = (
        "import os, sys, torch\n"
        "from auto_round.output.writer import ShardWriter\n"
        "w = ShardWriter(sys.argv[1], 300)\n"
        "[w.add(f't{i}', torch.ones(64)) for i in range(4)]\n"
        "os._exit(9)\n"
    )
    root = Path(__file__).resolve().parents[3]
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=root, check=False)
    assert done.returncode == 9
    assert not list(tmp_path.glob("*.safetensors*"))


def test_an_exception_removes_what_was_begun(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="stop"), ShardWriter(tmp_path, 300) as writer:
        writer.add("a", torch.ones(64))
        writer.add("b", torch.ones(64))
        raise RuntimeError("stop")
    assert not list(tmp_path.iterdir())


def test_shards_of_an_earlier_run_go(tmp_path: Path) -> None:
    for limit in (300, "1GB"):
        with ShardWriter(tmp_path, limit) as writer:
            for i in range(4):
                writer.add(f"t{i}", torch.ones(64))
    assert [p.name for p in tmp_path.iterdir()] == ["model.safetensors"]


def test_wrong_use_is_named(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path)
    writer.add("a", torch.ones(2))
    with pytest.raises(OutputError, match="'a' is given twice"):
        writer.add("a", torch.ones(2))
    with pytest.raises(ConfigError, match="complex64"):
        writer.add("c", torch.ones(2, dtype=torch.complex64))
    writer.finish()
    with pytest.raises(OutputError, match="finished"):
        writer.add("b", torch.ones(2))
    with pytest.raises(OutputError, match="no tensor"):
        ShardWriter(tmp_path).finish()
    with pytest.raises(OutputError, match="does not exist"):
        ShardWriter(tmp_path / "none")


def test_the_caller_may_reuse_its_tensor(tmp_path: Path) -> None:
    with ShardWriter(tmp_path) as writer:
        tensor = torch.ones(8)
        writer.add("a", tensor)
        tensor.zero_()
    assert load_file(tmp_path / "model.safetensors")["a"].sum() == 8


@pytest.mark.parametrize("name", ["../out", "/tmp/out", "a/../../out"])
def test_no_file_outside_the_folder(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "folder"
    (folder / "sub").mkdir(parents=True)
    with pytest.raises(OutputError, match="outside"):
        path_inside(folder, name)
    assert not list(tmp_path.glob("out*"))


def test_a_link_out_of_the_folder_is_refused(tmp_path: Path) -> None:
    folder, secret = tmp_path / "folder", tmp_path / "secret.json"
    folder.mkdir()
    secret.write_text("mine")
    (folder / "config.json").symlink_to(secret)
    with pytest.raises(OutputError, match="outside"):
        path_inside(folder, "config.json")
    assert secret.read_text() == "mine"


def test_write_json_is_stable(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"b": 1, "a": [True, None]})
    write_json(tmp_path / "b.json", {"a": [True, None], "b": 1})
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.json", "b.json"]


def test_output_folder(tmp_path: Path) -> None:
    folder = ensure_output_folder(tmp_path / "a" / "b")
    assert folder.is_dir() and ensure_output_folder(folder) == folder
    (folder / "x").write_text("x")
    with pytest.raises(OutputError, match="not empty"):
        ensure_output_folder(folder)
    assert ensure_output_folder(folder, overwrite=True) == folder
    with pytest.raises(OutputError, match="is a file"):
        ensure_output_folder(folder / "x")


def test_free_space(tmp_path: Path) -> None:
    free = free_bytes(tmp_path / "not" / "yet")
    assert free > 0
    check_disk(tmp_path, 1)
    with pytest.raises(OutputError, match=r"needs 1000000\.00 GB but its disk has .* GB free"):
        check_disk(tmp_path, 10**15)


@pytest.mark.parametrize(("text", "size"), [(5, 5), ("5GB", 5 * 10**9), ("1.5 KiB", 1536), ("300mb", 3 * 10**8)])
def test_sizes(text: int | str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "-1", "5 parsecs", 0, "0GB"])
def test_sizes_that_are_none(text: int | str) -> None:
    with pytest.raises(ConfigError, match="max_shard_size"):
        parse_size(text)


@pytest.mark.skipif(sys.platform == "win32", reason="resource is for POSIX")
def test_a_shard_is_not_held_in_memory(tmp_path: Path) -> None:
    with ShardWriter(tmp_path) as writer:
        writer.add("warm", torch.ones(4 << 20))
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        for i in range(12):
            writer.add(f"t{i}", torch.full((8 << 20,), float(i)))  # 32 MiB each
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    assert grown < 150, f"writing 384 MiB took {grown:.0f} MiB more"
