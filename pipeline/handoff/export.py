"""A run's checkpoint in the layout of open_clip, Hugging Face, PEFT or timm, read back by that library first."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.config import ConfigError
from pipeline.handoff.readback import READERS
from pipeline.handoff.source import Mismatch, Source, read_source
from pipeline.model.between import weaken
from pipeline.model.export import BASE, fixed_batch, own_logits, write_hf, write_open_clip, write_peft, write_timm
from pipeline.model.load import as_clip
from pipeline.model.restore import find_run, load_adapted, load_base
from pipeline.model.vit import Vit, is_vit

FACTS_FILE = "selora.json"
TOLERANCE, RELATIVE = 1e-4, 1e-6  # of a logit, in fp32


@dataclass(frozen=True)
class ExportReport:
    """What was written. difference: the largest of a logit, None if it was not compared."""

    directory: Path
    to: str
    verified_by: str | None
    difference: float | None
    tolerance: float
    notes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        if self.difference is None:
            checked = "NOT read back by its library"
        else:
            checked = f"read back by {self.verified_by}: logits differ by {self.difference:.1e} at most"
            checked += f", {self.tolerance:.1e} allowed"
        return "\n".join([*self.notes, f"{self.directory}: {self.to} export, {checked}"])


def export(
    run_dir: str | Path,
    to: str,
    out: str | Path,
    *,
    merged: bool | None = None,
    step: int | None = None,
    verify: bool = True,
    base_name: str | None = None,
    force: bool = False,
    strength: float = 1.0,
) -> ExportReport:
    """Write the newest (or chosen) checkpoint of a run to `out` as "open_clip", "hf" or "peft", a ViT as "timm".

    merged: None as the format has it: peft keeps the adapters, the others merge them. base_name: what a PEFT adapter
    calls its base (default: the path of the base written beside it). force: replace an earlier export in `out`.
    strength: of the fine-tuning in (0, 1], weights W0 + strength (W1 − W0).
    Nothing is at `out` before the stock library has given the logits of the run's own model on a fixed batch.
    """
    out = Path(out).absolute()
    _check_request(to, merged, base_name)
    _check_free(out, force)
    _check_fits(to, find_run(run_dir, step).state["model"]["name"])
    if verify:
        READERS[to].check_installed()
    source = read_source(run_dir, step, strength)
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        notes = WRITERS[to](source, partial, base_name or str(out / BASE))
        report = (
            _read_back(source, to, partial, out, notes) if verify else ExportReport(out, to, None, None, 0.0, notes)
        )
        (partial / FACTS_FILE).write_text(json.dumps(_facts(source, report), indent=1) + "\n", encoding="utf-8")
        if out.exists():
            shutil.rmtree(out)
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return report


def _write_open_clip(source: Source, directory: Path, base_name: str) -> list[str]:  # noqa: ARG001
    write_open_clip(source.clip, directory)
    return []


def _write_hf(source: Source, directory: Path, base_name: str) -> list[str]:  # noqa: ARG001
    write_hf(source.clip, directory)
    return []


def _write_timm(source: Source, directory: Path, base_name: str) -> list[str]:  # noqa: ARG001
    assert isinstance(source.model, Vit)  # _check_fits
    write_timm(source.model, directory)
    return []


def _write_peft(source: Source, directory: Path, base_name: str) -> list[str]:
    kind = source.found.state["adapter"]["kind"]
    if kind not in ("lora", "dora"):
        raise ConfigError(f"to=peft: the run trained adapter.kind={kind}, which has no adapters; export it to hf")
    if kind == "dora" and source.strength != 1:
        raise ConfigError(
            f"strength={source.strength:g}: a DoRA adapter has no factor that scales what it adds, so PEFT cannot hold "
            "it at a strength; export the merged model (--to hf)"
        )
    model = as_clip(load_adapted(source.found), "to=peft")
    weaken(model.model, load_base(source.found).model, source.strength)
    write_peft(model, directory, base_name)
    notes = [] if source.strength == 1 else [f"strength {source.strength:g}: lora_alpha is scaled by it"]
    notes += [f"adapters of {len(source.active)} active blocks of {len(source.gate_map)}"]
    if source.found.train_rest != "none":
        notes.append(
            f"train.train_rest={source.found.train_rest}: what trained outside the blocks is in {BASE}/, so the "
            "adapter gives the fine-tuned model on that base only"
        )
    return notes


Writer = Callable[[Source, Path, str], list[str]]
CLIP_WRITERS: dict[str, Writer] = {"open_clip": _write_open_clip, "hf": _write_hf, "peft": _write_peft}
VIT_WRITERS: dict[str, Writer] = {"timm": _write_timm}
WRITERS = CLIP_WRITERS | VIT_WRITERS


def _check_request(to: str, merged: bool | None, base_name: str | None) -> None:
    if to not in WRITERS:
        raise ConfigError(f"to={to!r}: expected one of {', '.join(WRITERS)}")
    if merged is False and to != "peft":
        kept = "" if to in VIT_WRITERS else "; kept adapters are --to peft, which writes an HF base, too"
        raise ConfigError(f"to={to} holds merged weights only{kept}")
    if merged is True and to == "peft":
        raise ConfigError("to=peft keeps the adapters; merged weights are --to hf or --to open_clip")
    if base_name is not None and to != "peft":
        raise ConfigError(f"base_name={base_name!r}: only a PEFT adapter names its base")


def _check_fits(to: str, model: str) -> None:
    kind, writers = ("ViT", VIT_WRITERS) if is_vit(model) else ("CLIP", CLIP_WRITERS)
    if to not in writers:
        raise ConfigError(f"to={to}: {model} is a {kind}, which is exported to {' or '.join(writers)}")


def _check_free(out: Path, force: bool) -> None:
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    ours = (out / FACTS_FILE).is_file()
    if not ours:
        raise ConfigError(f"{out} is there and is no export: choose another directory")
    if not force:
        raise ConfigError(f"{out} holds an export: choose another directory, or replace it with --force")


def _read_back(source: Source, to: str, partial: Path, out: Path, notes: list[str]) -> ExportReport:
    """Compare; Mismatch when the stock library sees another model."""
    batch = fixed_batch(source.model)
    wanted = own_logits(source.model, *batch)
    found = READERS[to].read(partial, *batch)
    difference = float((found - wanted).abs().max())
    tolerance = TOLERANCE + RELATIVE * float(wanted.abs().max())
    if not difference <= tolerance:
        raise Mismatch(
            f"{READERS[to].name} gives other logits than the run's model: {difference:.2g}, {tolerance:.2g} allowed; "
            f"nothing was left at {out}"
        )
    return ExportReport(out, to, READERS[to].name, difference, tolerance, notes)


def _facts(source: Source, report: ExportReport) -> dict[str, Any]:
    return {
        "format": "selora-export",
        "version": 1,
        "to": report.to,
        **source.facts(),
        "gates": source.gate_map,
        "verified_by": report.verified_by,
        "largest_difference": report.difference,
        "tolerance": report.tolerance if report.difference is not None else None,
        "notes": report.notes,
    }
