"""Run independent work in parallel on CPU cores, each worker with its share of PyTorch's threads.

For short operations PyTorch's own split among threads costs more than it saves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")


@contextmanager
def split_torch_threads(workers: int) -> Iterator[None]:
    """Divide PyTorch's threads among `workers` for the duration of the block, then restore their number."""
    before = torch.get_num_threads()
    torch.set_num_threads(max(1, before // workers))
    try:
        yield
    finally:
        torch.set_num_threads(before)


def parallel_map(function: Callable[[Item], Result], items: Sequence[Item], device: torch.device) -> list[Result]:
    """`function` of each item, in order, without gradients; on a CPU in parallel, on other devices sequentially.

    Raises the error of the first item that failed, after the items already started have finished.
    """
    workers = min(torch.get_num_threads(), len(items)) if device.type == "cpu" else 1

    def one(item: Item) -> Result:
        with torch.no_grad():  # a thread starts with gradients on
            return function(item)

    if workers < 2:
        return [one(item) for item in items]
    with split_torch_threads(workers), ThreadPoolExecutor(workers, "layers") as pool:
        return list(pool.map(one, items))
