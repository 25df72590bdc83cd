"""Memory use of this process: peaks of RAM and GPU memory, trimming of the heap, sizes and times as text."""

from __future__ import annotations

import ctypes
import sys
from contextlib import suppress


def peak_rss_bytes() -> int:
    """Largest resident set of this process since it started, in bytes."""
    if sys.platform == "win32":
        import psutil

        return int(psutil.Process().memory_info().peak_wset)
    if sys.platform.startswith("linux"):
        # ru_maxrss survives exec: a small program started by a large one would report its parent's peak.
        with suppress(OSError), open("/proc/self/status", encoding="ascii", errors="replace") as file:
            for line in file:
                if line.startswith("VmHWM:"):
                    return int(line.split()[1]) * 1024
    import resource

    # Kilobytes on Linux, bytes on macOS.
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak) if sys.platform == "darwin" else int(peak) * 1024


def rss_bytes() -> int:
    """Resident set of this process now, in bytes."""
    import psutil

    return int(psutil.Process().memory_info().rss)


def trim_heap() -> None:
    """Return the memory of freed tensors to the operating system, if the C library supports it (glibc)."""
    if sys.platform.startswith("linux"):
        with suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)


class HeapTrimmer:
    """Calls `trim_heap` when the process has grown by more than `threshold` bytes since the last call."""

    def __init__(self, threshold: int = 128 << 20) -> None:
        self._threshold, self._rss_at_trim = threshold, rss_bytes()

    def trim_if_grown(self) -> None:
        if rss_bytes() - self._rss_at_trim > self._threshold:
            trim_heap()
            self._rss_at_trim = rss_bytes()


def peak_vram_bytes() -> int | None:
    """Peak memory of tensors on any one CUDA device since the start; None without one in use."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available() or not torch.cuda.is_initialized():
        return None
    return max(int(torch.cuda.max_memory_allocated(i)) for i in range(torch.cuda.device_count()))


def format_bytes(count: float) -> str:
    """`1536` as "1.5 kB": powers of 1000, three digits."""
    size = float(count)
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if abs(size) < 999.5 or unit == "TB":
            break
        size /= 1000
    digits = 0 if unit == "B" or abs(size) >= 99.95 else 1 if abs(size) >= 9.995 else 2
    return f"{size:.{digits}f} {unit}"


def format_seconds(seconds: float) -> str:
    """`3725` as "1:02:05", `65` as "1:05"."""
    hours, rest = divmod(max(0, round(seconds)), 3600)
    minutes, left = divmod(rest, 60)
    return f"{hours}:{minutes:02d}:{left:02d}" if hours else f"{minutes}:{left:02d}"


def format_peak_memory() -> str:
    """Peak memory so far as text: "RAM 1.21 GB" and, with a GPU in use, "GPU 3.40 GB"."""
    vram = peak_vram_bytes()
    return f"RAM {format_bytes(peak_rss_bytes())}" + (f", GPU {format_bytes(vram)}" if vram is not None else "")
