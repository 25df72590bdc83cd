"""Record what the MoE experts of a block receive or return, one matrix row per token of every sample.

The matrix is stored in memory, on the device or in a file, like the hidden states. The outputs of the experts are
needed until the other layers of the block are tuned, their inputs only after that.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from auto_round.calibration.disk_store import ActivationTensor, DiskTensor
from auto_round.errors import UnsupportedError
from auto_round.modeling.experts import RoutedExperts

_MAX_LOAD_FACTOR = 4


def routed_experts(block: nn.Module) -> dict[str, RoutedExperts]:
    """The modules under `block` that run experts, by name."""
    return {name: module for name, module in block.named_modules() if isinstance(module, RoutedExperts)}


def max_tokens_per_expert(tokens: int, chosen: int, experts: int) -> int:
    """Most tokens that one expert is tuned on, of `tokens` that are routed to `chosen` of `experts` experts each.

    Four times the tokens of the average expert, so that the size of the buffer is known beforehand.
    """
    return min(tokens, -(-_MAX_LOAD_FACTOR * tokens * chosen // experts))


class TokenRows:
    """A matrix with one row per token of every sample.

    Args:
        rows: returns the matrix [N * T, H], whose storage may change.
        tokens: T.
        running: returns the indices of the samples in the current batch.
    """

    def __init__(self, rows: Callable[[], ActivationTensor], tokens: int, running: Callable[[], Sequence[int]]) -> None:
        self.rows, self.tokens, self._running = rows, tokens, running

    def write(self, values: torch.Tensor, into: ActivationTensor | None = None) -> None:
        """Write the rows [B * T, ...] of the current batch; `into`: another matrix with as many rows."""
        into = self.rows() if into is None else into
        samples = self._running()
        if values.shape[0] != len(samples) * self.tokens:
            raise UnsupportedError(
                f"the experts of this model are called on {values.shape[0]} rows for {len(samples)} samples of "
                f"{self.tokens} tokens; they cannot be tuned one at a time: give more max_memory, or iters=0"
            )
        for position, sample in enumerate(samples):
            into[self._of(sample)] = values[self._of(position)].to(into.device, into.dtype)

    def read(self) -> torch.Tensor:
        """Read the rows of the current batch."""
        return torch.cat([self.rows()[self._of(sample)] for sample in self._running()])

    def _of(self, sample: int) -> slice:
        return slice(sample * self.tokens, (sample + 1) * self.tokens)


class ReplayExperts(nn.Module):
    """Returns recorded outputs regardless of its inputs; has the signature of `RoutedExperts`."""

    def __init__(self, record: TokenRows) -> None:
        super().__init__()
        self.record = record

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        return self.record.read().to(hidden_states.device, hidden_states.dtype)


class InputRecordingExperts(nn.Module):
    """Records its inputs and returns zeros; has the signature of `RoutedExperts`.

    After the first call, `index`, int32 [N * T, K], has the experts of each token, `weights`, float32 [N * T, K], their
    routing weights.
    """

    index: torch.Tensor | None = None
    weights: torch.Tensor | None = None

    def __init__(self, record: TokenRows) -> None:
        super().__init__()
        self.record = record

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        if self.index is None or self.weights is None:
            shape = (int(self.record.rows().shape[0]), int(top_k_index.shape[1]))
            self.index, self.weights = torch.empty(shape, dtype=torch.int32), torch.empty(shape)
        self.record.write(hidden_states)
        self.record.write(top_k_index, self.index)
        self.record.write(top_k_weights, self.weights)
        return torch.zeros_like(hidden_states)


@contextmanager
def replaced_submodule(block: nn.Module, name: str, module: nn.Module) -> Iterator[None]:
    """Replace the submodule `name` of a block by `module` while the context is open."""
    before = block.get_submodule(name)
    block.set_submodule(name, module)
    try:
        yield
    finally:
        block.set_submodule(name, before)


@dataclass(frozen=True)
class Routing:
    """The tokens of every expert."""

    tokens: torch.Tensor  # int32 row indices, sorted by expert
    weights: torch.Tensor  # float32 routing weights in the same order
    bounds: Sequence[int]  # start of each expert's part, and the end of the last

    @classmethod
    def of(cls, index: torch.Tensor, weights: torch.Tensor, counted: torch.Tensor | None, experts: int) -> Routing:
        """Sort tokens by expert.

        Args:
            index: int [rows, K], chosen experts; `experts` or above means none.
            weights: [rows, K].
            counted: bool [rows], which rows count; None: all.
            experts: number of experts.
        """
        chosen = index.clamp(max=experts)
        if counted is not None:
            chosen = chosen.masked_fill(~counted[:, None], experts)
        chosen, order = torch.sort(chosen.reshape(-1), stable=True)
        counts = torch.bincount(chosen, minlength=experts + 1)[:experts].tolist()
        bounds = list(itertools.accumulate(counts, initial=0))
        order = order[: bounds[-1]]
        tokens = order.div(index.shape[1], rounding_mode="floor").to(torch.int32)
        return cls(tokens, weights.reshape(-1)[order], bounds)

    def count(self, number: int) -> int:
        """Number of tokens of one expert."""
        return self.bounds[number + 1] - self.bounds[number]

    def expert(self, number: int, most: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(rows int64 [n], weights float32 [n]) of one expert in ascending order: all, or `most` spread evenly."""
        part = slice(self.bounds[number], self.bounds[number + 1])
        tokens, weights = self.tokens[part].long(), self.weights[part]
        if tokens.numel() > most:
            kept = torch.arange(most) * tokens.numel() // most
            tokens, weights = tokens[kept], weights[kept]
        return tokens, weights


def gather_rows(matrix: ActivationTensor, rows: torch.Tensor) -> torch.Tensor:
    """Rows of a matrix by int64 [n] indices, on its device (in memory for a file)."""
    return matrix[rows.tolist()] if isinstance(matrix, DiskTensor) else matrix[rows.to(matrix.device)]


class GatheredRows:
    """Rows of a matrix grouped to samples [M, R, H] of R rows each; the last sample is padded with zeros.

    Args:
        matrix: read when a sample is accessed.
        rows: int64 [n] row indices, in order.
        each: R.
    """

    def __init__(self, matrix: ActivationTensor, rows: torch.Tensor, each: int) -> None:
        self.matrix, self.rows, self.each = matrix, rows, each
        self.shape = torch.Size((-(-rows.numel() // each), each, matrix.shape[1]))

    @property
    def present(self) -> torch.Tensor | None:
        """bool [M, R]: False for padding; None when there is none."""
        present = torch.arange(self.shape[0] * self.each) < self.rows.numel()
        return None if bool(present.all()) else present.view(self.shape[:2])

    def __getitem__(self, index: Sequence[int]) -> torch.Tensor:
        wanted = (torch.tensor(index)[:, None] * self.each + torch.arange(self.each)).reshape(-1)
        last = self.rows.numel() - 1
        found = gather_rows(self.matrix, self.rows[wanted.clamp(max=last)])
        if int(wanted.max()) > last:
            found[(wanted > last).to(found.device)] = 0
        return found.view(len(index), self.each, -1)
