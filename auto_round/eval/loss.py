"""Per-token measures on logits: negative log-likelihood, KL divergence, top-1 agreement. Pure functions.

Everything is computed in float32 and summed in float64. Logits are read in slices of positions, so that the float32
copies of a large vocabulary stay small whatever the window's length.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

SLICE_ELEMENTS = 1 << 23
"""Logits per slice: 32 MiB as float32."""


def _slices(positions: int, vocab: int) -> list[slice]:
    step = max(1, SLICE_ELEMENTS // max(1, vocab))
    return [slice(i, min(i + step, positions)) for i in range(0, positions, step)]


def token_nll(logits: torch.Tensor, input_ids: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """Negative log-likelihood of each next token, in nats.

    Args:
        logits: [B, T, V] (or [T, V]), any float dtype; position t predicts token t + 1.
        input_ids: int64 [B, T] (or [T]).
        mask: bool [B, T] (or [T]); a token whose mask is False is not counted as a target.

    Returns:
        float32 [B, T - 1] (or [T - 1]), zero where the target is masked.
    """
    flat = logits[..., :-1, :].reshape(-1, logits.shape[-1])
    target = input_ids[..., 1:].reshape(-1)
    out = torch.empty(flat.shape[0], dtype=torch.float32, device=logits.device)
    for part in _slices(*flat.shape):
        out[part] = F.cross_entropy(flat[part].float(), target[part].to(logits.device), reduction="none")
    out = out.view(input_ids[..., 1:].shape)
    return out if mask is None else out.masked_fill(~mask[..., 1:].to(out.device), 0.0)


def token_kl(reference: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """KL(reference || other) of each position's next-token distribution, in nats.

    Args:
        reference, other: logits [..., V], any float dtype, same shape.

    Returns:
        float32 [...]. A token that the reference gives no probability (logit -inf) adds nothing.
    """
    vocab = reference.shape[-1]
    p, q = reference.reshape(-1, vocab), other.reshape(-1, vocab)
    out = torch.empty(p.shape[0], dtype=torch.float32, device=reference.device)
    for part in _slices(*p.shape):
        log_p = p[part].float().log_softmax(-1)
        log_q = q[part].to(reference.device).float().log_softmax(-1)
        prob = log_p.exp()
        terms = (prob * (log_p - log_q)).masked_fill_(prob == 0, 0.0)
        out[part] = terms.sum(-1, dtype=torch.float64).float()
    return out.view(reference.shape[:-1])


def top1_agreement(reference: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """bool [...]: both logits [..., V] have their largest value at the same token."""
    return reference.argmax(-1) == other.argmax(-1).to(reference.device)
