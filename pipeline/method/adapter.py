"""Adapters applied from outside: choose targets, attach, walk, check, save and merge."""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import Literal, TypedDict

import torch
from torch import Tensor, nn

from pipeline.method.gate import Gate
from pipeline.method.linear import Block, DoRALinear, LoRALinear
from pipeline.method.lowrank import LowRank

AdapterKind = Literal["lora", "dora"]
Targets = Mapping[str, tuple[nn.Module, str]]
_PART = re.compile(r"(?<=\.fc1)_[gx]$")
FORMS: dict[str, type[Block]] = {"lora": LoRALinear, "dora": DoRALinear}


class GateState(TypedDict):
    """State of one block; `score` is None for a block without gate, which is always open."""

    score: float | None
    open: bool


def select_targets(
    names: Sequence[str],
    towers: Iterable[str] = ("image", "text"),
    projections: Iterable[str] = (
        "q_proj",
        "k_proj",
        "v_proj",
        "out_proj",
        "fc1",
        "fc2",
    ),
    globs: Iterable[str] | None = None,
) -> list[str]:
    """The chosen target names, in the order of `names`.

    A projection takes its parts with it: fc1 of a gated MLP is fc1_g and fc1_x. globs (fnmatch patterns over
    "tower.layer.projection") replace towers x projections. A tower, projection or pattern
    that matches nothing is a ValueError that shows the nearest names.
    """
    if globs is not None:
        chosen = {name for glob in globs for name in _matching(names, glob, "targets")}
    else:
        by_tower = {name for tower in towers for name in _matching(names, f"{tower}.*", "towers")}
        whole = {name: _PART.sub("", name) for name in names}
        wanted = {found for kind in projections for found in _matching([*whole.values()], f"*.{kind}", "projections")}
        by_kind = {name for name in names if whole[name] in wanted}
        chosen = by_tower & by_kind
    return [name for name in names if name in chosen]


def _matching(names: Sequence[str], glob: str, option: str) -> list[str]:
    found = [name for name in names if fnmatchcase(name, glob)]
    if not found:
        near = get_close_matches(glob, names, n=4, cutoff=0.3) or list(names[:4])
        raise ValueError(f"{option}: {glob!r} matches none of the {len(names)} targets; near names: {', '.join(near)}")
    return found


def random_targets(names: Sequence[str], k: int, seed: int) -> list[str]:
    """`k` names drawn without repetition (the random-block baseline), in the order of `names`."""
    if not 1 <= k <= len(names):
        raise ValueError(f"random_k={k}: must be between 1 and the {len(names)} targets")
    drawn = set(random.Random(seed).sample(list(names), k))  # noqa: S311 - a draw, no secret
    return [name for name in names if name in drawn]


def attach_adapter(
    targets: Targets,
    *,
    rank: int,
    kind: AdapterKind = "lora",
    alpha: float | None = None,
    gated: bool = True,
    gate_init: float = 0.15,
    threshold: float = 0.1,
    seed: int = 0,
    select: Iterable[str] | None = None,
) -> list[str]:
    """Replace each chosen linear by a block around it and freeze the linear. Returns the names, in target order.

    targets: name -> (parent module, attribute that holds an nn.Linear). select: names to take, None for all.
    lora_A depends on (seed, name) only, so a block starts the same whatever else is attached.
    """
    if kind not in FORMS:
        raise ValueError(f"adapter kind={kind!r}: expected one of {', '.join(FORMS)}")
    wanted = set(targets) if select is None else set(select)
    for name in sorted(wanted - set(targets)):
        _matching(list(targets), name, "targets")
    names = [name for name in targets if name in wanted]
    for name in names:
        parent, attribute = targets[name]
        base = parent.get_submodule(attribute)
        if not isinstance(base, nn.Linear):
            raise ValueError(f"target {name!r} is a {type(base).__name__}, not nn.Linear: already adapted?")
        lowrank = LowRank(base.in_features, base.out_features, rank, alpha, _generator(seed, name))
        gate = Gate(gate_init, threshold) if gated else None
        block = FORMS[kind](base, lowrank, gate, name)
        setattr(parent, attribute, block.train(base.training))
    return names


def _generator(seed: int, name: str) -> torch.Generator:
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def blocks(model: nn.Module) -> dict[str, Block]:
    """Target name -> block, in module order."""
    return {module.target: module for module in model.modules() if isinstance(module, Block)}


def gate_scores(model: nn.Module) -> list[nn.Parameter]:
    """The score of every gated block, in block order: the input of the penalty and a parameter group of its own."""
    return [block.gate.score for block in blocks(model).values() if block.gate is not None]


def gate_map(model: nn.Module) -> dict[str, GateState]:
    """Target name -> {"score", "open"}; one device synchronisation for all blocks."""
    gates = {name: block.gate for name, block in blocks(model).items()}
    rows = [torch.stack([g.score.detach().squeeze(), g.is_open().to(g.score.dtype)]) for g in gates.values() if g]
    values = iter(torch.stack(rows).tolist() if rows else [])
    states: dict[str, GateState] = {}
    for name, gate in gates.items():
        score, is_open = (None, True) if gate is None else next(values)
        states[name] = {"score": score, "open": bool(is_open)}
    return states


def adapter_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """State-dict name -> trainable parameter of every block: lora_A, lora_B, magnitude, score."""
    own = {
        id(parameter)
        for block in blocks(model).values()
        for name, parameter in block.named_parameters()
        if not name.startswith("base.")
    }
    return {name: parameter for name, parameter in model.named_parameters() if id(parameter) in own}


@torch.no_grad()
def merge_adapter(model: nn.Module) -> nn.Module:
    """Replace every block by its plain nn.Linear, in place: the base itself if closed, else with the delta folded in.

    The delta is folded in fp32; the dtype of the base is kept. Returns `model`.
    """
    for parent in list(model.modules()):
        for attribute, child in list(parent.named_children()):
            if isinstance(child, Block):
                if child.is_open():
                    child.base.weight.copy_(child.merged_weight())
                setattr(parent, attribute, child.base)
    return model


class GradientWatch:
    """Records which adapter parameters get a gradient. Create it before the first backward and call `check()` after it.

    It uses hooks, because DeepSpeed ZeRO clears `.grad` during the backward.
    """

    def __init__(self, model: nn.Module) -> None:
        self._blocks = blocks(model)
        self._seen: dict[int, Tensor] = {}
        self._handles = [
            parameter.register_post_accumulate_grad_hook(self._note)
            for parameter in adapter_parameters(model).values()
            if parameter.requires_grad
        ]

    def _note(self, parameter: Tensor) -> None:
        grad = parameter.grad
        if grad is not None:
            self._seen[id(parameter)] = grad.detach().ne(0).any()

    def check(self) -> None:
        """Raise ValueError naming the blocks without gradient; removes the hooks.

        At the first step B = 0, so the gradients of A and of the score are exactly zero: a block counts as reached when
        its score (if trained) and B have a gradient, and the gradient of B in an open block is not all zero.
        """
        for handle in self._handles:
            handle.remove()
        _raise_for_missing(self._blocks, self._seen)


def _raise_for_missing(found: Mapping[str, Block], seen: Mapping[int, Tensor]) -> None:
    missing = []
    for name, block in found.items():
        lora_b = block.lowrank.lora_B
        reached = not lora_b.requires_grad or id(lora_b) in seen
        if block.gate is not None and block.gate.score.requires_grad:
            reached = reached and id(block.gate.score) in seen
        if reached and lora_b.requires_grad and block.is_open():
            reached = bool(seen[id(lora_b)])
        if not reached:
            missing.append(name)
    if missing:
        more = f" and {len(missing) - 8} more" if len(missing) > 8 else ""
        raise ValueError(f"{len(missing)} of {len(found)} blocks got no gradient: {', '.join(missing[:8])}{more}")
