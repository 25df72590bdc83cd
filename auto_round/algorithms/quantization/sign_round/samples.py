"""Which samples a step sees, and which only judge."""

from __future__ import annotations

from collections.abc import Iterator

import torch


def split_samples(count: int, seed: int) -> tuple[list[int], list[int]]:
    """(tuned on, held out). A sixteenth is held out, at least one; with fewer than four samples all serve both ends."""
    if count < 4:
        return list(range(count)), list(range(count))
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(count, generator=generator).tolist()
    held = max(1, count // 16)
    return sorted(order[held:]), sorted(order[:held])


# With this many tokens the work of a layer still hides what calling it costs, on a CPU.
_TOKENS_PER_LAYER = 128


def samples_at_once(batch: int, tokens: int, layers: int, device: torch.device) -> int:
    """Samples in one forward and backward pass; gradients of the passes of a step add up to the same sum.

    On a CPU fewer than the batch: the same time, but less memory, since activations are kept for one pass only. Blocks
    of many layers, such as mixtures of experts, get more tokens, because every layer's call costs something.

    Args:
        tokens: of one sample.
        layers: that are tuned in the block.
    """
    if device.type != "cpu":
        return batch
    return max(1, min(batch, _TOKENS_PER_LAYER * layers // max(1, tokens)))


_CHECKS = 8  # times the held-out loss is taken during tuning, besides the start


def is_checked(done: int, iters: int) -> bool:
    """Whether the held-out loss is taken after `done` steps: in the second half, because the state changes less and
    less, and always at the end."""
    return done == iters or (done % max(1, iters // _CHECKS) == 0 and done > iters // 2)


def copies_best(iters: int) -> bool:
    """Whether a state before the last may have to be kept."""
    return any(is_checked(done, iters) for done in range(1, iters))


def shuffled_batches(samples: list[int], batch: int, seed: int) -> Iterator[list[int]]:
    """Endless batches: every sample once a round, in an order drawn anew for each round."""
    generator = torch.Generator().manual_seed(seed)
    batch = min(batch, len(samples))
    queue: list[int] = []
    while True:
        while len(queue) < batch:
            order = torch.randperm(len(samples), generator=generator).tolist()
            queue += [samples[i] for i in order]
        yield sorted(queue[:batch])
        queue = queue[batch:]
