"""Run independent work in parallel on CPU cores, each worker with its share of PyTorch's threads.

PyTorch splits one operation among threads. Where operations are short (a search over small groups, codes found
column by column) that costs more than it saves. Whole layers in parallel, each on its share of the threads,
need not wait.
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
    """PyTorch's threads divided among the workers, and the caller's number again afterwards."""
    before = torch.get_num_threads()
    torch.set_num_threads(max(1, before // workers))
    try:
        yield
    finally:
        torch.set_num_threads(before)


def parallel_map(function: Callable[[Item], Result], items: Sequence[Item], device: torch.device) -> list[Result]:
    """`function` of each item, in order, without gradients; at once as far as PyTorch has threads.

    On other devices than the CPU, one after the other. Raises the first item's error, after those that had begun ended.
    """
    workers = min(torch.get_num_threads(), len(items)) if device.type == "cpu" else 1

    def one(item: Item) -> Result:
        with torch.no_grad():  # a thread starts with gradients on
            return function(item)

    if workers < 2:
        return [one(item) for item in items]
    with split_torch_threads(workers), ThreadPoolExecutor(workers, "layers") as pool:
        return list(pool.map(one, items))
