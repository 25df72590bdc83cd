from __future__ import annotations

from auto_round.calibration.data.sources import builtin, builtin_documents, held_out_documents


def test_what_is_measured_on_was_not_calibrated_on() -> None:
    measured = held_out_documents()
    calibrated = set(builtin(seed=0, split=None))
    assert len(measured) >= 10 and not calibrated & set(measured)
    assert calibrated | set(measured) == set(builtin_documents())
