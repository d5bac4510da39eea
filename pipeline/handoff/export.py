"""A run's checkpoint in the layout of open_clip, Hugging Face, PEFT, timm, ONNX or Triton, read back for a check."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.config import ConfigError
from pipeline.handoff.card.facts import CardFacts
from pipeline.handoff.card.text import write_card
from pipeline.handoff.graphs import (
    FILES,
    GraphOptions,
    compare_graphs,
    graph_facts,
    measure_loss,
    write_graph_export,
)
from pipeline.handoff.readback import READERS
from pipeline.handoff.source import Mismatch, TrainedModel, read_source
from pipeline.model.between import weaken
from pipeline.model.export import BASE, fixed_batch, own_logits, write_hf, write_open_clip, write_peft, write_timm
from pipeline.model.load import as_clip
from pipeline.model.restore import find_run, load_adapted, load_base
from pipeline.model.vit import Vit, is_vit

FACTS_FILE = "selora.json"
TOLERANCE, RELATIVE = 1e-4, 1e-6  # largest difference of a logit, in fp32


@dataclass(frozen=True)
class ExportReport:
    """Result of an export.

    Attributes:
        difference: largest difference of a logit; None if it was not compared.
        loss: for weights in 8 bits, the metric before and after for each dataset of the benchmark.
    """

    directory: Path
    to: str
    verified_by: str | None
    difference: float | None
    tolerance: float
    notes: list[str] = field(default_factory=list)
    loss: list[dict[str, Any]] = field(default_factory=list)

    @property
    def checked(self) -> str:
        """The comparison of the export with the run's model."""
        if self.difference is None:
            return "NOT read back by its library"
        return (
            f"read back by {self.verified_by}: logits differ by {self.difference:.1e} at most, "
            f"{self.tolerance:.1e} allowed"
        )

    def __str__(self) -> str:
        return "\n".join([*self.notes, f"{self.directory}: {self.to} export, {self.checked}"])


@dataclass(frozen=True)
class Request:
    """A request for an export. base_name: a PEFT adapter's name of its base; graph: options of ONNX and Triton."""

    to: str
    base_name: str
    graph: GraphOptions


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
    graph: Callable[[TrainedModel], GraphOptions] | None = None,
) -> ExportReport:
    """Write a run's model for another library. `out` appears only after that library has reproduced the run's logits.

    Args:
        run_dir: directory of the run.
        to: "open_clip", "hf", "peft", "timm" (a ViT), "onnx" or "triton".
        out: new directory.
        merged: None: the default of the format: peft keeps the adapters, the others merge them.
        step: step of the checkpoint; None: the newest.
        verify: load the export with its library and compare its outputs.
        base_name: a PEFT adapter's name of its base (default: the folder of the base inside the adapter's own).
        force: replace an earlier export in `out`.
        strength: strength of the fine-tuning in (0, 1], with weights W0 + strength (W1 − W0).
        graph: function from the exported model to the options of an ONNX or Triton export.

    Returns:
        The files written and the comparison.

    Raises:
        ConfigError: a wrong request; the message names it.
        Mismatch: the library does not reproduce the run's model.
    """
    out = Path(out).absolute()
    _check_request(to, merged, base_name)
    _check_free(out, force)
    _check_fits(to, find_run(run_dir, step).state["model"]["name"])
    if verify or to in FILES:
        READERS[to].check_installed(needed=to in FILES)
    source = read_source(run_dir, step, strength)
    request = Request(to, base_name or BASE, graph(source) if graph is not None else GraphOptions())
    if request.graph.precision == "int8" and not verify:
        raise ConfigError("--int8: the loss of 8 bits is measured, so leave out --unverified")
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        notes = WRITERS[to](source, partial, request)
        plain = ExportReport(out, to, None, None, 0.0, notes)
        report = _read_back(source, request, partial, out, notes) if verify else plain
        facts = json.dumps(_facts(source, request, report), indent=1) + "\n"
        (partial / FACTS_FILE).write_text(facts, encoding="utf-8")
        _write_card(source, request, report, partial)
        if out.exists():
            shutil.rmtree(out)
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return report


def _write_open_clip(source: TrainedModel, directory: Path, request: Request) -> list[str]:  # noqa: ARG001
    write_open_clip(source.clip, directory)
    return []


def _write_hf(source: TrainedModel, directory: Path, request: Request) -> list[str]:  # noqa: ARG001
    write_hf(source.clip, directory)
    return []


def _write_timm(source: TrainedModel, directory: Path, request: Request) -> list[str]:  # noqa: ARG001
    assert isinstance(source.model, Vit)  # _check_fits
    write_timm(source.model, directory)
    return []


def _write_graphs(source: TrainedModel, directory: Path, request: Request) -> list[str]:
    return write_graph_export(source.model, request.to, directory, request.graph)


def _write_peft(source: TrainedModel, directory: Path, request: Request) -> list[str]:
    kind = source.found.state["adapter"]["kind"]
    if kind not in ("lora", "dora"):
        raise ConfigError(f"to=peft: the run trained adapter.kind={kind}, which has no adapters; export it to hf")
    if kind == "dora" and source.strength != 1:
        raise ConfigError(
            f"strength={source.strength:g}: a DoRA adapter has no scale factor, so PEFT cannot "
            "represent a strength; export the merged model (--to hf)"
        )
    model = as_clip(load_adapted(source.found), "to=peft")
    weaken(model.model, load_base(source.found).model, source.strength)
    write_peft(model, directory, request.base_name)
    notes = [] if source.strength == 1 else [f"strength {source.strength:g}: lora_alpha is scaled by it"]
    notes += [f"adapters of {len(source.active)} active blocks of {len(source.gate_map)}"]
    if source.found.train_rest != "none":
        notes.append(
            f"train.train_rest={source.found.train_rest}: weights trained outside the blocks are in {BASE}/, so the "
            "adapter gives the fine-tuned model only on that base"
        )
    return notes


Writer = Callable[[TrainedModel, Path, Request], list[str]]
GRAPH_WRITERS: dict[str, Writer] = dict.fromkeys(FILES, _write_graphs)
CLIP_WRITERS: dict[str, Writer] = {"open_clip": _write_open_clip, "hf": _write_hf, "peft": _write_peft, **GRAPH_WRITERS}
VIT_WRITERS: dict[str, Writer] = {"timm": _write_timm, **GRAPH_WRITERS}
WRITERS = CLIP_WRITERS | VIT_WRITERS


def _check_request(to: str, merged: bool | None, base_name: str | None) -> None:
    if to not in WRITERS:
        raise ConfigError(f"to={to!r}: expected one of {', '.join(WRITERS)}")
    if merged is False and to != "peft":
        kept = "" if to in VIT_WRITERS else "; kept adapters are --to peft, which also writes an HF base"
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
        raise ConfigError(f"{out} exists and is not an export: choose another directory")
    if not force:
        raise ConfigError(f"{out} holds an export: choose another directory, or replace it with --force")


def _read_back(source: TrainedModel, request: Request, partial: Path, out: Path, notes: list[str]) -> ExportReport:
    """Compare the export with the run's model; Mismatch if they differ."""
    reader, to = READERS[request.to], request.to
    if to in FILES:
        try:
            found = compare_graphs(source.model, to, partial, request.graph)
        except Mismatch as error:
            raise Mismatch(f"{error}; nothing was left at {out}") from error
        loss = measure_loss(source.model, to, partial, request.graph) if request.graph.precision == "int8" else []
        return ExportReport(out, to, reader.name, found.difference, found.tolerance, [*notes, *found.notes], loss)
    assert reader.read is not None
    batch = fixed_batch(source.model)
    wanted = own_logits(source.model, *batch)
    difference = float((reader.read(partial, *batch) - wanted).abs().max())
    tolerance = TOLERANCE + RELATIVE * float(wanted.abs().max())
    if not difference <= tolerance:
        raise Mismatch(
            f"{reader.name} gives other logits than the run's model: {difference:.2g}, {tolerance:.2g} allowed; "
            f"nothing was left at {out}"
        )
    return ExportReport(out, to, reader.name, difference, tolerance, notes)


def _write_card(source: TrainedModel, request: Request, report: ExportReport, directory: Path) -> None:
    checked = [report.checked, *report.notes]
    facts = CardFacts.of(source, request.to, source.run_dir.absolute().name, checked, report.loss)
    write_card(directory, facts, base_name=request.base_name, pixels=request.graph.pixels)


def _facts(source: TrainedModel, request: Request, report: ExportReport) -> dict[str, Any]:
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
        **({"loss_of_8_bits": report.loss} if report.loss else {}),
        **({"graphs": graph_facts(source.model, report.to, request.graph)} if report.to in FILES else {}),
    }
