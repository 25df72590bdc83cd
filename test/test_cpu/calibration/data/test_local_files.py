"""Documents from json, jsonl, txt and parquet files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from auto_round.calib_dataset import prepare_calibration
from auto_round.calibration.data.documents import TokenDocument, documents_from_item
from auto_round.calibration.data.sources import looks_like_path, read_local, split_text
from auto_round.errors import DataError

CHAT = [{"role": "user", "content": "two plus two?"}, {"role": "assistant", "content": "four"}]


def documents(path: Path, seed: int = 0) -> list[Any]:
    return sorted(read_local(str(path), seed), key=str)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (["b", "a"], ["a", "b"]),
        ([{"text": "a"}, {"content": "b"}, {"code": "c", "id": 3}], ["a", "b", "c"]),
        ({"text": ["a", "b"], "id": [1, 2]}, ["a", "b"]),
        ([{"messages": CHAT}], [CHAT]),
        ([CHAT], [CHAT]),
        ({"messages": CHAT}, [CHAT]),
        ([{"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}],
         [[{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]]),
        ([{"instruction": "i", "input": "x", "output": "o"}],
         [[{"role": "user", "content": "i\nx"}, {"role": "assistant", "content": "o"}]]),
        ([{"input_ids": [1, 2], "attention_mask": [0, 1], "labels": [-100, 2]}],
         [TokenDocument([1, 2], [0, 1], [-100, 2])]),
        ({"input_ids": [[1, 2], [3]]}, [TokenDocument([1, 2]), TokenDocument([3])]),
        ([[1, 2], [3, 4]], [TokenDocument([1, 2]), TokenDocument([3, 4])]),
        ([{"text": None}, {"text": "a"}], ["", "a"]),
    ],
)  # fmt: skip
def test_json_shapes(tmp_path: Path, value: Any, expected: list[Any]) -> None:
    (tmp_path / "d.json").write_text(json.dumps(value))
    assert documents(tmp_path / "d.json") == expected


@pytest.mark.parametrize("ending", [".jsonl", ".json"])
def test_json_lines_under_either_ending(tmp_path: Path, ending: str) -> None:
    rows = [{"text": f"line {i} ünï"} for i in range(20)]
    path = tmp_path / f"d{ending}"
    path.write_text("\n\n".join(json.dumps(r, ensure_ascii=False) for r in rows) + "\n", encoding="utf-8")
    assert documents(path) == sorted(r["text"] for r in rows)


def test_order_depends_on_the_seed_only(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    path.write_text("\n".join(json.dumps(str(i)) for i in range(50)))
    one, same, other = (list(read_local(str(path), seed)) for seed in (1, 1, 2))
    assert one == same and one != other and sorted(one) == sorted(other)


def test_jsonl_parses_only_what_is_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    path.write_text("\n".join(['"good"'] * 50 + ["{broken"]))
    stream = read_local(str(path), 0)
    assert [next(stream) for _ in range(5)] == ["good"] * 5
    with pytest.raises(DataError, match="line 51 of .*not valid JSON"):
        list(stream)


def test_txt_documents() -> None:
    assert split_text("a\n\nb\n\n\nc\nd\n\n\n\ne\n") == ["a\n\nb", "c\nd", "e"]
    assert split_text("a\nb\r\n\r\nc\n") == ["a\nb", "c"]
    assert split_text("a\nb\n") == ["a", "b"]


def test_parquet(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    table = pyarrow.table({"text": [f"row {i}" for i in range(10)], "n": list(range(10))})
    parquet.write_table(table, tmp_path / "d.parquet", row_group_size=3)
    assert documents(tmp_path / "d.parquet") == sorted(f"row {i}" for i in range(10))
    (tmp_path / "bad.parquet").write_bytes(b"not parquet at all")
    with pytest.raises(DataError, match="not a parquet file"):
        documents(tmp_path / "bad.parquet")


def test_folder_of_files(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("from a")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "b.json").write_text('["from b"]')
    (tmp_path / "notes.md").write_text("not data")
    assert documents(tmp_path) == ["from a", "from b"]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("d.json", "[1, 2", "line 1, column"),
        ("d.json", "3", "has a int"),
        ("d.json", '[{"title": "x"}]', r"keys \['title'\]"),
        ("d.json", '{"text": ["a"], "id": [1, 2]}', "different lengths"),
        ("d.json", '[{"input_ids": [1, 2], "attention_mask": [1]}]', "2 input_ids but 1"),
        ("d.json", '[{"messages": [{"who": "me"}]}]', "not a conversation"),
        ("d.csv", "a,b", "suffix '.csv'"),
    ],
)
def test_damaged_files(tmp_path: Path, name: str, content: str, words: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=words):
        documents(tmp_path / name)


def test_missing_file_names_its_neighbour(tmp_path: Path) -> None:
    (tmp_path / "calib.json").write_text("[]")
    with pytest.raises(DataError, match="does not exist; did you mean 'calib.json'"):
        documents(tmp_path / "calb.json")
    (tmp_path / "latin.txt").write_bytes("é".encode("latin-1"))
    with pytest.raises(DataError, match="not UTF-8"):
        documents(tmp_path / "latin.txt")


def test_names_and_paths_are_told_apart() -> None:
    assert looks_like_path("./x") and looks_like_path("x.json") and looks_like_path(r"C:\x\y")
    assert not looks_like_path("NeelNanda/pile-10k") and not looks_like_path("mbpp")


def test_conversation_parts_and_errors_name_the_row() -> None:
    parts = {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "image"}]}]}
    assert list(documents_from_item(parts, "row")) == [[{"role": "user", "content": "a"}]]
    with pytest.raises(DataError, match="row 7 is a float"):
        list(documents_from_item(0.5, "row 7"))


def test_file_to_samples(tmp_path: Path, tokenizer: Any) -> None:
    (tmp_path / "d.json").write_text(json.dumps(["abc" * 30, "abd" * 30, "short"]))
    samples = prepare_calibration(str(tmp_path / "d.json"), tokenizer, seqlen=64, nsamples=2, seed=0).samples
    texts = {tokenizer.decode(s["input_ids"], skip_special_tokens=True) for s in samples}
    assert texts == {("abc" * 30)[:63], ("abd" * 30)[:63]}


def test_json_with_input_ids_needs_no_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "d.json").write_text(json.dumps([{"input_ids": list(range(20))}, {"input_ids": list(range(9))}]))
    samples = prepare_calibration(str(tmp_path / "d.json"), None, seqlen=10, nsamples=1, seed=0).samples
    assert samples[0]["input_ids"].tolist() == list(range(10))
