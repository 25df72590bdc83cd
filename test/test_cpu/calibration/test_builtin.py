"""The packaged text, the default set, registered names and hub sets (the hub itself is replaced)."""

from __future__ import annotations

import hashlib
import json
import logging
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from auto_round.calib_dataset import (
    DATASETS,
    available_datasets,
    prepare_calibration,
    register_dataset,
)
from auto_round.calibration.data import sources as hub_access
from auto_round.calibration.data.sources import builtin_documents
from auto_round.errors import ConfigError, DataError

SOURCES = Path(__file__).parents[3] / "auto_round" / "calibration" / "data" / "SOURCES.md"


@pytest.fixture
def no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub_access, "hub_problem", lambda: "no network in this test")
    monkeypatch.setattr(hub_access, "_cached_stream", lambda path, config, split: None)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """`datasets.load_dataset` serves rows of its own; the list gets the arguments of each call."""
    datasets = pytest.importorskip("datasets")
    calls: list[Any] = []

    def load_dataset(path: str, config: Any = None, *, split: str, streaming: bool, data_files: Any = None) -> Any:
        calls.append((path, config, split, data_files))
        assert streaming

        def rows() -> Iterator[dict[str, Any]]:
            for i in range(200):
                text = f"{split} {i} " + "some words of it " * 5
                yield {"text": text, "content": text, "code": text, "messages": [{"role": "user", "content": text}]}

        return datasets.IterableDataset.from_generator(rows)

    monkeypatch.setattr(hub_access, "hub_problem", lambda: "")
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return calls


@pytest.fixture
def registry() -> Iterator[None]:
    before = dict(DATASETS)
    yield
    DATASETS.clear()
    DATASETS.update(before)


def test_text_is_the_one_whose_sources_are_named() -> None:
    documents = builtin_documents()
    text = "\n\n\n".join(documents) + "\n"
    assert hashlib.sha256(text.encode()).hexdigest() in SOURCES.read_text(encoding="utf-8")
    assert len(documents) == 246 and 1_200_000 < len(text.encode()) < 1_400_000
    assert not [d for d in documents if any(w in d.lower() for w in ("postgres", "pg_", "psql", "libpq"))]


def test_there_is_enough_for_the_default_job(tokenizer: Any) -> None:
    # A tokenizer with a large vocabulary makes one token of 4.6 bytes of such text.
    assert sum(len(d.encode()) for d in builtin_documents()) / 4.6 > 128 * 2048
    data = prepare_calibration("builtin", tokenizer, seqlen=2048, nsamples=128, seed=42)
    assert len(data.samples) == 128 and data.sources == (("builtin", 128),)
    assert all(s["input_ids"].shape == (2048,) for s in data.samples)
    assert len({tuple(s["input_ids"].tolist()) for s in data.samples}) == 128


def test_builtin_depends_on_the_seed(tokenizer: Any) -> None:
    one, same, other = (
        prepare_calibration("builtin", tokenizer, seqlen=64, nsamples=4, seed=s).samples for s in (1, 1, 2)
    )
    assert all(a["input_ids"].equal(b["input_ids"]) for a, b in zip(one, same, strict=True))
    assert not any(a["input_ids"].equal(b["input_ids"]) for a, b in zip(one, other, strict=True))
    with pytest.raises(DataError, match="no split 'test'"):
        prepare_calibration("builtin:test", tokenizer, seqlen=64, nsamples=4, seed=0)


@pytest.mark.parametrize("dataset", [None, "NeelNanda/pile-10k"])
@pytest.mark.usefixtures("no_hub")
def test_default_falls_back_with_one_line(dataset: Any, tokenizer: Any, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "auto_round"):
        data = prepare_calibration(dataset, tokenizer, seqlen=64, nsamples=4, seed=0)
    assert data.sources == (("builtin", 4),)
    assert [r.message for r in caplog.records] == [
        "the default calibration set NeelNanda/pile-10k cannot be used (no network in this test); "
        "calibrating with the packaged text (builtin)"
    ]


@pytest.mark.parametrize("dataset", ["mbpp", "NeelNanda/pile-10k:num=4", "org/unheard-of", "builtin,BAAI/CCI3-HQ"])
@pytest.mark.usefixtures("no_hub")
def test_a_named_set_is_never_replaced(dataset: str, tokenizer: Any) -> None:
    with pytest.raises(DataError, match="cannot be reached .no network in this test.; check the network.*builtin"):
        prepare_calibration(dataset, tokenizer, seqlen=64, nsamples=4, seed=0)


def test_dead_network_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub_access, "HUB_TIMEOUT_S", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as silent:  # takes the connection, says nothing
        endpoint = f"http://127.0.0.1:{silent.getsockname()[1]}"
        monkeypatch.setattr(constants, "ENDPOINT", endpoint)
        assert f"no answer from {endpoint}" in hub_access.hub_problem()
    monkeypatch.setattr(constants, "ENDPOINT", endpoint + "/closed")
    assert f"no answer from {endpoint}/closed" in hub_access.hub_problem()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert hub_access.hub_problem() == "HF_HUB_OFFLINE is set"


def test_a_cached_copy_serves_without_a_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tokenizer: Any) -> None:
    constants = pytest.importorskip("huggingface_hub.constants")
    pytest.importorskip("datasets")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(hub_access, "hub_problem", lambda: "no network in this test")
    snapshot = tmp_path / "datasets--org--notes" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (tmp_path / "datasets--org--notes" / "refs").mkdir()
    (tmp_path / "datasets--org--notes" / "refs" / "main").write_text("abc")
    rows = [json.dumps({"text": f"note {i} with some more words in it"}) for i in range(20)]
    (snapshot / "train.jsonl").write_text("\n".join(rows))
    data = prepare_calibration("org/notes", tokenizer, seqlen=16, nsamples=5, seed=0)
    assert data.sources == (("org/notes", 5),)
    assert tokenizer.decode(data.samples[0]["input_ids"]).startswith("<bos>note ")


@pytest.mark.parametrize(
    ("dataset", "call"),
    [
        (None, [("NeelNanda/pile-10k", None, "train", None)]),
        ("HuggingFaceH4/ultrachat_200k", [("HuggingFaceH4/ultrachat_200k", None, "train_sft", None)]),
        ("openbmb/Ultra-FineWeb:zh+en", [("openbmb/Ultra-FineWeb", None, s, None) for s in ("zh", "en")]),
        ("mbpp:test", [("google-research-datasets/mbpp", "full", "test", None)]),
        ("opencode-instruct", [("nvidia/OpenCodeInstruct", None, "train", None)]),
        ("madao33/new-title-chinese", [("madao33/new-title-chinese", None, "train", None)]),
        (
            "codeparrot/github-code-clean",
            [("parquet", None, "train", {"train": "hf://datasets/codeparrot/github-code-clean/data/*.parquet"})],
        ),
        ("org/other:validation", [("org/other", None, "validation", None)]),
    ],
)
def test_hub_sets_are_streamed(dataset: Any, call: Any, hub: list[Any], tokenizer: Any) -> None:
    args: dict[str, Any] = {"seqlen": 32, "nsamples": 6}
    one, same = (prepare_calibration(dataset, tokenizer, seed=1, **args).samples for _ in range(2))
    assert hub == call * 2
    assert len(one) == 6
    assert all(a["input_ids"].equal(b["input_ids"]) for a, b in zip(one, same, strict=True))
    assert not all(
        a["input_ids"].equal(b["input_ids"])
        for a, b in zip(one, prepare_calibration(dataset, tokenizer, seed=2, **args).samples, strict=True)
    )


def test_hub_errors_say_what_to_do(hub: list[Any], tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def missing(*args: Any, **kwargs: Any) -> Any:
        raise datasets.exceptions.DatasetNotFoundError("Dataset 'org/x' doesn't exist on the Hub")

    monkeypatch.setattr(datasets, "load_dataset", missing)
    with pytest.raises(DataError, match="the hub has no dataset 'org/x'.*check the name"):
        prepare_calibration("org/x", tokenizer, seqlen=32, nsamples=2, seed=0)

    def broken(*args: Any, **kwargs: Any) -> Any:
        def rows() -> Iterator[Any]:
            yield {"text": "x"}
            raise TimeoutError("read timed out")

        return datasets.IterableDataset.from_generator(rows)

    monkeypatch.setattr(datasets, "load_dataset", broken)
    with pytest.raises(DataError, match="cannot be reached .read timed out"):
        prepare_calibration("org/x", tokenizer, seqlen=32, nsamples=2, seed=0)
    assert prepare_calibration(None, tokenizer, seqlen=32, nsamples=2, seed=0).samples


def test_modelscope_takes_over_the_default(monkeypatch: pytest.MonkeyPatch, tokenizer: Any, caplog: Any) -> None:
    monkeypatch.setattr(hub_access, "_hub_answers", {})
    pytest.importorskip("datasets")
    monkeypatch.setitem(__import__("sys").modules, "modelscope.msdatasets", None)
    switches: tuple[dict[str, Any], ...] = ({"platform": "model_scope"}, {})
    for switch in switches:
        monkeypatch.setenv("AR_USE_MODELSCOPE", "0" if switch else "1")
        caplog.clear()
        prepare_calibration(None, tokenizer, seqlen=64, nsamples=2, seed=0, **switch)
        assert "swift/pile-val-backup cannot be used (ModelScope needs" in caplog.text


def test_unknown_names_suggest_known_ones(tokenizer: Any) -> None:
    with pytest.raises(DataError, match="'bultin' is not known; did you mean 'builtin'"):
        prepare_calibration("bultin", tokenizer, seqlen=64, nsamples=4, seed=0)
    with pytest.raises(DataError, match="'a/b/c' is not known"):
        prepare_calibration("builtin,a/b/c", tokenizer, seqlen=64, nsamples=4, seed=0)
    with pytest.raises(ConfigError, match="local file and has no splits"):
        prepare_calibration("./x.json:train", tokenizer, seqlen=64, nsamples=4, seed=0)


@pytest.mark.usefixtures("registry")
def test_a_user_can_register_a_dataset(tokenizer: Any) -> None:
    seen: dict[str, Any] = {}

    @register_dataset(["team/notes", "notes"], description="notes of the team")
    def notes(tokenizer: Any, seqlen: int, dataset_name: str, split: str | None, seed: int, extra: int = 3) -> Any:
        seen.update(seqlen=seqlen, dataset_name=dataset_name, split=split, seed=seed, extra=extra)
        yield "a plain text that is long enough"
        yield {"text": "a row with text that is long enough"}
        yield [{"role": "user", "content": "a conversation that is long enough"}]
        yield {"input_ids": list(range(40))}
        yield tokenizer("a text that somebody has tokenized", return_tensors="pt")

    samples = prepare_calibration("team/notes:train+dev", tokenizer, seqlen=16, nsamples=5, seed=9).samples
    assert seen == {"seqlen": 16, "dataset_name": "team/notes", "split": "train+dev", "seed": 9, "extra": 3}
    assert [tokenizer.decode(s["input_ids"])[:12] for s in samples[:3]] == [
        "<bos>a plain",
        "<bos>a row w",
        "<bos>a conve",
    ]
    assert samples[3]["input_ids"].tolist() == list(range(16)) and len(samples) == 5
    assert ("notes", "notes of the team", "registered by this program") in available_datasets()


@pytest.mark.usefixtures("registry")
def test_a_dataset_that_renders_its_own_template(tokenizer: Any) -> None:
    @register_dataset("mine", concat=True)
    def mine(apply_chat_template: bool, system_prompt: str | None) -> list[str]:
        """Reads mine."""
        return [f"[{apply_chat_template} {system_prompt}]"] * 20

    data = prepare_calibration("mine:apply_chat_template:system_prompt=hi", tokenizer, seqlen=16, nsamples=1, seed=0)
    assert "[True hi]" in tokenizer.decode(data.samples[0]["input_ids"])
    assert ("mine", "Reads mine.", "registered by this program") in available_datasets()


def test_bad_registrations() -> None:
    with pytest.raises(ConfigError, match="one of , : +"):
        register_dataset("a:b")
    with pytest.raises(ConfigError, match="give a name"):
        register_dataset([])
    with pytest.raises(ConfigError, match="needs 'path'"):

        @register_dataset("x")
        def _x(path: str) -> list[str]:
            return []


def test_every_name_of_the_guide_is_listed() -> None:
    names = {row[0] for row in available_datasets()}
    assert names >= {
        "NeelNanda/pile-10k", "swift/pile-val-backup", "BAAI/CCI3-HQ", "codeparrot/github-code-clean", "mbpp",
        "builtin", "HuggingFaceH4/ultrachat_200k", "madao33/new-title-chinese", "openbmb/Ultra-FineWeb",
        "opencode-instruct",
    }  # fmt: skip
    assert all(description and where for _, description, where in available_datasets())
