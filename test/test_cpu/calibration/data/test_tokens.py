"""Documents to samples: what is cut, dropped, joined and masked."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from auto_round.calib_dataset import prepare_calibration
from auto_round.errors import ConfigError, DataError

TEXT = "the quick brown fox jumps over the lazy dog "


def load(data: Any, tokenizer: Any, seqlen: int = 16, nsamples: int = 4, seed: int = 0, **more: Any) -> list[Any]:
    return prepare_calibration(data, tokenizer, seqlen=seqlen, nsamples=nsamples, seed=seed, **more).samples


def test_long_is_cut_and_short_is_dropped(tokenizer: Any, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "auto_round"):
        samples = load([TEXT, "short", TEXT * 3], tokenizer)
    assert len(samples) == 2
    for sample in samples:
        assert sample["input_ids"].dtype == sample["attention_mask"].dtype == torch.int64
        assert sample["input_ids"].tolist() == tokenizer(TEXT)["input_ids"][:16]
        assert sample["attention_mask"].tolist() == [1] * 16
        assert "labels" not in sample
    assert [r.message for r in caplog.records] == [
        "calibrating with 2 samples, 4 were requested. 'the given data': 3 documents of 6 to 133 tokens, 2 kept, "
        "1 dropped as shorter than seqlen=16, 0 dropped as padding (one token repeated over more than half of it)"
    ]


def test_mostly_one_token_is_dropped(plain_tokenizer: Any) -> None:
    assert len(load(["abcdefgh" + "x" * 8, "abcdefg" + "x" * 9], plain_tokenizer)) == 1
    with pytest.raises(DataError, match="2 dropped as padding"):
        load(["x" * 40, "abc" + "x" * 40], plain_tokenizer)


def test_nothing_left_says_why_and_what_to_do(tokenizer: Any, tmp_path: Any) -> None:
    with pytest.raises(DataError, match=r"2 documents of 4 to 6 tokens.*2 dropped as shorter.*set seqlen<=6 or give"):
        load(["short", "abc"], tokenizer)
    (tmp_path / "d.txt").write_text("short\nabc\n")
    with pytest.raises(DataError, match=r"set seqlen<=6 or add ':concat=True'"):
        load(str(tmp_path / "d.txt"), tokenizer)
    with pytest.raises(DataError, match=r"set seqlen<=10 or give more text"):
        load(f"{tmp_path}/d.txt:concat=True", tokenizer)
    with pytest.raises(DataError, match="empty"):
        load([], tokenizer)


def test_very_long_text_gives_the_same_sample_as_its_beginning(tokenizer: Any) -> None:
    spaces = " " * 5000 + TEXT * 500
    assert load([TEXT * 2000], tokenizer)[0]["input_ids"].equal(load([TEXT], tokenizer)[0]["input_ids"])
    with pytest.raises(DataError, match="dropped as padding"):
        load([spaces], tokenizer)


def test_concat_loses_nothing_and_starts_each_sample_with_bos(tmp_path: Any, tokenizer: Any) -> None:
    (tmp_path / "d.txt").write_text("\n".join(f"line {i:03d}" for i in range(40)))
    samples = load(f"{tmp_path}/d.txt:concat=True", tokenizer, nsamples=100, seqlen=20)
    bos = tokenizer.bos_token_id
    stream: list[int] = []
    for sample in samples:
        ids = sample["input_ids"].tolist()
        assert len(ids) == 20 and ids[0] == bos
        stream += ids
    text = tokenizer.decode([t for t in stream if t != bos])
    lines = [text[i : i + 8] for i in range(0, len(text) - 7, 8)]
    assert len(set(lines)) == len(lines) >= 37
    assert set(lines) <= {f"line {i:03d}" for i in range(40)}
    # 40 lines of 8 bytes and 40 BOS; each sample of 20 tokens holds 19 or 20 tokens of that stream
    assert 360 // 20 <= len(samples) <= 360 // 19


def test_concat_without_special_tokens_is_one_stream(tmp_path: Any, plain_tokenizer: Any) -> None:
    (tmp_path / "d.txt").write_text("\n".join(f"{i:04d}" for i in range(50)))
    samples = load(f"{tmp_path}/d.txt:concat=True", plain_tokenizer, nsamples=100, seqlen=8)
    text = plain_tokenizer.decode(torch.cat([s["input_ids"] for s in samples]))
    assert len(samples) == 25
    assert sorted(text[i : i + 4] for i in range(0, 200, 4)) == [f"{i:04d}" for i in range(50)]


def test_same_seed_same_samples(tokenizer: Any) -> None:
    texts = [f"{i} {TEXT}" for i in range(50)]
    one, same, other = (load(texts, tokenizer, seed=s) for s in (3, 3, 4))
    assert all(a["input_ids"].equal(b["input_ids"]) for a, b in zip(one, same, strict=True))
    assert not all(a["input_ids"].equal(b["input_ids"]) for a, b in zip(one, other, strict=True))


def test_chat_template(tokenizer: Any, plain_tokenizer: Any, tmp_path: Any) -> None:
    (tmp_path / "d.jsonl").write_text(
        '{"messages": [{"role": "system", "content": "old"}, {"role": "user", "content": "Hello there"}]}'
    )
    samples = load(
        f"{tmp_path}/d.jsonl:apply_chat_template:system_prompt='Be: kind, ok'", tokenizer, seqlen=32, nsamples=1
    )
    assert tokenizer.decode(samples[0]["input_ids"]) == "<system>Be: kind, ok\n<user>Hello there\n<assistant>"[:32]
    plain = load(f"{tmp_path}/d.jsonl", tokenizer, seqlen=10, nsamples=1)
    assert tokenizer.decode(plain[0]["input_ids"]) == "<bos>old\nHello"
    with pytest.raises(DataError, match="no chat template"):
        load(f"{tmp_path}/d.jsonl:apply_chat_template", plain_tokenizer)


def test_system_prompt_does_not_leak_to_the_next_dataset(tokenizer: Any, tmp_path: Any) -> None:
    (tmp_path / "a.txt").write_text("first " * 20)
    (tmp_path / "b.txt").write_text("second " * 20)
    spec = f"{tmp_path}/a.txt:apply_chat_template:system_prompt=SECRET,{tmp_path}/b.txt:apply_chat_template"
    texts = sorted(tokenizer.decode(s["input_ids"]) for s in load(spec, tokenizer, seqlen=40, nsamples=2))
    assert texts[0].startswith("<system>SECRET\n<user>first")
    assert texts[1].startswith("<user>second") and "SECRET" not in texts[1]


def test_template_that_refuses_a_system_message(tokenizer: Any, tmp_path: Any) -> None:
    (tmp_path / "a.txt").write_text("first " * 20)
    tokenizer = type(tokenizer)(tokenizer_object=tokenizer.backend_tokenizer, pad_token="<pad>")
    tokenizer.chat_template = "{{ raise_exception('no system role') }}"
    with pytest.raises(DataError, match="rejects these messages .no system role"):
        load(f"{tmp_path}/a.txt:apply_chat_template", tokenizer)


IDS = [[i + j for j in range(20)] for i in range(3)]


@pytest.mark.parametrize(
    "data",
    [
        IDS,
        [torch.tensor(row) for row in IDS],
        [torch.tensor([row]) for row in IDS],
        torch.tensor(IDS),
        np.array(IDS),
        [{"input_ids": row} for row in IDS],
        [{"input_ids": torch.tensor([row]), "token_type_ids": torch.zeros(1, 20)} for row in IDS],
        {"input_ids": torch.tensor(IDS), "attention_mask": torch.ones(3, 20)[:, :].long()},
        [{"input_ids": IDS[:2]}, {"input_ids": IDS[2:]}],
        (torch.tensor([row]) for row in IDS),
        DataLoader(TensorDataset(torch.tensor(IDS)), batch_size=2),
        DataLoader(TensorDataset(torch.tensor(IDS), torch.ones(3, 20, dtype=torch.long)), batch_size=2),
        DataLoader([{"input_ids": torch.tensor(r)} for r in IDS], batch_size=3),  # type: ignore[arg-type]
        DataLoader([torch.tensor(r) for r in IDS], batch_size=1),  # type: ignore[arg-type]
    ],
    ids=lambda d: type(d).__name__,
)
def test_every_kind_of_ids(data: Any) -> None:
    samples = load(data, None, seqlen=10, nsamples=3)
    assert [s["input_ids"].tolist() for s in samples] == [row[:10] for row in IDS]
    assert all(s["attention_mask"].tolist() == [1] * 10 for s in samples)


def test_batch_encodings_of_the_guide(tokenizer: Any) -> None:
    text = "AutoRound is an advanced quantization algorithm for low-bits LLM inference" * 10
    tokens = [tokenizer(text, truncation=True, max_length=64, return_tensors="pt").data for _ in range(3)]
    encodings = [tokenizer(text, return_tensors="pt") for _ in range(3)]
    for data in (tokens, encodings, [text] * 3, DataLoader([text] * 3, batch_size=2), [{"text": text}] * 3):
        samples = load(data, tokenizer, seqlen=64, nsamples=3)
        assert [s["input_ids"].tolist() for s in samples] == [tokenizer(text)["input_ids"][:64]] * 3


def test_text_rows_with_other_columns_are_rows(tokenizer: Any) -> None:
    samples = load([{"text": TEXT, "tags": ["a", "b"]}, {"text": [TEXT, TEXT], "tags": ["a", "b"]}], tokenizer)
    assert len(samples) == 3


def test_ids_of_one_shorter_length_set_the_length(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "auto_round"):
        data = prepare_calibration(torch.tensor(IDS), None, seqlen=64, nsamples=3, seed=0)
    assert data.seqlen == 20 and [s["input_ids"].tolist() for s in data.samples] == IDS
    assert [r.message for r in caplog.records] == ["all given samples have 20 tokens; using seqlen=20 instead of 64"]
    with pytest.raises(DataError, match="3 documents of 19 to 20 tokens"):
        load([IDS[0], IDS[1][:19], IDS[2]], None, seqlen=64)


def test_given_masks_and_labels_are_kept() -> None:
    left = {
        "input_ids": [0] * 6 + list(range(1, 11)),
        "attention_mask": [0] * 6 + [1] * 10,
        "labels": [-100] * 8 + list(range(3, 11)),
    }
    sample = load([left], None, seqlen=16, nsamples=1)[0]
    assert sample["attention_mask"].tolist() == left["attention_mask"]
    assert sample["labels"].tolist() == left["labels"]
    cut = load([left], None, seqlen=12, nsamples=1)[0]  # leading padding is cut off first
    assert cut["input_ids"].tolist() == [0, 0] + list(range(1, 11))
    assert cut["attention_mask"].tolist() == [0, 0] + [1] * 10
    assert cut["labels"].tolist() == [-100] * 4 + list(range(3, 11))
    mixed = load([left, list(range(20, 36))], None, seqlen=16, nsamples=2)
    assert mixed[1]["labels"].tolist() == list(range(20, 36))


def test_padding_of_the_tokenizer_is_masked(tokenizer: Any) -> None:
    pad = tokenizer.pad_token_id
    ids = [pad] * 3 + [1, 2, 3, pad, 4, 5, 6, 7] + [pad] * 5
    sample = load([ids], tokenizer, seqlen=16, nsamples=1)[0]
    assert sample["attention_mask"].tolist() == [0] * 3 + [1] * 8 + [0] * 5
    meant = load([[pad] * 16], tokenizer, seqlen=16, nsamples=1)[0]  # nothing else in it: it is what the user gives
    assert meant["attention_mask"].tolist() == [1] * 16
    with pytest.raises(DataError, match="dropped as padding"):
        load([{"input_ids": [1] * 16, "attention_mask": [0] * 16}], tokenizer)


class OneToken:
    """A loader of batches of a single token, as quick checks give one."""

    batch_size = 1

    def __iter__(self) -> Any:
        for _ in range(2):
            yield torch.ones([1, 10], dtype=torch.long)


@pytest.mark.parametrize(
    "data",
    [
        OneToken(),
        [[7] * 10, [7] * 30],
        [torch.full((30,), 7), torch.full((1, 10), 7)],
        [{"input_ids": [7] * 10, "attention_mask": [1] * 10}] * 2,
        DataLoader(TensorDataset(torch.full((2, 12), 7)), batch_size=1),
        (x for x in [[3, 7, 7, 7, 7, 7, 7, 7, 7, 7], [7] * 10]),
        ([[7] * 10], [[7] * 10]),
    ],
    ids=lambda d: type(d).__name__,
)
def test_ids_are_used_as_they_are(data: Any, tokenizer: Any) -> None:
    """One token many times is padding in a text, not in ids that somebody made."""
    samples = load(data, tokenizer, seqlen=10, nsamples=2)
    assert len(samples) == 2
    assert all(s["input_ids"].shape == (10,) and s["attention_mask"].all() for s in samples)
    assert all(s["input_ids"][1:].unique().numel() == 1 for s in samples)


def test_only_the_shorter_ones_are_dropped(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "auto_round"):
        samples = load([[7] * 9, [5] * 10, list(range(40)), [1] * 3], None, seqlen=10, nsamples=4)
    assert [s["input_ids"].tolist() for s in samples] == [[5] * 10, list(range(10))]
    assert "2 dropped as shorter than seqlen=10" in caplog.text
    assert len(load([[5] * 10] * 9, None, seqlen=10, nsamples=4)) == 4


def test_labels_beside_ids_in_a_loader() -> None:
    labels = torch.tensor(IDS)
    labels[:, :4] = -100
    loader = DataLoader(TensorDataset(torch.tensor(IDS), labels), batch_size=2)
    samples = load(loader, None, seqlen=20, nsamples=9)
    assert [s["input_ids"].tolist() for s in samples] == IDS
    assert torch.equal(torch.stack([s["labels"] for s in samples]), labels)


def test_masked_positions_are_left_out_when_joined(tmp_path: Any) -> None:
    rows = ['{"input_ids": [1, 2, 3, 0, 0], "attention_mask": [1, 1, 1, 0, 0]}'] * 4
    (tmp_path / "d.jsonl").write_text("\n".join(rows))
    samples = load(f"{tmp_path}/d.jsonl:concat=True", None, seqlen=6, nsamples=2)
    assert [s["input_ids"].tolist() for s in samples] == [[1, 2, 3, 1, 2, 3]] * 2


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ([torch.rand(20)], "dtype torch.float32"),
        ([torch.zeros(1, 2, 20, dtype=torch.long)], "3 dimensions"),
        ([[1, -5, 3]], "token id -5"),
        ([{"input_ids": [1, 2, 3], "attention_mask": [1, 2, 1]}], "other than 0 and 1"),
        ([{"input_ids": [[1, 2]], "attention_mask": [[1, 1], [1, 1]]}], "different numbers of samples"),
        ([object()], "item 0 of the dataset is a object"),
        ([TEXT], "needs a tokenizer"),
    ],
)
def test_bad_samples(data: Any, words: str) -> None:
    with pytest.raises(DataError, match=words):
        load(data, None, seqlen=2)


def test_bad_arguments(tokenizer: Any) -> None:
    for bad in (3, b"x"):
        with pytest.raises(ConfigError, match=f"dataset is a {type(bad).__name__}"):
            load(bad, tokenizer)
    with pytest.raises(ConfigError, match="1 or more"):
        load([TEXT], tokenizer, seqlen=0)
    with pytest.raises(DataError, match="token id 256, and the model knows ids below 256"):
        load([TEXT] * 2, tokenizer, vocab_size=256)  # <bos> is 256


def test_length_of_the_model_limits_seqlen(tokenizer: Any, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "auto_round"):
        samples = load([TEXT] * 4, tokenizer, seqlen=64, model_max_length=32)
    assert samples[0]["input_ids"].shape == (32,)
    assert caplog.records[0].message == "seqlen=64 is more than the model's 32 positions; using 32"


def test_shuffling_loader_follows_the_seed_and_leaves_the_random_state(tokenizer: Any) -> None:
    loader = DataLoader(TensorDataset(torch.arange(2000).view(100, 20)), batch_size=4, shuffle=True)
    torch.manual_seed(5)
    state = torch.get_rng_state()
    one = load(loader, None, seqlen=20, nsamples=8, seed=1)
    assert torch.equal(state, torch.get_rng_state())
    torch.manual_seed(6)
    same = load(loader, None, seqlen=20, nsamples=8, seed=1)
    other = load(loader, None, seqlen=20, nsamples=8, seed=2)
    assert all(torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(one, same, strict=True))
    assert not all(torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(one, other, strict=True))


def test_reads_no_more_than_it_needs(tokenizer: Any) -> None:
    read = 0

    def endless() -> Any:
        nonlocal read
        while True:
            read += 1
            yield {"input_ids": list(range(read, read + 16))}

    assert len(load(endless(), None, nsamples=8)) == 8
    assert read <= 200
