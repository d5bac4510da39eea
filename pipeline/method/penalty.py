"""The penalty that closes gates (paper eq. 4 and table 2)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

PenaltyKind = Literal["l1", "l2", "hinge"]
Reduction = Literal["mean", "sum"]


def gate_penalty(
    scores: Sequence[Tensor],
    kind: PenaltyKind = "l1",
    lam: float = 1.0,
    reduction: Reduction = "mean",
    threshold: float = 0.1,
) -> Tensor:
    """`lam * reduce_l f(s_l)` with f = |s| (l1), s^2 (l2) or max(0, s - threshold) (hinge); a scalar in fp32.

    "sum" is eq. 4 to the letter, "mean" divides by the number of gates. At the threshold, l2 has the slope of l1 when
    its lam is l1's divided by 2 * threshold. Every rank adds the whole penalty; it must not be divided by the number of
    ranks.
    """
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction={reduction!r}: expected 'mean' or 'sum'")
    if kind not in ("l1", "l2", "hinge"):
        raise ValueError(f"penalty={kind!r}: expected 'l1', 'l2' or 'hinge'")
    if not scores:
        return torch.zeros(())
    s = torch.cat([score.reshape(-1) for score in scores])
    s = s.to(torch.promote_types(s.dtype, torch.float32))
    per_gate = {
        "l1": torch.abs,
        "l2": torch.square,
        "hinge": lambda t: torch.relu(t - threshold),
    }[kind](s)
    return lam * (per_gate.mean() if reduction == "mean" else per_gate.sum())
