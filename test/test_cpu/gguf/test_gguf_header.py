"""The strict header reader: sound files as the `gguf` package writes them, and unsound ones of every kind."""

from __future__ import annotations

import struct
import tracemalloc
from pathlib import Path

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from auto_round.errors import DataError
from auto_round.gguf.reader import read_header


def text(value: str | bytes) -> bytes:
    raw = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(raw)) + raw


def value(key: str, kind: int, raw: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + raw


def info(name: str, shape: list[int], kind: int = 0, offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


def file_of(
    values: list[bytes] = [],  # noqa: B006
    infos: list[bytes] = [],  # noqa: B006
    data: bytes = b"",
    version: int = 3,
    value_count: int | None = None,
    info_count: int | None = None,
) -> bytes:
    counts = (len(infos) if info_count is None else info_count, len(values) if value_count is None else value_count)
    head = b"GGUF" + struct.pack("<IQQ", version, *counts) + b"".join(values) + b"".join(infos)
    return head + bytes(-len(head) % 32) + data


HUGE = struct.pack("<Q", 1 << 62)
UNSOUND = {
    "empty": b"",
    "magic": b"GGML" + bytes(40),
    "version": file_of(version=1),
    "big-endian": b"GGUF" + struct.pack(">IQQ", 3, 0, 0),
    "cut": file_of([value("k", 4, b"\1\0\0\0")])[:30],
    "values": file_of(value_count=1 << 62),
    "tensors": file_of(info_count=1 << 62),
    "long-key": file_of([HUGE]),
    "long-text": file_of([value("k", 8, HUGE)]),
    "unknown-value": file_of([value("k", 13, bytes(8))]),
    "nested-array": file_of([value("k", 9, struct.pack("<IQ", 9, 1) + struct.pack("<IQ", 9, 1) * 50)]),
    "long-array": file_of([value("k", 9, struct.pack("<IQ", 4, 1 << 61))]),
    "long-array-of-texts": file_of([value("k", 9, struct.pack("<IQ", 8, 1 << 40))]),
    "key-twice": file_of([value("k", 0, b"\0")] * 2),
    "no-utf8": file_of([value("k", 8, text(b"\xff\xfe"))]),
    "alignment": file_of([value("general.alignment", 4, struct.pack("<I", 24))]),
    "alignment-zero": file_of([value("general.alignment", 4, bytes(4))]),
    "alignment-text": file_of([value("general.alignment", 8, text("32"))]),
    "no-dimensions": file_of([], [info("a", [])]),
    "dimensions": file_of([], [info("a", [1] * 5)], bytes(32)),
    "type": file_of([], [info("a", [32], 99)], bytes(64)),
    "too-large": file_of([], [info("a", [1 << 40])], bytes(64)),
    "overflow": file_of([], [info("a", [1 << 62, 4])], bytes(64)),
    "outside": file_of([], [info("a", [8], 0, 64)], bytes(64)),
    "unaligned": file_of([], [info("a", [8], 0, 4)], bytes(64)),
    "blocks": file_of([], [info("a", [33], 8)], bytes(64)),
    "tensor-twice": file_of([], [info("a", [8])] * 2, bytes(32)),
}


@pytest.mark.parametrize("case", UNSOUND)
def test_unsound_files_are_typed_errors(tmp_path: Path, case: str) -> None:
    path = tmp_path / "f.gguf"
    path.write_bytes(UNSOUND[case])
    tracemalloc.start()
    try:
        with pytest.raises(DataError, match="no sound GGUF file"):
            read_header(path)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def test_no_such_file(tmp_path: Path) -> None:
    for path in (tmp_path / "none.gguf", tmp_path):
        with pytest.raises(DataError, match="cannot read"):
            read_header(path)


def sound(path: Path) -> None:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_uint8("a", 7)
    writer.add_int64("b", -5)
    writer.add_bool("c", True)
    writer.add_float64("d", 0.1)
    writer.add_string("e", "ü")
    writer.add_array("f", ["x", "", "yz"])
    writer.add_array("g", [1, -2])
    writer.add_tensor("one", np.arange(6, dtype=np.float32).reshape(2, 3))
    writer.add_tensor("two", np.zeros((4, 34), np.uint8), raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_file_of_the_package(tmp_path: Path) -> None:
    path = tmp_path / "f.gguf"
    sound(path)
    header = read_header(path)
    assert header.values == {
        "general.architecture": "llama", "a": 7, "b": -5, "c": True, "d": 0.1, "e": "ü", "f": ["x", "", "yz"],
        "g": [1, -2],
    }  # fmt: skip
    one, two = header.tensors["one"], header.tensors["two"]
    assert (one.shape, one.kind, one.nbytes) == ((2, 3), "F32", 24)
    assert (two.shape, two.kind, two.nbytes) == ((4, 32), "Q8_0", 136)
    reader = gguf.GGUFReader(path)
    assert [t.data_offset for t in reader.tensors] == [one.start, two.start]


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_a_damaged_file_raises_nothing_else(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    path = tmp_path_factory.mktemp("damaged") / "f.gguf"
    sound(path)
    raw = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(4, len(raw) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(raw[: data.draw(st.integers(4, len(raw)))])
    try:
        read_header(path)
    except DataError:
        pass
