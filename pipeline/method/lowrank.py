"""The low-rank pair of a block."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class LowRank(nn.Module):
    """`delta = scaling * B A` (paper eq. 2, in PEFT's orientation).

    lora_A (rank, in) starts kaiming-uniform with a = sqrt(5), lora_B (out, rank) at zero, so the delta starts at zero.
    scaling = alpha / rank; alpha None means rank, that is scaling 1.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        alpha: float | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        if rank < 1:
            raise ValueError(f"rank={rank}: must be at least 1")
        self.in_features, self.out_features, self.rank = in_features, out_features, rank
        self.scaling = 1.0 if alpha is None else alpha / rank
        self.lora_A = nn.Parameter(torch.empty(rank, in_features))
        self.lora_B = nn.Parameter(torch.zeros(out_features, rank))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5), generator=generator)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out), without forming the (out, in) delta."""
        return F.linear(F.linear(x, self.lora_A) * self.scaling, self.lora_B)

    def delta(self) -> Tensor:
        """The (out, in) change of the weight, in at least fp32."""
        wide = torch.promote_types(self.lora_A.dtype, torch.float32)
        return self.scaling * (self.lora_B.to(wide) @ self.lora_A.to(wide))

    def extra_repr(self) -> str:
        return f"in={self.in_features}, out={self.out_features}, rank={self.rank}, scaling={self.scaling:g}"
