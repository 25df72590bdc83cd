"""Compile the C files of this folder once for this machine, cache the library and load it.

The name of the cached file contains two hashes: of everything that the compiler's output depends on, and of the file
itself, so that a damaged library is compiled again.
"""

from __future__ import annotations

import contextlib
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
# No contraction to fused multiply-add, so that loops that must give equal results do.
_FLAGS = ("-O3", "-std=gnu11", "-fPIC", "-shared", "-fvisibility=hidden", "-ffp-contract=off")
NO_COMPILER = (
    "needs a C compiler: none of $CC, cc, gcc and clang was found; install one "
    "(apt install gcc, dnf install gcc, or conda install gcc)"
)


def find_compiler() -> list[str] | None:
    """The command of a C compiler: `CC` with its flags, else cc, gcc or clang; None when there is none."""
    for command in (shlex.split(os.environ.get("CC", "")), ["cc"], ["gcc"], ["clang"]):
        path = shutil.which(command[0]) if command else None
        if path:
            return [path, *command[1:]]
    return None


@functools.lru_cache(maxsize=8)
def load(*sources: Path) -> ctypes.CDLL | str:
    """The library compiled, in a few seconds, from `sources` (headers included), or the reason why there is none."""
    compiler = find_compiler()
    if compiler is None:
        return NO_COMPILER
    key = _key(sources, compiler)
    private = _private_folder()
    with contextlib.ExitStack() as stack:
        try:
            folder = private or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="auto_round_")))
            for path in folder.glob(f"{sources[0].stem}-{key}-*.so"):
                if path.stem.rpartition("-")[2] == _digest(path):
                    return ctypes.CDLL(str(path))
                logger.warning("%s is damaged; it is compiled again", path)
                path.unlink(missing_ok=True)
            built = _compile(sources, compiler, folder, key)
            return built if isinstance(built, str) else ctypes.CDLL(str(built))
        except OSError as error:
            return f"the library built by the C compiler {compiler[0]} cannot be loaded: {error}"


def _key(sources: tuple[Path, ...], compiler: list[str]) -> str:
    """A hash of the sources, the flags, the compiler, and of the processor as far as `-march=native` depends on it."""
    binary = os.stat(os.path.realpath(compiler[0]))
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        wanted = ("vendor_id", "cpu family", "model\t", "flags", "Features", "CPU part")
        processor = "\n".join(dict.fromkeys(line for line in lines if line.startswith(wanted)))
    except OSError:
        processor = platform.processor()
    parts = [*compiler, *_FLAGS, str(binary.st_size), str(binary.st_mtime_ns), platform.machine(), processor]
    text = b"\0".join(source.read_bytes() for source in sources)
    return hashlib.sha256("\0".join(parts).encode() + text).hexdigest()[:20]


def _private_folder() -> Path | None:
    """The cache folder; None when there is none that only the user can write to."""
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
    private = found.st_uid == os.getuid() and not found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    return folder if private and os.access(folder, os.W_OK) else None


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:20]


def _compile(sources: tuple[Path, ...], compiler: list[str], folder: Path, key: str) -> Path | str:
    """Compile the library into `folder`. Returns its path, or the reason of the failure."""
    native = "-march=native" if platform.machine().lower() in ("x86_64", "amd64") else "-mcpu=native"
    handle, name = tempfile.mkstemp(prefix=f"{sources[0].stem}-", suffix=".part", dir=folder)
    os.close(handle)
    output, problem = Path(name), ""
    files = [str(source) for source in sources if source.suffix != ".h"]
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
                return output.replace(folder / f"{sources[0].stem}-{key}-{_digest(output)}.so")
            lines = [line for line in done.stderr.splitlines() if "error" in line] or done.stderr.splitlines()
            problem = problem or (lines[0] if lines else f"exit status {done.returncode}")
    finally:
        output.unlink(missing_ok=True)
    return f"the C compiler {compiler[0]} failed: {problem}"
