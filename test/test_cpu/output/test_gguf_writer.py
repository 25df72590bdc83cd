"""The GGUF writer, judged by the reader of the `gguf` package."""

from __future__ import annotations

import errno
import hashlib
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import gguf
import pytest
import torch

from auto_round.errors import ConfigError, OutputError, UnsupportedError, VerifyError
from auto_round.gguf.metadata import key_value
from auto_round.gguf.reader import GgufTensors
from auto_round.output.gguf_writer import GgufFile

ROOT = Path(__file__).resolve().parents[3]
METADATA = [
    key_value("general.name", "tiny", "string"), key_value("llama.block_count", 2, "uint32"),
    key_value("llama.rope.freq_base", 10000.0, "float32"), key_value("llama.odd", True, "bool"),
    key_value("tokenizer.ggml.tokens", ["a", "bc", "ü"], "string"), key_value("llama.wide", 1 << 40, "uint64"),
    key_value("tokenizer.ggml.scores", [0.5, -1.0, 2.0], "float32"), key_value("llama.list", [7, 8], "uint32"),
]  # fmt: skip
TENSORS: list[tuple[str, tuple[int, ...], str]] = [
    ("token_embd.weight", (5, 64), "Q8_0"),
    ("norm.weight", (7,), "F32"),
    ("blk.0.attn_q.weight", (8, 512), "Q4_K"),
    ("blk.0.ffn_up_exps.weight", (3, 4, 256), "Q2_K"),
    ("half.weight", (3, 5), "F16"),
    ("brain.weight", (3, 5), "BF16"),
]


def stored(seed: int = 0) -> dict[str, torch.Tensor]:
    """Every tensor as stored in the file."""
    generator = torch.Generator().manual_seed(seed)
    bytes_of = lambda *shape: torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)  # noqa: E731
    return {
        "token_embd.weight": bytes_of(5, 2 * 34),
        "norm.weight": torch.randn(7, generator=generator),
        "blk.0.attn_q.weight": bytes_of(8, 2 * 144),
        "blk.0.ffn_up_exps.weight": bytes_of(3, 4, 84),
        "half.weight": torch.randn(3, 5, generator=generator).half(),
        "brain.weight": torch.randn(3, 5, generator=generator).bfloat16(),
    }


def write_whole(path: Path, skip: str = "") -> str:
    file = GgufFile(path, "llama", METADATA, TENSORS)
    for name, data in stored().items():
        if name != skip:
            file.write(name, data)
    return file.finish()


def test_the_package_reads_what_was_written(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    digest = write_whole(path)
    assert digest == hashlib.sha256(path.read_bytes()).hexdigest()
    assert os.listdir(tmp_path) == ["m.gguf"]
    reader = gguf.GGUFReader(path)
    assert [tensor.name for tensor in reader.tensors] == [name for name, _, _ in TENSORS]
    for tensor, (name, shape, kind) in zip(reader.tensors, TENSORS, strict=True):
        assert (tuple(reversed(tensor.shape.tolist())), tensor.tensor_type.name) == (shape, kind)
        assert tensor.data_offset % 32 == 0
        data = stored()[name]
        assert tensor.data.tobytes() == data.view(torch.uint8).numpy().tobytes(), name
    assert path.stat().st_size % 32 == 0
    assert reader.get_field("general.architecture").contents() == "llama"
    for pair in METADATA:
        field = reader.get_field(pair.key)
        assert field.contents() == pair.value, pair.key
        assert field.types == [pair.kind, *([] if pair.item_kind is None else [pair.item_kind])]


def test_read_back(tmp_path: Path) -> None:
    write_whole(tmp_path / "m.gguf")
    read = GgufTensors(tmp_path / "m.gguf")
    assert list(read.tensors) == [name for name, _, _ in TENSORS]
    for name, shape, kind in TENSORS:
        assert read.tensors[name].kind == kind and read.tensors[name].shape == shape
        data = stored()[name]
        assert read.stored(name).dtype == data.dtype and torch.equal(read.stored(name), data)
    assert read.values["tokenizer.ggml.tokens"] == ["a", "bc", "ü"]
    with pytest.raises(VerifyError, match="does not hold tensor 'nope'"):
        read.stored("nope")


@pytest.mark.parametrize("content", [b"", b"GGUF", b"not a file", b"GGUF" + b"\xff" * 40])
def test_an_unreadable_file_is_a_typed_error(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(content)
    with pytest.raises(VerifyError, match="cannot be read back"):
        GgufTensors(path)


def test_pieces_in_any_order_give_the_same_bytes(tmp_path: Path) -> None:
    write_whole(tmp_path / "a.gguf")
    data = stored()
    q = data["blk.0.attn_q.weight"]
    experts = data["blk.0.ffn_up_exps.weight"]
    pieces: list[tuple[str, torch.Tensor, dict[str, object]]] = [
        *(("blk.0.attn_q.weight", q[row : row + 2], {"first_row": row}) for row in (4, 0, 6, 2)),
        *(("blk.0.ffn_up_exps.weight", experts[i, :3], {"slot": i}) for i in range(3)),
        *(("blk.0.ffn_up_exps.weight", experts[i, 3:], {"slot": i, "first_row": 3}) for i in (2, 0, 1)),
        ("token_embd.weight", data["token_embd.weight"][2:], {"first_row": 2}),
        ("token_embd.weight", data["token_embd.weight"][:2], {}),
        *((name, data[name], {}) for name in ("norm.weight", "half.weight", "brain.weight")),
    ]
    order = torch.randperm(len(pieces), generator=torch.Generator().manual_seed(2)).tolist()
    with GgufFile(tmp_path / "b.gguf", "llama", METADATA, TENSORS) as file:
        for i in order:
            name, part, where = pieces[i]
            file.write(name, part, **where)  # type: ignore[arg-type]
        assert file.nbytes == (tmp_path / "a.gguf").stat().st_size
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()


def test_vectors_stacked_in_a_matrix(tmp_path: Path) -> None:
    """As StableLM 2 12B has a norm for every head: the slot is the row."""
    norms = torch.arange(12.0).view(3, 4)
    with GgufFile(tmp_path / "m.gguf", "stablelm", METADATA, [("blk.0.attn_q_norm.weight", (3, 4), "F32")]) as file:
        with pytest.raises(OutputError, match="exceed tensor"):
            file.write("blk.0.attn_q_norm.weight", norms[0], slot=3)
        for head in (2, 0, 1):
            file.write("blk.0.attn_q_norm.weight", norms[head], slot=head)
    assert torch.equal(GgufTensors(tmp_path / "m.gguf").stored("blk.0.attn_q_norm.weight"), norms)


def test_a_missing_piece_leaves_no_file(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="1 rows of tensor 'norm.weight' were not written"):
        with GgufFile(tmp_path / "m.gguf", "llama", METADATA, TENSORS) as file:
            for name, data in stored().items():
                if name != "norm.weight":
                    file.write(name, data)
    assert os.listdir(tmp_path) == []


def test_an_error_inside_leaves_an_older_file_alone(tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(b"old")
    with pytest.raises(RuntimeError):
        with GgufFile(tmp_path / "m.gguf", "llama", METADATA, TENSORS):
            raise RuntimeError
    assert os.listdir(tmp_path) == ["m.gguf"] and (tmp_path / "m.gguf").read_bytes() == b"old"


def test_wrong_pieces_are_typed_errors(tmp_path: Path) -> None:
    data = stored()
    q, experts = data["blk.0.attn_q.weight"], data["blk.0.ffn_up_exps.weight"]
    file = GgufFile(tmp_path / "m.gguf", "llama", METADATA, TENSORS)
    wrong: list[tuple[str, str, torch.Tensor, dict[str, object]]] = [
        ("has no tensor", "nope", q, {}),
        ("not torch.uint8", "blk.0.attn_q.weight", q.float(), {}),
        (r"not torch.uint8 \[..., 288\]", "blk.0.attn_q.weight", q[:, :-1], {}),
        ("not torch.float32", "norm.weight", data["norm.weight"].half(), {}),
        ("exceed tensor", "blk.0.attn_q.weight", q, {"first_row": 1}),
        ("exceed tensor", "blk.0.attn_q.weight", q[:1], {"first_row": -1}),
        ("is stacked", "blk.0.ffn_up_exps.weight", experts[0], {}),
        ("has 3 slots", "blk.0.ffn_up_exps.weight", experts[0], {"slot": 3}),
        ("exceed tensor", "blk.0.ffn_up_exps.weight", experts[0], {"slot": 0, "first_row": 1}),
    ]
    for problem, name, part, where in wrong:
        with pytest.raises(OutputError, match=problem):
            file.write(name, part, **where)  # type: ignore[arg-type]
    file.write("blk.0.attn_q.weight", q[:2], first_row=3)
    with pytest.raises(OutputError, match="written twice"):
        file.write("blk.0.attn_q.weight", q[:2], first_row=4)
    file.abort()
    file.abort()
    for late in (lambda: file.write("norm.weight", data["norm.weight"]), file.finish):
        with pytest.raises(OutputError, match="finished"):
            late()
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("tensors", "problem"),
    [
        ([("a", (3, 255), "Q4_K")], "do not divide"),
        ([("a", (3, 256), "Q8_K")], "no type"),
        ([("a", (3, 0), "F32")], "shape"),
        ([("a", (1, 1, 1, 1, 1), "F32")], "shape"),
        ([("a", (1,), "F32"), ("a", (1,), "F32")], "given twice"),
        ([("a" * 64, (1,), "F32")], "1 to 63 bytes"),
    ],
)
def test_what_a_file_cannot_hold(tmp_path: Path, tensors: list[tuple[str, tuple[int, ...], str]], problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        GgufFile(tmp_path / "m.gguf", "llama", [], tensors)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("value", "kind"), [(1 << 40, "uint32"), ([1 << 40], "int32"), (-1, "uint32"), ([], "string"), ([1, "a"], "int32")]
)
def test_values_that_do_not_fit_their_type(tmp_path: Path, value: object, kind: str) -> None:
    with pytest.raises(ConfigError, match="does not fit"):
        GgufFile(tmp_path / "m.gguf", "llama", [key_value("k", value, kind)], [])
    assert os.listdir(tmp_path) == []


def test_a_missing_folder_and_a_missing_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(OutputError, match="does not exist"):
        GgufFile(tmp_path / "no" / "m.gguf", "llama", [], [])
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(UnsupportedError, match=r"auto-round\[gguf\]"):
        GgufFile(tmp_path / "m.gguf", "llama", [], [])


def test_a_full_disk_names_file_and_tensor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(OutputError, match=r"'norm.weight' to .*m.gguf \(No space left on device\); free some space"):
        with GgufFile(tmp_path / "m.gguf", "llama", METADATA, TENSORS) as file:
            monkeypatch.setattr(os, "pwrite", full)
            file.write("norm.weight", stored()["norm.weight"])
    assert os.listdir(tmp_path) == []


def test_short_writes_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_whole(tmp_path / "a.gguf")
    real = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda handle, data, offset: real(handle, data[:5], offset))
    write_whole(tmp_path / "b.gguf")
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()


@pytest.mark.parametrize("finished", [False, True])
def test_a_file_in_two_runs(tmp_path: Path, finished: bool) -> None:
    """What the first run wrote after its records were taken is written again."""
    write_whole(tmp_path / "a.gguf")
    first = GgufFile(tmp_path / "b.gguf", "llama", METADATA, TENSORS)
    records = []
    for number, (name, data) in enumerate(stored().items()):
        if number < 4 or finished:
            first.write(name, data)
        if number < 3:
            records += first.take_records()
    if finished:
        first.finish()
    first.close()
    with GgufFile(tmp_path / "b.gguf", "llama", METADATA, TENSORS, records) as second:
        for name, data in [*stored().items()][3:]:
            second.write(name, data)
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()
    assert sorted(os.listdir(tmp_path)) == ["a.gguf", "b.gguf"]
    with pytest.raises(OutputError, match="written twice"):
        GgufFile(tmp_path / "b.gguf", "llama", METADATA, TENSORS, records).write("norm.weight", stored()["norm.weight"])


def test_damage_between_two_runs_is_found(tmp_path: Path) -> None:
    first = GgufFile(tmp_path / "m.gguf", "llama", METADATA, TENSORS)
    first.write("norm.weight", stored()["norm.weight"])
    first.close()
    records = first.take_records()
    path = tmp_path / ".m.gguf.partial"
    data = path.read_bytes()
    at = data.index(stored()["norm.weight"].numpy().tobytes())
    path.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
    with pytest.raises(OutputError, match="output of the interrupted run is damaged: .*m.gguf.*--overwrite"):
        GgufFile(tmp_path / "m.gguf", "llama", METADATA, TENSORS, records)
    assert path.exists()


@pytest.mark.skipif(os.name != "posix", reason="kills a process")
def test_a_killed_writer_leaves_no_file_under_its_name(tmp_path: Path) -> None:
    program = textwrap.dedent(
        """
        import os, signal, sys, torch
        from auto_round.output.gguf_writer import GgufFile
        file = GgufFile(sys.argv[1], "llama", [], [("a.weight", (2, 32), "F32")])
        file.write("a.weight", torch.ones(1, 32))
        os.kill(os.getpid(), signal.SIGKILL)
        """
    )
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path / "m.gguf")], cwd=ROOT, check=False)
    assert done.returncode == -signal.SIGKILL
    assert os.listdir(tmp_path) == [".m.gguf.partial"]
    with GgufFile(tmp_path / "m.gguf", "llama", [], [("a.weight", (2, 32), "F32")]) as file:
        file.write("a.weight", torch.ones(2, 32))
    assert os.listdir(tmp_path) == ["m.gguf"]
