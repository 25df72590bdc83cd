"""Compiling at first use: kept for later processes, compiled again when damaged, and a plain reason without it."""

from __future__ import annotations

import ctypes
import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from integer_weights import int_format

from auto_round.inference.kernels import LayerSpec
from auto_round.inference.kernels import cpu as compiled
from auto_round.inference.kernels.cpu import CpuKernel
from auto_round.inference.kernels.cpu import library as cpu_library
from auto_round.inference.table import choose_backend

SOURCE = '__attribute__((visibility("default"))) int shown(void) { return %d; }\n'


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("AR_WORK_SPACE", str(tmp_path / "work"))
    compiled.load.cache_clear()
    path = tmp_path / "small.c"
    path.write_text(SOURCE % 42, encoding="utf-8")
    yield path
    compiled.load.cache_clear()


def kept(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "work" / "kernels").iterdir())


def answer(source: Path) -> int:
    compiled.load.cache_clear()
    found = compiled.load(source)
    assert isinstance(found, ctypes.CDLL), found
    return int(found.shown())


def test_compiled_once_and_again_when_the_source_changes(source: Path, tmp_path: Path) -> None:
    assert answer(source) == 42
    (first,) = kept(tmp_path)
    time = first.stat().st_mtime_ns
    assert answer(source) == 42 and kept(tmp_path) == [first] and first.stat().st_mtime_ns == time
    assert not first.parent.stat().st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    source.write_text(SOURCE % 43, encoding="utf-8")
    assert answer(source) == 43 and len(kept(tmp_path)) == 2


def test_several_files(source: Path, tmp_path: Path) -> None:
    header, other = tmp_path / "common.h", tmp_path / "other.c"
    header.write_text("extern int number; static inline int twice(int n) { return 2 * n; }\n")
    other.write_text("int number = 21;\n")
    source.write_text('#include "common.h"\n' + SOURCE.replace("%d", "twice(number)"), encoding="utf-8")

    def found() -> int:
        compiled.load.cache_clear()
        library = compiled.load(source, other, header)
        assert isinstance(library, ctypes.CDLL), library
        return int(library.shown())

    assert found() == 42 and found() == 42 and len(kept(tmp_path)) == 1
    header.write_text(header.read_text().replace("2 * n", "3 * n"))
    assert found() == 63 and len(kept(tmp_path)) == 2


@pytest.mark.parametrize("damage", ["cut", "changed", "empty"])
def test_a_damaged_file_is_compiled_again(source: Path, tmp_path: Path, damage: str) -> None:
    found = compiled._compile(
        (source,), compiled.find_compiler() or [], tmp_path, compiled._key((source,), ["/bin/sh"])
    )
    assert isinstance(found, Path)
    whole = found.read_bytes()
    compiler = compiled.find_compiler()
    assert compiler is not None
    folder = tmp_path / "work" / "kernels"
    folder.mkdir(parents=True, mode=0o700)
    wrong = folder / f"small-{compiled._key((source,), compiler)}-{found.stem.rpartition('-')[2]}.so"
    wrong.write_bytes(
        {"cut": whole[: len(whole) // 2], "changed": whole[:-9] + b"x" + whole[-8:], "empty": b""}[damage]
    )
    assert answer(source) == 42
    (there,) = kept(tmp_path)
    assert there.stem.rpartition("-")[2] == compiled._digest(there)


def test_without_a_compiler_the_reason_says_what_to_install(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CC", raising=False)
    compiled.load.cache_clear()
    reason = compiled.load(source)
    assert isinstance(reason, str) and "apt install gcc" in reason


def test_the_kernel_gives_that_reason(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CC", raising=False)
    cpu_library.cache_clear()
    spec = LayerSpec(4, 32, True, 64, 64, torch.float32, "cpu")
    try:
        assert "apt install gcc" in str(CpuKernel.unsupported_reason(spec))
        choice = choose_backend(int_format(4, 32, True, "gptq"), "cpu", "auto", spec)
        assert choice.backend.name != "auto_round:cpu"
        assert any("auto_round:cpu: needs a C compiler" in reason for reason in choice.rejected)
    finally:
        cpu_library.cache_clear()


def test_the_named_compiler_comes_first_with_its_flags(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    own = tmp_path / "mycc"
    own.write_text("#!/bin/sh\nexit 1\n", encoding="utf-8")
    own.chmod(0o755)
    monkeypatch.setenv("CC", f"{own} -pipe")
    assert compiled.find_compiler() == [str(own), "-pipe"]
    monkeypatch.setenv("CC", "no-such-compiler")
    assert compiled.find_compiler() != ["no-such-compiler"]


def test_what_does_not_compile_says_so(source: Path, tmp_path: Path) -> None:
    source.write_text("this is no C\n", encoding="utf-8")
    reason = compiled.load(source)
    assert isinstance(reason, str) and "failed" in reason and "error" in reason
    assert kept(tmp_path) == []


@pytest.mark.skipif(os.name != "posix" or os.getuid() != 0, reason="needs two users")
def test_a_folder_that_others_can_write_to_is_not_used(source: Path, tmp_path: Path) -> None:
    folder = tmp_path / "work" / "kernels"
    folder.mkdir(parents=True)
    folder.chmod(0o777)
    assert answer(source) == 42 and kept(tmp_path) == []
    folder.chmod(0o755)
    os.chown(folder, 12345, 12345)
    assert answer(source) == 42 and kept(tmp_path) == []
