"""The disk is full at each call that writes: a typed error, nothing under a final name, and the same command works
when there is space again."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from full_disk import FullDisk

from auto_round import AutoRound
from auto_round.errors import OutputError

RTN: dict[str, Any] = {"iters": 0, "disable_opt_rtn": True}
KINDS: dict[str, tuple[str, str, dict[str, Any], dict[str, Any]]] = {
    # format, model, settings, saving
    "auto_round": ("auto_round", "packable_folder", RTN | {"group_size": 32}, {}),
    "shards": ("auto_round", "packable_folder", {"iters": 1, "group_size": 32}, {"max_shard_size": "100KB"}),
    "gguf": ("gguf:q4_0", "gguf_folder", RTN, {}),
    "two formats": ("auto_awq,fake", "packable_folder", RTN | {"group_size": 32, "sym": False}, {}),
    "model-free": ("auto_round", "packable_folder", {"model_free": True, "group_size": 32}, {}),
}


def files(folder: Path) -> dict[str, bytes]:
    """Everything with a final name but the report, which tells times."""
    found = (path for path in folder.rglob("*") if path.is_file())
    names = {path.relative_to(folder).as_posix(): path for path in found}
    return {
        name: path.read_bytes()
        for name, path in names.items()
        if not any(part.startswith(".") for part in name.split("/"))
    }


def without_reports(found: dict[str, bytes]) -> dict[str, bytes]:
    return {name: data for name, data in found.items() if not name.endswith("report.json")}


@pytest.mark.timeout(5400)
@pytest.mark.parametrize("kind", KINDS)
def test_at_each_write(
    kind: str, request: pytest.FixtureRequest, token_ids: Any, tmp_path: Path, record: Callable[..., None],
    full: bool, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    format, fixture, settings, saving = KINDS[kind]
    model = request.getfixturevalue(fixture)("llama")
    monkeypatch.setenv("AR_WORK_SPACE", str(tmp_path / "space"))

    def run(out: Path) -> None:
        data = {} if "model_free" in settings else {"dataset": token_ids, "seqlen": 24, "nsamples": 8}
        AutoRound(model, **data, **settings).quantize_and_save(out, format, **saving)

    with FullDisk(tmp_path) as counting:
        run(tmp_path / "whole")
    names = files(tmp_path / "whole")
    whole = without_reports(names)
    assert counting.calls > 10
    some = {*range(3, counting.calls, max(1, counting.calls // 4)), counting.calls - 1, counting.calls - 3}
    limits = range(counting.calls) if full else sorted(some)
    silent: list[str] = []
    for limit in limits:
        out = tmp_path / f"out-{limit}"
        place = counting.places[limit]
        try:
            with FullDisk(tmp_path, limit):
                run(out)
        except OutputError as error:
            if not str(error).strip() or "\n" in str(error):
                silent.append(f"{limit} {place}: {error}")
        else:  # what failed was not needed for the result, such as removing a journal
            if without_reports(files(out)) != whole:
                silent.append(f"{limit} {place}: no error, and another result")
            record(f"full disk, {kind}", 1, 0, 1, 0)
            continue
        shown = files(out) if out.exists() else {}
        for part in {Path(name).parent for name in shown if name.endswith(".gguf") or Path(name).name == "config.json"}:
            if {n for n in shown if Path(n).parent == part} != {n for n in names if Path(n).parent == part}:
                silent.append(f"{limit} {place}: {sorted(shown)} are shown")
        run(out)
        if without_reports(files(out)) != whole:
            silent.append(f"{limit} {place}: another result after there was space")
        record(f"full disk, {kind}", 1, 1, 1, 0)
    record(f"full disk, {kind}", 0, 0, 0, len(silent))
    assert not silent, "\n".join(silent)


def test_a_folder_that_cannot_be_written(
    packable_folder: Callable[..., str], token_ids: Any, tmp_path: Path, record: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Permissions do not stop the administrator, so the system's answer is put in its place."""
    import os

    out = tmp_path / "out"
    out.mkdir()
    real = os.access
    refuse = lambda path, mode, **kw: False if Path(path) == out and mode & os.W_OK else real(path, mode, **kw)  # noqa: E731
    with monkeypatch.context() as patch:
        patch.setattr(os, "access", refuse)
        with pytest.raises(OutputError, match="is not writable"):
            AutoRound(packable_folder("llama"), **RTN, group_size=32, dataset=token_ids).quantize_and_save(out)
    assert not any(out.iterdir())
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="is a file|cannot be made"):
        AutoRound(packable_folder("llama"), **RTN, group_size=32).quantize_and_save(tmp_path / "file")
    with pytest.raises(OutputError, match="cannot be made"):
        AutoRound(packable_folder("llama"), **RTN, group_size=32).quantize_and_save(tmp_path / "file" / "out")
    record("folders that cannot be written", 3, 3, 0, 0)
