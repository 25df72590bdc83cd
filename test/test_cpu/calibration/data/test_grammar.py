"""Dataset strings."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from auto_round.calibration.data.spec import DatasetSpec, parse_dataset_string
from auto_round.errors import ConfigError


def test_the_whole_grammar_at_once() -> None:
    text = (
        "./tmp.json,NeelNanda/pile-10k:num=256:split=train+test,"
        'mbpp:num=128:concat=True:apply_chat_template:system_prompt="You, are: a helpful assistant."'
    )
    assert parse_dataset_string(text) == [
        DatasetSpec("./tmp.json"),
        DatasetSpec("NeelNanda/pile-10k", num=256, splits=("train", "test")),
        DatasetSpec(
            "mbpp", num=128, concat=True, apply_chat_template=True, system_prompt="You, are: a helpful assistant."
        ),
    ]


def test_word_without_value_is_a_split() -> None:
    assert parse_dataset_string("NeelNanda/pile-10k:train") == [DatasetSpec("NeelNanda/pile-10k", splits=("train",))]
    assert parse_dataset_string("a/b:train+test:num=3")[0].splits == ("train", "test")
    assert parse_dataset_string("a/b:train_sft")[0].splits == ("train_sft",)


@pytest.mark.parametrize(
    ("text", "name"),
    [
        (r"C:\data\my.json", r"C:\data\my.json"),
        ("C:/data/my.json:num=2", "C:/data/my.json"),
        ("a.json,D:/x.json", "D:/x.json"),
        (r'"\\server\share\my, file.json":num=2', r"\\server\share\my, file.json"),
        ("../up/../my.v2/file.jsonl", "../up/../my.v2/file.jsonl"),
        ("'odd:name,with+all.txt':num=2", "odd:name,with+all.txt"),
        ("it's.txt", "it's.txt"),
        ("C:/it's/x.txt , ~/b.txt", "~/b.txt"),
        ("hf://org/name:num=1", "hf://org/name"),
    ],
)
def test_paths_keep_their_signs(text: str, name: str) -> None:
    specs = parse_dataset_string(text)
    assert specs[-1].name == name
    if "num=2" in text:
        assert specs[-1].num == 2


def test_system_prompt_belongs_to_one_dataset() -> None:
    first, second = parse_dataset_string("a/b:apply_chat_template:system_prompt='x=1: y',c/d:apply_chat_template")
    assert first.system_prompt == "x=1: y"
    assert second.system_prompt is None


def test_quotes_can_hold_quotes() -> None:
    spec = parse_dataset_string(r'a/b:apply_chat_template:system_prompt="Say \"hi\", it' + "'" + 's fine"')[0]
    assert spec.system_prompt == 'Say "hi", it\'s fine'


@pytest.mark.parametrize("word", ["True", "true", "1", "yes"])
def test_switches(word: str) -> None:
    assert parse_dataset_string(f"a/b:concat={word}")[0].concat is True
    assert parse_dataset_string("a/b:concat")[0].concat is True
    assert parse_dataset_string("a/b:concat=False")[0].concat is False
    assert parse_dataset_string("a/b")[0].concat is None


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "empty name"),
        ("a/b,,c/d", "empty name"),
        ("a/b:nums=3", "did you mean 'num'"),
        ("a/b:num=0", "1 or more"),
        ("a/b:num=many", "num=many"),
        ("a/b:num", "without a value"),
        ("a/b:concat=maybe", "concat=maybe"),
        ("a/b::num=3", "nothing between"),
        ("a/b:num=3:num=4", "twice"),
        ("a/b:split=train+", "empty split"),
        ('a/b:system_prompt="x', "not closed"),
        ("a/b:system_prompt=x", "apply_chat_template"),
    ],
)
def test_errors_say_what_is_wrong(text: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        parse_dataset_string(text)


NAMES = st.sampled_from(["org/set", "a-b.c/d_e", "./x.json", "C:/y.txt", "mbpp"])


@given(st.lists(st.tuples(NAMES, st.text(max_size=20)), min_size=1, max_size=4))
def test_quoted_values_come_back_as_they_were(pairs: list[tuple[str, str]]) -> None:
    pairs = [(n, v.replace("\\", "")) for n, v in pairs]
    quoted = [v.replace('"', '\\"') for _, v in pairs]
    text = ",".join(
        f'{name}:apply_chat_template:system_prompt="{value}":num=7'
        for (name, _), value in zip(pairs, quoted, strict=True)
    )
    specs = parse_dataset_string(text)
    assert [(s.name, s.system_prompt, s.num) for s in specs] == [(n, v, 7) for n, v in pairs]
