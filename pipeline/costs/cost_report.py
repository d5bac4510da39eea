"""The figures of `selora cost`: a model or run with blocks by every counting convention, and the paper's two claims."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch

from pipeline.config import ConfigError, load_config
from pipeline.costs.cost import (
    CONVENTIONS,
    OWN_CONVENTION,
    Cost,
    Macs,
    counted_adapter_macs,
    latencies,
    model_cost,
    trained_parameters,
)
from pipeline.display import text_table
from pipeline.method.adapter import AdapterKind
from pipeline.model.clip import CONFIG_FILE, Clip, is_clip_directory, load_clip
from pipeline.model.load import as_clip
from pipeline.model.restore import check_exists, find_run, load_base
from pipeline.runs.run import is_run

RANKS = (4, 16, 64, 128, 256)
KINDS: tuple[AdapterKind, ...] = ("lora", "dora")
# Open blocks of the paper's rank-256 models (Fig. 9), of 144.
PAPER_ACTIVE: dict[AdapterKind, int] = {"lora": 8, "dora": 5}
PAPER_RATIO: dict[AdapterKind, float] = {"lora": 2.9, "dora": 5.0}
PAPER_RANK, PAPER_BLOCKS = 256, 144


@dataclass(frozen=True)
class _Subject:
    """What to count. `open_targets` is known only for a run; otherwise the number of blocks is given."""

    model: Clip
    label: str
    kinds: tuple[AdapterKind, ...]
    ranks: tuple[int, ...]
    active: dict[AdapterKind, int]
    targets: list[str] | None
    open_targets: list[str] | None
    train_rest: str


def cost_report(
    run_or_model: str,
    *,
    pretrained: str | None = None,
    ranks: Sequence[int] | None = None,
    kinds: Sequence[str] | None = None,
    active: int | None = None,
    latency_batches: Sequence[int] = (),
    device: str | None = None,
) -> dict[str, Any]:
    """All figures as plain data: MAC per image and per text, parameters, conventions, the paper's claims, seconds.

    For a run, the kind, rank and open blocks default to its own. Raises ConfigError for a run or model that does not
    exist, a run without blocks, and more open blocks than sites.
    """
    subject = _subject(run_or_model, pretrained, ranks, kinds, active)
    cost = model_cost(subject.model)
    sites = len(cost.sites if subject.targets is None else subject.targets)
    if most := [number for number in subject.active.values() if number > sites]:
        raise ConfigError(f"active: {most[0]} blocks of {sites} cannot be open")
    rows = [_row(subject, cost, kind, rank) for kind in subject.kinds for rank in subject.ranks]
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    return {
        "model": subject.label,
        "parameters": cost.parameters,
        "blocks": sites,
        "plain": {"macs": cost.base, "counted": cost.counted},
        "rows": rows,
        "conventions": _conventions(subject, cost, max(subject.ranks)),
        "paper": paper_claims(cost),
        "latency": [_latency(subject, cost, kind, batch, where) for kind in subject.kinds for batch in latency_batches],
    }


def _subject(
    name: str,
    pretrained: str | None,
    ranks: Sequence[int] | None,
    kinds: Sequence[str] | None,
    active: int | None,
) -> _Subject:
    wanted = cast("tuple[AdapterKind, ...]", tuple(kinds)) if kinds else None
    check_exists(name)
    if not is_run(name):
        if Path(name).is_dir():
            if not is_clip_directory(Path(name)):
                raise ConfigError(f"{name}: neither a run (no config.yaml) nor an open_clip model (no {CONFIG_FILE})")
            name = f"local-dir:{name}"
        chosen = wanted or KINDS
        number: dict[AdapterKind, int] = {kind: active or PAPER_ACTIVE[kind] for kind in chosen}
        model = load_clip(name, pretrained)
        return _Subject(model, model.name, chosen, tuple(ranks or RANKS), number, None, None, "all")
    if pretrained is not None:
        raise ConfigError("pretrained: a run brings its own weights; give it for a plain model only")
    source = find_run(name)
    adapter = source.state["adapter"]
    if adapter["kind"] not in KINDS:
        raise ConfigError(f"{name}: adapter.kind={adapter['kind']} has no blocks to count")
    open_targets = [target for target, state in source.state["gate_map"].items() if state["open"]]
    chosen = wanted or (cast("AdapterKind", adapter["kind"]),)
    return _Subject(
        as_clip(load_base(source), name),
        source.label,
        chosen,
        tuple(ranks or (adapter["rank"],)),
        dict.fromkeys(chosen, active or len(open_targets)),
        adapter["targets"],
        None if active else open_targets,
        load_config(Path(name) / "config.yaml", []).train.train_rest,
    )


def _row(subject: _Subject, cost: Cost, kind: AdapterKind, rank: int) -> dict[str, Any]:
    """One kind and rank by the convention that selora itself follows while a model is not merged."""
    convention = OWN_CONVENTION[kind]
    unmerged = _total(cost.base, cost.overhead(rank, convention, subject.targets))
    pruned = _total(cost.base, _pruned(subject, cost, kind, rank, convention))
    return {
        "kind": kind,
        "rank": rank,
        "convention": convention,
        "active": subject.active[kind],
        "adapter_parameters": cost.adapter_parameters(rank, kind, subject.targets),
        "trainable_parameters": cost.adapter_parameters(rank, kind, subject.targets)
        + trained_parameters(subject.model, subject.train_rest, "none"),
        "unmerged": {"macs": unmerged, "counted": counted_adapter_macs(subject.model, rank, kind, subject.targets)},
        "pruned": {"macs": pruned},
        "merged": {"macs": cost.base},
        "unmerged_to_pruned": sum(unmerged.values()) / sum(pruned.values()),
    }


def _pruned(subject: _Subject, cost: Cost, kind: AdapterKind, rank: int, convention: str) -> Macs:
    """Overhead of the open blocks: exact if their names are known, otherwise that of as many average blocks."""
    if subject.open_targets is not None:
        return cost.overhead(rank, convention, subject.open_targets)
    sites = len(cost.sites if subject.targets is None else subject.targets)
    return {
        tower: macs * subject.active[kind] // sites
        for tower, macs in cost.overhead(rank, convention, subject.targets).items()
    }


def _total(base: Macs, overhead: Macs) -> Macs:
    return {tower: base[tower] + overhead[tower] for tower in base}


def _conventions(subject: _Subject, cost: Cost, rank: int) -> list[dict[str, Any]]:
    base = sum(cost.base.values())
    rows = []
    for kind in subject.kinds:
        for name in (name for name, convention in CONVENTIONS.items() if kind in convention.kinds):
            overhead = sum(cost.overhead(rank, name, subject.targets).values())
            pruned = base + sum(_pruned(subject, cost, kind, rank, name).values())
            rows.append(
                {
                    "convention": name,
                    "kind": kind,
                    "rank": rank,
                    "meaning": CONVENTIONS[name].meaning,
                    "overhead": overhead,
                    "to_plain": (base + overhead) / base,
                    "to_pruned": (base + overhead) / pruned,
                }
            )
    return rows


def paper_claims(cost: Cost) -> list[dict[str, Any]]:
    """The paper's "2.9 and 5 times fewer FLOPs" by each convention; which blocks stayed open is not published.

    So a ratio is a range: from that number of fc1 blocks of the image tower, of which most stay open, to average
    blocks. Empty for models without the 144 blocks of ViT-B/16.
    """
    if len(cost.sites) != PAPER_BLOCKS:
        return []
    base = sum(cost.base.values())
    found = []
    for name, convention in CONVENTIONS.items():
        for kind in convention.kinds:
            number = PAPER_ACTIVE[kind]
            whole = base + sum(cost.overhead(PAPER_RANK, name).values())
            fc1 = [site.target for site in cost.sites if site.tower == "image" and site.target.endswith(".fc1")]
            narrow = base + sum(cost.overhead(PAPER_RANK, name, fc1[:number]).values())
            average = base + (whole - base) * number / PAPER_BLOCKS
            ratios = sorted((whole / average, whole / narrow))
            claim = PAPER_RATIO[kind]
            # the claims have at most two digits, so their uncertainty is half a unit in the last place
            fits = ratios[0] - 0.05 <= claim <= ratios[1] + 0.05
            found.append(
                {"kind": kind, "claim": claim, "convention": name, "low": ratios[0], "high": ratios[1], "fits": fits}
            )
    return found


def _latency(subject: _Subject, cost: Cost, kind: AdapterKind, batch: int, device: torch.device) -> dict[str, Any]:
    rank = max(subject.ranks)
    names = [site.target for site in cost.sites if subject.targets is None or site.target in subject.targets]
    number = subject.active[kind]
    spread = [names[index * len(names) // number] for index in range(number)] if number else []
    active = spread if subject.open_targets is None else subject.open_targets
    seconds = latencies(subject.model, rank, kind, active, batch=batch, device=device)
    return {
        "batch": batch,
        "kind": kind,
        "rank": rank,
        "device": str(device),
        "threads": torch.get_num_threads(),
        "load": os.getloadavg()[0],
        "seconds": seconds,
    }


def format_report(report: dict[str, Any]) -> str:
    """The report as text for a terminal."""
    plain, counted = report["plain"]["macs"], report["plain"]["counted"]
    lines = [
        f"{report['model']}: {report['parameters'] / 1e6:.2f} M parameters, {report['blocks']} blocks",
        f"plain or merged: {_gmac(plain['image'])} an image + {_gmac(plain['text'])} a text "
        f"= {_gmac(sum(plain.values()))} GMAC; torch's counter: {_gmac(sum(counted.values()))}",
        "",
        text_table(_HEAD, [_shown_row(row, sum(plain.values())) for row in report["rows"]]),
    ]
    conventions = report["conventions"]
    lines += ["", f"rank {conventions[0]['rank']} by counting convention, one image and one text:"]
    cells = [
        (row["kind"], row["convention"], f"+{_gmac(row['overhead'])} GMAC", f"{row['to_plain']:.2f} x plain",
         f"{row['to_pruned']:.2f} x pruned", f"({row['meaning']})")
        for row in conventions
    ]  # fmt: skip
    lines.append(text_table((), cells, left=6))
    if report["paper"]:
        lines += ["", *_shown_claims(report["paper"])]
    lines += [line for each in report["latency"] for line in ("", *_shown_latency(each))]
    return "\n".join(lines)


# MAC are in GMAC, of one image and one text.
_HEAD = (
    "kind", "rank", "blocks M", "trainable M", "unmerged: image", "text", "sum", "counted", "x plain", "pruned to",
    "sum", "unmerged/pruned",
)  # fmt: skip


def _shown_row(row: dict[str, Any], plain: int) -> tuple[str, ...]:
    macs = row["unmerged"]["macs"]
    total, pruned = sum(macs.values()), sum(row["pruned"]["macs"].values())
    return (
        row["kind"],
        str(row["rank"]),
        f"{row['adapter_parameters'] / 1e6:.2f}",
        f"{row['trainable_parameters'] / 1e6:.2f}",
        _gmac(macs["image"]),
        _gmac(macs["text"]),
        _gmac(total),
        _gmac(sum(row["unmerged"]["counted"].values())),
        f"{total / plain:.2f}",
        str(row["active"]),
        _gmac(pruned),
        f"{row['unmerged_to_pruned']:.2f}",
    )


def _shown_claims(rows: list[dict[str, Any]]) -> list[str]:
    lines = [f"the paper's claims at rank {PAPER_RANK}, all blocks against the gated model, by counting convention:"]
    for kind in KINDS:
        own = next(row for row in rows if row["kind"] == kind and row["convention"] == "merged")
        fitting = [
            f"{r['convention']} ({r['low']:.2f} to {r['high']:.2f})" for r in rows if r["kind"] == kind and r["fits"]
        ]
        two_path = next(row for row in rows if row["kind"] == kind and row["convention"] == OWN_CONVENTION[kind])
        lines.append(
            f"  {kind} {own['claim']}x with {PAPER_ACTIVE[kind]} of {PAPER_BLOCKS} open: reproduced by "
            f"{', '.join(fitting) or 'no convention'}; by selora's own, {two_path['convention']}, it is "
            f"{two_path['low']:.2f} to {two_path['high']:.2f}, and 1.00 once merged"
        )
    return lines


def _shown_latency(row: dict[str, Any]) -> list[str]:
    seconds, plain = row["seconds"], row["seconds"]["plain"]
    shown = "  ".join(f"{state} {1000 * spent:.1f} ms ({spent / plain:.2f})" for state, spent in seconds.items())
    return [
        f"latency of {row['kind']} rank {row['rank']}, batch {row['batch']}, {row['device']}, "
        f"{row['threads']} threads, load {row['load']:.1f} (median, x plain; merged is plain):",
        f"  {shown}",
    ]


def _gmac(macs: int) -> str:
    return f"{macs / 1e9:.2f}"
