"""Importance matrix files: what llama.cpp's own layout holds, in both forms, and files that are not sound."""

from __future__ import annotations

import struct
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from auto_round.calibration.imatrix import read_imatrix, write_imatrix
from auto_round.calibration.observers import SecondMomentObserver
from auto_round.errors import DataError, OutputError

SUMS = {"blk.0.attn_q.weight": torch.tensor([8.0, 0.0, 2.0]), "blk.0.ffn_up_exps.weight": torch.arange(6.0).view(2, 3)}
TOKENS: dict[str, int | torch.Tensor] = {"blk.0.attn_q.weight": 4, "blk.0.ffn_up_exps.weight": torch.tensor([3, 0])}


def packaged(path: Path, tensors: dict[str, np.ndarray], values: dict[str, object] | None = None) -> None:
    """A file as llama-imatrix writes it: no architecture, keys of its own, a pair of tensors a matrix."""
    writer = gguf.GGUFWriter(path, "x")
    writer.kv_data[0].clear()
    writer.add_type("imatrix")
    for key, value in (values or {}).items():
        if isinstance(value, list):
            writer.add_array(key, value)
        else:
            writer.add_uint32(key, value)  # type: ignore[arg-type]
    for name, data in tensors.items():
        writer.add_tensor(name, data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def legacy(entries: list[tuple[str, int, list[float]]], tail: bytes = b"") -> bytes:
    out = struct.pack("<i", len(entries))
    for name, calls, values in entries:
        raw = name.encode()
        out += struct.pack(f"<i{len(raw)}sii{len(values)}f", len(raw), raw, calls, len(values), *values)
    return out + tail


def f32(*values: float) -> np.ndarray:
    return np.array(values, dtype=np.float32)


def test_the_present_form(tmp_path: Path) -> None:
    path = tmp_path / "i.gguf"
    tensors = {
        "blk.0.attn_q.weight.in_sum2": f32(8, 0, 2).reshape(1, 3), "blk.0.attn_q.weight.counts": f32(4).reshape(1, 1),
        "blk.0.ffn_up_exps.weight.in_sum2": f32(6, 3, 9, 0, 0, 0).reshape(2, 3),
        "blk.0.ffn_up_exps.weight.counts": f32(3, 0).reshape(2, 1),
    }  # fmt: skip
    values = {"imatrix.datasets": ["a.txt", "b.txt"], "imatrix.chunk_count": 5, "imatrix.chunk_size": 512}
    packaged(path, tensors, values)
    found = read_imatrix(path)
    assert {name: value.tolist() for name, value in found.importance.items()} == {
        "blk.0.attn_q.weight": [2.0, 0.0, 0.5],
        # llama-quantize counts ones for an expert that saw nothing
        "blk.0.ffn_up_exps.weight": [[2.0, 1.0, 3.0], [1.0, 1.0, 1.0]],
    }
    shaped = found.of("blk.0.ffn_up_exps.weight", (2, 7, 3))
    assert shaped is not None and shaped.shape == (2, 3) and found.of("none", (7, 3)) is None
    with pytest.raises(DataError, match="another model"):
        found.of("blk.0.attn_q.weight", (7, 4))


def test_the_older_form(tmp_path: Path) -> None:
    path = tmp_path / "i.dat"
    entries = [("blk.0.attn_q.weight", 4, [8.0, 0.0, 2.0]), ("blk.0.ffn_up_exps.weight", 0, [1.0, 2.0, 3.0, 4.0])]
    path.write_bytes(legacy(entries, struct.pack("<ii5s", 7, 5, b"a.txt")))
    found = read_imatrix(path)
    assert found.importance["blk.0.attn_q.weight"].tolist() == [2.0, 0.0, 0.5]
    shaped = found.of("blk.0.ffn_up_exps.weight", (2, 9, 2))
    assert shaped is not None and shaped.tolist() == [[1.0, 2.0], [3.0, 4.0]]
    path.write_bytes(legacy(entries))
    assert read_imatrix(path).importance["blk.0.attn_q.weight"].tolist() == [2.0, 0.0, 0.5]


def test_what_is_written_is_what_the_package_and_we_read(tmp_path: Path) -> None:
    path = tmp_path / "i.gguf"
    write_imatrix(path, SUMS, TOKENS, 2)
    reader = gguf.GGUFReader(path)
    assert [(t.name, tuple(reversed(t.shape.tolist()))) for t in reader.tensors] == [
        ("blk.0.attn_q.weight.in_sum2", (1, 3)), ("blk.0.attn_q.weight.counts", (1, 1)),
        ("blk.0.ffn_up_exps.weight.in_sum2", (2, 3)), ("blk.0.ffn_up_exps.weight.counts", (2, 1)),
    ]  # fmt: skip
    assert reader.get_field("general.type").contents() == "imatrix"
    assert reader.get_field("imatrix.datasets").contents() == ["unknown"]
    assert [reader.get_field(f"imatrix.chunk_{what}").contents() for what in ("count", "size")] == [2, 2]
    found = read_imatrix(path)
    assert found.importance["blk.0.attn_q.weight"].tolist() == [2.0, 0.0, 0.5]
    assert found.importance["blk.0.ffn_up_exps.weight"].tolist() == [
        pytest.approx([0.0, 1 / 3, 2 / 3]), [1.0, 1.0, 1.0],
    ]  # fmt: skip


def test_our_moments_go_in_as_they_are(tmp_path: Path) -> None:
    moments = SecondMomentObserver()
    inputs = torch.randn(2, 5, 4)
    moments.add("blk.1.ffn_down.weight", inputs)
    write_imatrix(tmp_path / "i.gguf", moments, moments.tokens, 5)
    found = read_imatrix(tmp_path / "i.gguf")
    want = inputs.square().mean((0, 1))
    assert torch.allclose(found.importance["blk.1.ffn_down.weight"], want, rtol=1e-5)


def test_what_cannot_be_written(tmp_path: Path) -> None:
    path = tmp_path / "i.gguf"
    with pytest.raises(DataError, match="nothing to write"):
        write_imatrix(path, {}, {}, 2)
    with pytest.raises(DataError, match="not all finite"):
        write_imatrix(path, {"a": torch.tensor([float("nan")])}, {"a": 1}, 2)
    with pytest.raises(OutputError, match="does not exist"):
        write_imatrix(tmp_path / "no" / "i.gguf", SUMS, TOKENS, 2)
    assert list(tmp_path.iterdir()) == []


PAIR = {"a.in_sum2": f32(1, 2), "a.counts": f32(1)}


@pytest.mark.parametrize(
    ("tensors", "values", "problem"),
    [
        ({"a": f32(1)}, {}, "no tensor is called"),
        ({"a.in_sum2": f32(1)}, {}, "float32 sums and counts"),
        ({**PAIR, "b.counts": f32(1)}, {}, "counts without sums"),
        ({"a.in_sum2": f32(1, 2), "a.counts": np.ones(1, np.float16)}, {}, "float32 sums and counts"),
        ({"a.in_sum2": f32(1, 2, 3), "a.counts": f32(1, 1)}, {}, "do not match"),
        ({"a.in_sum2": f32(1, float("inf")), "a.counts": f32(1)}, {}, "not all finite"),
        ({"a.in_sum2": f32(1, -1), "a.counts": f32(1)}, {}, "not all finite"),
        ({"a.in_sum2": f32(1, 1), "a.counts": f32(float("nan"))}, {}, "not all finite"),
    ],
)
def test_unsound_files_of_the_present_form(
    tmp_path: Path, tensors: dict[str, np.ndarray], values: dict[str, object], problem: str
) -> None:
    packaged(tmp_path / "i.gguf", tensors, values)
    with pytest.raises(DataError, match=problem):
        read_imatrix(tmp_path / "i.gguf")


@pytest.mark.parametrize(
    "content",
    [
        b"", b"\1", struct.pack("<i", 0), struct.pack("<i", -1), struct.pack("<i", 1 << 30),
        struct.pack("<ii", 1, 1 << 30), struct.pack("<ii", 1, -4), struct.pack("<ii4siI", 1, 4, b"name", 1, 0xFFFFFFFF),
        struct.pack("<ii4sii", 1, 4, b"name", 1, 1 << 30), struct.pack("<ii4siif", 2, 4, b"name", 1, 1, 1.0),
        struct.pack("<ii2siif", 1, 2, b"\xff\xfe", 1, 1, 1.0), struct.pack("<ii1siif", 1, 1, b"n", 1, 1, float("nan")),
        legacy([("n", 1, [1.0])], b"\1\0"), legacy([("n", 1, [1.0])], struct.pack("<ii", 1, 99)),
        b"PK\3\4" + bytes(60), b"#!/bin/sh\n",
    ],
)  # fmt: skip
def test_unsound_files_of_the_older_form(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "i.dat"
    path.write_bytes(content)
    with pytest.raises(DataError, match="importance matrix"):
        read_imatrix(path)


def test_no_such_file(tmp_path: Path) -> None:
    for path in (tmp_path / "none", tmp_path):
        with pytest.raises(DataError, match="cannot read"):
            read_imatrix(path)


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_a_damaged_file_raises_nothing_else(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    path = tmp_path_factory.mktemp("damaged") / "i"
    if data.draw(st.booleans()):
        write_imatrix(path, SUMS, TOKENS, 2)
        raw = bytearray(path.read_bytes())
    else:
        raw = bytearray(legacy([("a", 2, [1.0, 2.0]), ("b", 1, [3.0])], struct.pack("<ii1s", 1, 1, b"x")))
    for _ in range(data.draw(st.integers(0, 4))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(raw[: data.draw(st.integers(0, len(raw)))])
    try:
        read_imatrix(path)
    except DataError:
        pass
