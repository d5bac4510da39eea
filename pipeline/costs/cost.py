"""The cost of a model: parameters, multiply-accumulates (MAC) per image and per text, and latency.

One MAC is two FLOPs. Every count here has a closed form; `counted_macs` gives the same number by torch's counter.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from pipeline.method.adapter import AdapterKind, attach_adapter
from pipeline.model.attention import SplitAttentionPool, SplitProjections
from pipeline.model.clip import Clip
from pipeline.model.load import Model
from pipeline.model.towers import adapter_targets, apply_trainable
from pipeline.model.vit import Vit

Macs = dict[str, int]  # tower -> MAC of one image or one text


@dataclass(frozen=True)
class Convention:
    """One way to compute and count an unmerged block: the kinds it serves, and the MAC that it adds to the base linear.

    `overhead`: (in, out, rank, tokens) -> MAC of one forward. Terms that do not depend on the tokens are spent once per
    forward, so their share shrinks as the batch grows.
    """

    kinds: tuple[AdapterKind, ...]
    meaning: str
    overhead: Callable[[int, int, int, int], int]


def _factors(m: int, n: int, r: int, t: int) -> int:
    return t * r * (m + n)


def _dense_delta(m: int, n: int, r: int, _: int) -> int:
    return m * n * r


def _identity_delta(m: int, n: int, r: int, _: int) -> int:
    # A and B applied to the (in, in) identity, PEFT's way to a dense BA
    return m * r * (m + n)


def _base(m: int, n: int, _: int, t: int) -> int:
    return t * m * n


def _norm_by_factors(m: int, n: int, r: int, _: int) -> int:
    return m * n * r + r * r * (m + n)


def _sum(*parts: Callable[[int, int, int, int], int]) -> Callable[[int, int, int, int], int]:
    return lambda m, n, r, t: sum(part(m, n, r, t) for part in parts)


_LORA: tuple[AdapterKind, ...] = ("lora",)
_DORA: tuple[AdapterKind, ...] = ("dora",)
CONVENTIONS: dict[str, Convention] = {
    "merged": Convention(("lora", "dora"), "delta folded into the weight once", lambda *_: 0),
    "two_path": Convention(_LORA, "x W0 + (x A) B", _factors),
    "folded": Convention(_LORA, "BA formed, added to W0, one product", _dense_delta),
    "dense_delta": Convention(_LORA, "BA formed, and x (BA) added to x W0", _sum(_dense_delta, _base)),
    "dense_and_two_path": Convention(_LORA, "BA formed and not used, two paths", _sum(_dense_delta, _factors)),
    "dora_two_path": Convention(
        _DORA, "norm by the r x r identity, two paths: selora", _sum(_norm_by_factors, _factors)
    ),
    "dora_dense_norm": Convention(_DORA, "BA formed for the norm, two paths", _sum(_dense_delta, _factors)),
    "dora_nvlabs": Convention(_DORA, "BA for the norm, a second x W0, two paths", _sum(_dense_delta, _base, _factors)),
    "dora_peft_0_13": Convention(
        _DORA, "BA through an identity input, a second x W0, two paths", _sum(_identity_delta, _base, _factors)
    ),
    "dora_peft": Convention(_DORA, "BA through an identity input, two paths", _sum(_identity_delta, _factors)),
}
OWN_CONVENTION: dict[AdapterKind, str] = {"lora": "two_path", "dora": "dora_two_path"}


def block_macs(inputs: int, outputs: int, rank: int, tokens: int, convention: str = "two_path") -> int:
    """MAC that one block of this rank adds to its (inputs -> outputs) linear in a forward over `tokens` rows.

    convention: a key of CONVENTIONS; any other is a ValueError.
    """
    if convention not in CONVENTIONS:
        raise ValueError(f"convention={convention!r}: expected one of {', '.join(CONVENTIONS)}")
    return CONVENTIONS[convention].overhead(inputs, outputs, rank, tokens)


@dataclass(frozen=True)
class Site:
    """A linear that can carry a block, and how many rows (tokens) one image or one text sends through it."""

    target: str
    inputs: int
    outputs: int
    tokens: int

    @property
    def tower(self) -> str:
        return self.target.partition(".")[0]


@dataclass(frozen=True)
class Cost:
    """Counts of a plain model. `base` is the closed form, `counted` is torch's count of the same forward pass."""

    parameters: int
    sites: tuple[Site, ...]
    base: Macs
    counted: Macs

    def overhead(self, rank: int, convention: str, targets: Iterable[str] | None = None) -> Macs:
        """MAC that blocks on `targets` (None: on all sites) add to one image and to one text."""
        chosen = {site.target for site in self.sites} if targets is None else set(targets)
        return {
            tower: sum(
                block_macs(site.inputs, site.outputs, rank, site.tokens, convention)
                for site in self.sites
                if site.tower == tower and site.target in chosen
            )
            for tower in self.base
        }

    def adapter_parameters(self, rank: int, kind: AdapterKind, targets: Iterable[str] | None = None) -> int:
        """Number of trainable parameters of the blocks: A, B, the magnitude of DoRA and the score of the gate."""
        chosen = {site.target for site in self.sites} if targets is None else set(targets)
        return sum(
            rank * (site.inputs + site.outputs) + (site.outputs if kind == "dora" else 0) + 1
            for site in self.sites
            if site.target in chosen
        )


def model_cost(model: Model) -> Cost:
    """Count a plain (or merged) model by tracing shapes, without computing anything. A ViT has no text tower."""
    module = deepcopy(model.model).to("meta").eval()
    sites, base = _trace(module, _inputs(model, "meta"))
    parameters = sum(parameter.numel() for parameter in module.parameters())
    return Cost(parameters, sites, base, counted_macs(module, _inputs(model, "meta")))


def trained_parameters(model: Model, train_rest: str, kind: str) -> int:
    """Number of trained parameters other than the adapters (kind "full": of all parameters)."""
    module = deepcopy(model.model).to("meta")
    apply_trainable(module, train_rest, kind)
    return sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)


def counted_adapter_macs(model: Clip, rank: int, kind: AdapterKind, targets: Iterable[str] | None = None) -> Macs:
    """MAC of one image and one text by torch's counter, with unmerged blocks on `targets` (None: on all)."""
    module = deepcopy(model.model).to("meta").eval()
    attach_adapter(adapter_targets(module), rank=rank, kind=kind, gated=False, select=targets)
    return counted_macs(module, _inputs(model, "meta"))


def counted_macs(model: nn.Module, inputs: Mapping[str, Tensor]) -> Macs:
    """MAC of one forward of each tower by torch's counter.

    Meanwhile torch's plain attention is used, because fused attention is not counted on a CPU.
    """
    return {tower: _counted(partial(_encoder(model, tower), inputs[tower])) for tower in inputs}


def _counted(forward: Callable[[], Any]) -> int:
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        forward()
    return counter.get_total_flops() // 2


def _encoder(model: Any, tower: str) -> Callable[[Tensor], Tensor]:
    return model.encode_image if tower == "image" else model.encode_text


def _inputs(model: Model, device: str | torch.device, batch: int = 1) -> dict[str, Tensor]:
    """An input for each tower: zeros as image, and the tokens of an empty caption."""
    size = model.preprocess_cfg["size"]
    height, width = (size, size) if isinstance(size, int) else size
    inputs = {"image": torch.zeros(batch, 3, height, width, device=device)}
    return inputs if isinstance(model, Vit) else inputs | {"text": model.tokenizer([""] * batch).to(device)}


def _trace(model: nn.Module, inputs: Mapping[str, Tensor]) -> tuple[tuple[Site, ...], Macs]:
    """Every site with its tokens, and the closed form of each tower's forward, from the shapes that pass through."""
    rows: dict[int, int] = {}
    macs: list[int] = []

    def see_linear(module: nn.Linear, args: tuple[Tensor, ...]) -> None:
        rows[id(module)] = args[0].numel() // module.in_features
        macs.append(rows[id(module)] * module.in_features * module.out_features)

    def see_convolution(module: nn.Conv2d, _: Any, out: Tensor) -> None:
        macs.append(module.weight.numel() * out.shape[0] * out.shape[2] * out.shape[3])

    def see_attention(module: SplitProjections, args: tuple[Tensor, ...], kwargs: Mapping[str, Tensor]) -> None:
        batch, length, width = (args[0] if args else kwargs["query"]).shape
        queries = module.latent.shape[1] if isinstance(module, SplitAttentionPool) else length
        macs.append(2 * batch * queries * length * width)  # q k' and its product with v

    for module in model.modules():
        if isinstance(module, SplitProjections):
            module.register_forward_pre_hook(see_attention, with_kwargs=True)
        elif isinstance(module, nn.Linear):
            module.register_forward_pre_hook(see_linear)
        elif isinstance(module, nn.Conv2d):
            module.register_forward_hook(see_convolution)
    base = {}
    for tower in inputs:
        macs.clear()
        with torch.no_grad():
            _encoder(model, tower)(inputs[tower])
        base[tower] = sum(macs) + _projection(model, tower)
    sites = []
    for target, (parent, attribute) in adapter_targets(model).items():
        linear = parent.get_submodule(attribute)
        assert isinstance(linear, nn.Linear)
        sites.append(Site(target, linear.in_features, linear.out_features, rows[id(linear)]))
    return tuple(sites), base


def _projection(model: nn.Module, tower: str) -> int:
    """MAC of a tower's last product if it is a bare matrix, applied to one pooled row."""
    paths = ("visual.proj",) if tower == "image" else ("text_projection", "text.text_projection")
    matrices = (parameter for name, parameter in model.named_parameters() if name in paths)
    return sum(matrix.numel() for matrix in matrices)


State = Literal["plain", "unmerged", "pruned"]


def latencies(
    model: Clip,
    rank: int,
    kind: AdapterKind,
    active: Iterable[str],
    *,
    batch: int,
    device: torch.device,
    rounds: int = 7,
) -> dict[State, float]:
    """Median seconds of a forward pass of both towers over `batch` images and texts.

    Plain (or merged), with a block on every site, and with blocks on `active` only. The three alternate, so that other
    load on the machine affects them alike.
    """
    modules: dict[State, nn.Module] = {}
    choices: dict[State, list[str] | None] = {"plain": [], "unmerged": None, "pruned": list(active)}
    for state, targets in choices.items():
        module = deepcopy(model.model).to(device).eval()
        if targets != []:
            attach_adapter(adapter_targets(module), rank=rank, kind=kind, gated=False, select=targets)
        modules[state] = module
    inputs = _inputs(model, device, batch)
    seconds: dict[State, list[float]] = {state: [] for state in modules}
    for turn in range(rounds + 1):
        order = list(modules) if turn % 2 else list(modules)[::-1]
        for state in order:
            spent = _seconds(modules[state], inputs)
            if turn:  # the first round warms up
                seconds[state].append(spent)
    return {state: median(spent) for state, spent in seconds.items()}


@torch.no_grad()
def _seconds(model: nn.Module, inputs: Mapping[str, Tensor]) -> float:
    on_gpu = inputs["image"].device.type == "cuda"
    if on_gpu:
        torch.cuda.synchronize()
    start = time.perf_counter()
    for tower in inputs:
        _encoder(model, tower)(inputs[tower])
    if on_gpu:
        torch.cuda.synchronize()
    return time.perf_counter() - start
