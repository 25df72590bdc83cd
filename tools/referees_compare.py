"""How far logits are from others."""

from __future__ import annotations

import numpy as np


def difference(theirs: np.ndarray, ours: np.ndarray) -> float:
    """The largest relative difference of any position: the norm over the vocabulary, both sides centred.

    Centring makes logits and log-probabilities comparable: they differ by a constant for each position.
    """
    ours = ours[:, : theirs.shape[1]].astype(np.float64)
    theirs = theirs.astype(np.float64)
    ours = ours - ours.mean(-1, keepdims=True)
    theirs = theirs - theirs.mean(-1, keepdims=True)
    return float((np.linalg.norm(theirs - ours, axis=-1) / np.linalg.norm(ours, axis=-1)).max())
