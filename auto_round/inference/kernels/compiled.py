"""Compile the C files of this folder once for this machine, cache the library and load it.

The library is cached for later processes in a folder that only the user can write to. Its file name holds two
hashes: one of everything that decides what the compiler produces, and one of the file itself, so that a damaged
library is compiled again.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import stat
import subprocess
import tempfile
from pathlib import Path

from auto_round import envs
from auto_round.logger import logger

_SECONDS = 120
# No contraction to fused multiply-add: whether the compiler does it may differ between loops that must agree.
_FLAGS = ("-O3", "-std=gnu11", "-fPIC", "-shared", "-fvisibility=hidden", "-ffp-contract=off")
NO_COMPILER = (
    "needs a C compiler: none of $CC, cc, gcc and clang was found; install one "
    "(apt install gcc, dnf install gcc, or conda install gcc)"
)


def find_compiler() -> list[str] | None:
    """The command of a C compiler, None where there is none: `CC` with its own flags, or the first of the usual."""
    for command in (shlex.split(os.environ.get("CC", "")), ["cc"], ["gcc"], ["clang"]):
        path = shutil.which(command[0]) if command else None
        if path:
            return [path, *command[1:]]
    return None


@functools.lru_cache(maxsize=8)
def load(*sources: Path) -> ctypes.CDLL | str:
    """The library made of `sources`, headers among them, or the reason why there is none. Compiles for a few seconds
    when it is new.

    One result for a process: a compiler that is installed later is found by the next one.
    """
    compiler = find_compiler()
    if compiler is None:
        return NO_COMPILER
    key = _key(sources, compiler)
    folder = _private_folder()
    try:
        if folder is None:
            with tempfile.TemporaryDirectory(prefix="auto_round_") as there:
                built = _compile(sources, compiler, Path(there), key)
                return built if isinstance(built, str) else ctypes.CDLL(str(built))
        built = _find(folder, sources[0].stem, key) or _compile(sources, compiler, folder, key)
        return built if isinstance(built, str) else ctypes.CDLL(str(built))
    except OSError as error:
        return f"what the C compiler {compiler[0]} made cannot be loaded: {error}"


def _key(sources: tuple[Path, ...], compiler: list[str]) -> str:
    """Changes with the sources, the flags, the compiler and the processor."""
    there = os.stat(os.path.realpath(compiler[0]))
    parts = [*compiler, *_FLAGS, str(there.st_size), str(there.st_mtime_ns), platform.machine(), _processor()]
    text = b"\0".join(source.read_bytes() for source in sources)
    return hashlib.sha256("\0".join(parts).encode() + text).hexdigest()[:20]


def _processor() -> str:
    """What `-march=native` depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return platform.processor()
    wanted = ("vendor_id", "cpu family", "model\t", "flags", "Features", "CPU part")
    return "\n".join(dict.fromkeys(line for line in lines if line.startswith(wanted)))


def _private_folder() -> Path | None:
    """Where libraries are kept; None when there is no folder that is ours alone."""
    if envs.is_set("AR_WORK_SPACE"):
        folder = envs.work_space() / "kernels"
    else:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "auto_round" / "kernels"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = folder.stat()
    except (OSError, RuntimeError):
        return None
    if not hasattr(os, "getuid"):
        return folder
    ours = found.st_uid == os.getuid() and not found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    return folder if ours and os.access(folder, os.W_OK) else None


def _find(folder: Path, stem: str, key: str) -> Path | None:
    for path in folder.glob(f"{stem}-{key}-*.so"):
        if path.stem.rpartition("-")[2] == _digest(path):
            return path
        logger.warning("%s is damaged; it is compiled again", path)
        path.unlink(missing_ok=True)
    return None


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:20]


def _compile(sources: tuple[Path, ...], compiler: list[str], folder: Path, key: str) -> Path | str:
    """The finished library in `folder`, or why it could not be made."""
    native = "-march=native" if platform.machine().lower() in ("x86_64", "amd64") else "-mcpu=native"
    handle, name = tempfile.mkstemp(prefix=f"{sources[0].stem}-", suffix=".part", dir=folder)
    os.close(handle)
    made = Path(name)
    files = [str(source) for source in sources if source.suffix != ".h"]
    problem = ""
    try:
        for flags in ((native, *_FLAGS), _FLAGS):
            try:
                done = subprocess.run(
                    [*compiler, *flags, "-o", name, *files], capture_output=True, text=True, timeout=_SECONDS,
                    check=False, stdin=subprocess.DEVNULL,
                )  # fmt: skip
            except subprocess.TimeoutExpired:
                return f"the C compiler {compiler[0]} did not finish in {_SECONDS} s"
            if done.returncode == 0:
                final = folder / f"{sources[0].stem}-{key}-{_digest(made)}.so"
                made.replace(final)
                return final
            lines = [line for line in done.stderr.splitlines() if "error" in line] or done.stderr.splitlines()
            problem = problem or (lines[0] if lines else f"exit status {done.returncode}")
    finally:
        made.unlink(missing_ok=True)
    return f"the C compiler {compiler[0]} failed: {problem}"
