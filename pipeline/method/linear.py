"""Blocks: a frozen `nn.Linear` with a gated low-rank change, in the LoRA and the DoRA form."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pipeline.method.folded import Form, Pair, dense_linear, factor_linear, full_precision, wide_dtype
from pipeline.method.gate import Gate, gated_add
from pipeline.method.lowrank import LowRank
from pipeline.method.route import Work, cheapest


class Block(nn.Module):
    """The base of both forms: `y = base(x) + I(score) * delta_out`; the change is always on if `gate` is None.

    `base` is the untouched linear and is frozen here. `target` is the block's name, as in "image.3.q_proj".
    The adapter takes the dtype and device of the base weight; the score is fp32 whatever happens.
    """

    def __init__(self, base: nn.Linear, lowrank: LowRank, gate: Gate | None, target: str) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.lowrank = lowrank.to(device=base.weight.device, dtype=base.weight.dtype)
        self.gate = None if gate is None else gate.to(base.weight.device)
        self.target = target

    @property
    def weight(self) -> Tensor:
        """The base weight: open_clip reads `mlp.c_fc.weight.dtype` to choose its input dtype."""
        return self.base.weight

    @property
    def bias(self) -> Tensor | None:
        return self.base.bias

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out), by the cheapest of the exact ways (`pipeline.method.route`)."""
        if not torch.is_grad_enabled() or self.trains_base():
            return self.reference(x)
        if self.is_shut():
            return self.base(x)
        rank, outputs = self.lowrank.rank, self.base.out_features
        work = Work(
            tokens=x.numel() // x.shape[-1],
            inputs=x.shape[-1],
            outputs=outputs,
            rank=rank,
            dora=self.scale_parameter() is not None,
            input_grad=x.requires_grad,
            is_open=self._known_open(),
        )
        way = cheapest(work, x.device.type)
        if way == "two_path":
            return self.reference(x)
        form = Form(self.lowrank.scaling, 0.0 if self.gate is None else self.gate.threshold, self._known_open())
        # Read as attributes of their modules, because that makes ZeRO-3 gather them.
        score = None if self.gate is None else self.gate.score
        pair = Pair(self.base.weight, self.lowrank.lora_A, self.lowrank.lora_B, self.scale_parameter(), score)
        return (dense_linear if way == "dense" else factor_linear)(x, self.base.bias, pair, form)

    def reference(self, x: Tensor) -> Tensor:
        """The same by two paths, as the method is written: slower, and the reference for tests of the fast ways."""
        base_out = self.base(x)
        if self.gate is None:
            return base_out + self.delta_out(x, base_out)
        # The indicator is read on the host only outside training; there a closed block costs nothing.
        if not self.training and not torch.is_grad_enabled() and not bool(self.gate.is_open()):
            return base_out
        return gated_add(base_out, self.delta_out(x, base_out), self.gate)

    def _known_open(self) -> bool | None:
        """State of the gate in this step on the host; None: read it on the device.

        A compiled block always reads the device: its graph is then the same for an open and a closed gate.
        """
        if self.gate is None:
            return True
        return None if torch.compiler.is_compiling() else self.gate.known_open

    def shut(self) -> None:
        """Close the block for good: it no longer trains or takes part in the graph. Its score must be below tau."""
        self.requires_grad_(False)
        if self.gate is not None:
            self.gate.known_open = False

    def is_shut(self) -> bool:
        """Whether the block is closed for good and has left the graph."""
        return self.gate is not None and not self.gate.score.requires_grad and self.gate.known_open is False

    def trains_base(self) -> bool:
        """Whether the base trains as well; the fast ways do not compute its gradient."""
        return any(parameter.requires_grad for parameter in self.base.parameters())

    def scale_parameter(self) -> Tensor | None:
        """The magnitude (out,) if the form has one."""
        return None

    def undecayed(self) -> list[nn.Parameter]:
        """The parameters without weight decay: the score and the magnitude, as far as the block has them."""
        named = dict(self.named_parameters())
        return [named[name] for name in ("gate.score", "magnitude") if name in named]

    def delta_out(self, x: Tensor, base_out: Tensor) -> Tensor:
        """The output that an open block adds to `base_out = base(x)`."""
        raise NotImplementedError

    def open_weight(self) -> Tensor:
        """(out, in) weight of the open block, in at least fp32."""
        raise NotImplementedError

    def is_open(self) -> bool:
        """Whether the block acts. Reads the device; an ungated block is always open."""
        return self.gate is None or bool(self.gate.is_open())

    @torch.no_grad()
    def merged_weight(self) -> Tensor:
        """(out, in) in the dtype of the base: the base weight itself when closed, else base and delta in one."""
        return self.open_weight().to(self.base.weight.dtype) if self.is_open() else self.base.weight


class LoRALinear(Block):
    """`W = W0 + I * s B A` (LoRA, arXiv 2106.09685; the gate: paper eq. 2)."""

    def delta_out(self, x: Tensor, base_out: Tensor) -> Tensor:  # noqa: ARG002 - DoRA's form needs it
        return self.lowrank(x)

    def open_weight(self) -> Tensor:
        delta = self.lowrank.delta()
        return self.base.weight.to(delta.dtype) + delta


class DoRALinear(Block):
    """`W = W0 + I * (m V / ||V|| - W0)` with `V = W0 + s B A` (DoRA, arXiv 2402.09353, sections 4.1 and 4.3).

    `magnitude` m (out,) starts at the row norms of W0; the norm is a constant in the backward. Gating the difference
    rather than BA makes a closed block W0 itself even after m has been trained.
    """

    def __init__(self, base: nn.Linear, lowrank: LowRank, gate: Gate | None, target: str) -> None:
        super().__init__(base, lowrank, gate, target)
        self.magnitude = nn.Parameter(self.row_norm().to(base.weight.dtype))

    def scale_parameter(self) -> Tensor:
        return self.magnitude

    @torch.no_grad()
    def row_norm(self) -> Tensor:
        """||V|| per output row, (out,), in at least fp32, without forming BA.

        ||W0 + s BA||^2 = ||W0||^2 + 2 s <W0 A^T, B> + s^2 (B (A A^T) B^T)_ii, all sums over a row.
        """
        a, b, scaling = self.lowrank.lora_A, self.lowrank.lora_B, self.lowrank.scaling
        with full_precision(a.device):
            wide = wide_dtype(a.dtype)
            w, a, b = self.base.weight.to(wide), a.to(wide), b.to(wide)
            squared = w.square().sum(1)
            squared += 2 * scaling * ((w @ a.T) * b).sum(1)
            squared += scaling**2 * ((b @ (a @ a.T)) * b).sum(1)
            # cancellation can leave -1e-12; a zero row has m = 0 and must give 0, not 0 / 0
            return squared.clamp_min(torch.finfo(wide).tiny).sqrt()

    def delta_out(self, x: Tensor, base_out: Tensor) -> Tensor:
        """(m/n - 1) (y0 - b) + (m/n) s B A x, with y0 = `base_out`: the second product with W0 is saved."""
        ratio = self.magnitude / self.row_norm()
        linear_out = base_out if self.base.bias is None else base_out - self.base.bias.to(base_out.dtype)
        return (ratio - 1).to(base_out.dtype) * linear_out + ratio.to(base_out.dtype) * self.lowrank(x)

    def open_weight(self) -> Tensor:
        delta = self.lowrank.delta()
        ratio = self.magnitude.to(delta.dtype) / self.row_norm().to(delta.dtype)
        return ratio[:, None] * (self.base.weight.to(delta.dtype) + delta)
