"""How many samples each of several datasets gives."""

from __future__ import annotations

from collections.abc import Sequence


def shares(wanted: Sequence[int | None], total: int) -> list[int]:
    """Samples per dataset, at most `total` in all; `wanted` is `num=` of each, None where it was not given.

    Numbers that fit are kept, and the datasets without one share the rest evenly. Numbers that ask for more than
    `total` are taken as proportions: first each dataset without a number gets an even part of `total`, then the others
    share what is left by their numbers. Every dataset gets at least one sample as long as `total` allows it.
    """
    open_places = [i for i, n in enumerate(wanted) if n is None]
    asked = sum(n for n in wanted if n is not None)
    if asked + len(open_places) <= total:
        weights = [float(n or 0) for n in wanted]
        result = [n or 0 for n in wanted]
        for i, extra in zip(open_places, _even(total - asked, len(open_places)), strict=True):
            result[i] = extra
        return result
    weights = [float(n) if n is not None else 0.0 for n in wanted]
    even = total / len(wanted)
    for i in open_places:  # an even part of the total, on the scale of the numbers
        rest = total - even * len(open_places)
        weights[i] = even * asked / rest if rest > 0 and asked else 1.0
    return _proportional(weights, total)


def _even(total: int, parts: int) -> list[int]:
    return [total // parts + (i < total % parts) for i in range(parts)]


def _proportional(weights: Sequence[float], total: int) -> list[int]:
    """Whole numbers in proportion to `weights` that sum to `total` (largest remainders), none 0 if that can be."""
    exact = [w * total / sum(weights) for w in weights]
    result = [int(e) for e in exact]
    by_remainder = sorted(range(len(exact)), key=lambda i: (result[i] - exact[i], i))
    for i in by_remainder[: total - sum(result)]:
        result[i] += 1
    while 0 in result and max(result) > 1:
        result[result.index(max(result))] -= 1
        result[result.index(0)] += 1
    return result
