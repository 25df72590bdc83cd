"""How many faults are injected: all (AR_TEST_FAULTS=full, as `make faults` sets it), or a few of each."""

from __future__ import annotations

import os

FULL = os.environ.get("AR_TEST_FAULTS", "short") == "full"
