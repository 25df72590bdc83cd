"""The text that is measured on when none is given: what calibration leaves of the text inside the package."""

from __future__ import annotations

from auto_round.calibration.builtin import held_out_documents


def held_out_text() -> tuple[list[str], str]:
    """Documents for measuring, and what to call them. Raises DataError when the package's file is missing."""
    return held_out_documents(), "bundled text that calibration leaves out"
