"""Memory use of this process: peaks of RAM and GPU memory, returning freed memory, sizes as text."""

from __future__ import annotations

import ctypes
import sys
from functools import lru_cache
from typing import Any

_TRIM_THRESHOLD = 128 << 20


def peak_rss_bytes() -> int:
    """Largest resident set of this process since it started, in bytes."""
    if sys.platform == "win32":
        import psutil

        return int(psutil.Process().memory_info().peak_wset)
    if sys.platform.startswith("linux"):
        # ru_maxrss survives exec: a small program started by a large one would report its parent's peak.
        try:
            with open("/proc/self/status", encoding="ascii", errors="replace") as file:
                for line in file:
                    if line.startswith("VmHWM:"):
                        return int(line.split()[1]) * 1024
        except OSError:
            pass
    import resource

    # Kilobytes on Linux, bytes on macOS.
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak) if sys.platform == "darwin" else int(peak) * 1024


def rss_bytes() -> int:
    """Resident set of this process now, in bytes."""
    import psutil

    return int(psutil.Process().memory_info().rss)


def trim_heap() -> None:
    """Give the memory of freed tensors back to the system, where the C library can (glibc).

    It keeps what it got for tensors below 32 MB, and the holes between those that live on add up over blocks.
    """
    trim = _malloc_trim()
    if trim is not None:
        trim(0)


class HeapTrimmer:
    """Memory of freed tensors, given back when much of it has gathered: what is used again soon is cheaper kept, as
    the system clears every page that it hands out.

    Args:
        gathered: how many bytes are much.
    """

    def __init__(self, threshold: int = _TRIM_THRESHOLD) -> None:
        self._threshold, self._rss_at_trim = threshold, rss_bytes()

    def trim_if_grown(self) -> None:
        """`trim_heap`, where the process has grown by as much since the last time."""
        if rss_bytes() - self._rss_at_trim > self._threshold:
            trim_heap()
            self._rss_at_trim = rss_bytes()


@lru_cache(maxsize=1)
def _malloc_trim() -> Any:
    if not sys.platform.startswith("linux"):
        return None
    try:
        return getattr(ctypes.CDLL(None), "malloc_trim", None)
    except OSError:
        return None


def peak_vram_bytes() -> int | None:
    """Most memory that tensors held on any one CUDA device since the start or `reset_peak_vram`, or None without one.

    A device that nothing has used yet is not touched.
    """
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available() or not torch.cuda.is_initialized():
        return None
    return max(int(torch.cuda.max_memory_allocated(i)) for i in range(torch.cuda.device_count()))


def reset_peak_vram() -> None:
    """Start measuring `peak_vram_bytes` anew."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized():
        for i in range(torch.cuda.device_count()):
            torch.cuda.reset_peak_memory_stats(i)


def format_bytes(count: float) -> str:
    """`1536` as "1.5 kB": powers of 1000, three digits."""
    size = float(count)
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if abs(size) < 999.5 or unit == "TB":
            break
        size /= 1000
    text = (
        f"{size:.0f}" if unit == "B" or abs(size) >= 99.95 else (f"{size:.1f}" if abs(size) >= 9.995 else f"{size:.2f}")
    )
    return f"{text} {unit}"


def format_seconds(seconds: float) -> str:
    """`3725` as "1:02:05", `65` as "1:05"."""
    whole = max(0, round(seconds))
    hours, rest = divmod(whole, 3600)
    minutes, left = divmod(rest, 60)
    return f"{hours}:{minutes:02d}:{left:02d}" if hours else f"{minutes}:{left:02d}"


def format_peak_memory() -> str:
    """Peak memory so far, as words: "RAM 1.21 GB" and, with a GPU in use, "GPU 3.40 GB"."""
    vram = peak_vram_bytes()
    return f"RAM {format_bytes(peak_rss_bytes())}" + (f", GPU {format_bytes(vram)}" if vram is not None else "")
