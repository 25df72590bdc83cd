from __future__ import annotations

import subprocess
import sys

import pytest

from auto_round.report.memory import format_bytes, format_peak_memory, format_seconds, peak_rss_bytes, rss_bytes


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.00 kB"), (1536, "1.54 kB"), (99_960, "100 kB"), (999_499, "999 kB"),
     (999_600, "1.00 MB"), (12_340_000, "12.3 MB"), (5e9, "5.00 GB"), (3e15, "3000 TB")],
)  # fmt: skip
def test_format_bytes(count: float, text: str) -> None:
    assert format_bytes(count) == text


@pytest.mark.parametrize(("seconds", "text"), [(-3, "0:00"), (5.4, "0:05"), (65, "1:05"), (3725, "1:02:05")])
def test_format_seconds(seconds: float, text: str) -> None:
    assert format_seconds(seconds) == text


def test_peak_is_a_peak_in_bytes() -> None:
    code = (
        "from auto_round.report.memory import peak_rss_bytes as p, rss_bytes as r\n"
        "a = p(); block = bytearray(80_000_000); b = p(); del block\n"
        # The kernel counts pages in batches per thread, so a peak may be told a little low later.
        "assert b - a > 60_000_000, (a, b); assert p() > b - 2_000_000, (p(), b)\n"
        "assert 0 < r() < b - 40_000_000, (r(), b)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    assert peak_rss_bytes() >= rss_bytes() * 0.5
    assert format_peak_memory().startswith("RAM ")


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs malloc_trim")
def test_freed_memory_goes_back_when_much_has_gathered() -> None:
    code = (
        "import torch\n"
        "from auto_round.report.memory import HeapTrimmer, rss_bytes as r\n"
        "start = torch.ones(1); freed = HeapTrimmer()\n"
        "def hold(megabytes):\n"
        "    parts = [torch.ones(1 << 14) for _ in range(16 * megabytes)]\n"  # below what malloc maps for itself
        "    return parts[-1]\n"  # what lies before it stays with the process
        "last = hold(60); small = r(); freed.trim_if_grown(); assert r() > small - 5_000_000\n"
        "other = hold(300); much = r(); freed.trim_if_grown(); assert r() < much - 200_000_000, (r(), much)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
