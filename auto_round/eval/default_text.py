"""The text that is measured on when none is given: a part of the text that ships for calibration."""

from __future__ import annotations

from auto_round.calibration.builtin import builtin_documents

EVERY = 16
"""Every sixteenth document is measured on, so that each source has its share."""


def held_out_text() -> tuple[list[str], str]:
    """Documents for measuring, and what to call them. Raises DataError when the package's file is missing."""
    documents = [d for i, d in enumerate(builtin_documents()) if i % EVERY == EVERY - 1]
    return documents, f"bundled text (every {EVERY}th document)"
