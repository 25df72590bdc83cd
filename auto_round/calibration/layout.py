"""How the hidden states of a model lie in the tensor that its blocks hand on.

Most models hand on [batch, tokens, width]. Hyper-connections keep several streams side by side ([batch, tokens,
streams, width]), Gemma 3n stacks them in front ([streams, batch, tokens, width]), and XLNet puts tokens first. Samples
are kept as rows [batch, tokens, everything else] in all of these.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class HiddenLayout:
    """Attributes:
    batch, tokens: which dimensions of the blocks' tensor these are.
    rest: sizes of the other dimensions, in order.
    """

    batch: int = 0
    tokens: int = 1
    rest: tuple[int, ...] = ()

    @classmethod
    def of(cls, hidden: torch.Tensor, tokens: int) -> HiddenLayout | None:
        """The layout of one sample's hidden states; None when no dimension is the batch, or none the tokens."""
        if hidden.dim() == 3 and hidden.shape[0] == 1:
            return cls(rest=(int(hidden.shape[2]),))  # also where a prompt of the model's own lies before the tokens
        batch = batch_dim(hidden)
        others = [d for d in range(hidden.dim()) if d != batch]
        place = next((d for d in others if hidden.shape[d] == tokens), None)
        if batch is None or place is None or hidden.dim() < 3:
            return None
        return cls(batch, place, tuple(hidden.shape[d] for d in others if d != place))

    @property
    def plain(self) -> bool:
        """Whether rows are the blocks' own tensor."""
        return (self.batch, self.tokens) == (0, 1) and len(self.rest) < 2

    def rows(self, hidden: torch.Tensor) -> torch.Tensor:
        """[B, T, width] of the blocks' tensor."""
        if self.plain:
            return hidden
        others = [d for d in range(hidden.dim()) if d not in (self.batch, self.tokens)]
        return hidden.permute(self.batch, self.tokens, *others).flatten(2)

    def hidden(self, rows: torch.Tensor) -> torch.Tensor:
        """The blocks' tensor of rows [B, T, width], with memory of its own where it is not `rows` itself."""
        if self.plain:
            return rows
        others = [d for d in range(2 + len(self.rest)) if d not in (self.batch, self.tokens)]
        back = torch.tensor([self.batch, self.tokens, *others]).argsort().tolist()
        return rows.reshape(*rows.shape[:2], *self.rest).permute(*back).contiguous()


def batch_dim(tensor: torch.Tensor) -> int | None:
    """The dimension that counts samples, in a tensor of one sample: the first of size one."""
    return next((d for d in range(tensor.dim()) if tensor.shape[d] == 1), None)
