"""The numbers of the paper for its DINO models (Tables 1 to 9), for rows that have a configuration of the paper."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from pipeline.config import VIT_SCHEMA
from pipeline.report.paper.tables import PaperRow, table, wrong_cells
from pipeline.report.records import Run, RunSettings

_SMALL, _BASE = "vit_small_patch16_224.dino", "vit_base_patch16_224.dino"
_TABLE = {
    (_SMALL, "cifar10"): 3, (_SMALL, "cifar100"): 4, (_BASE, "cifar100"): 5,
    (_SMALL, "dtd"): 6, (_SMALL, "pets"): 7, (_SMALL, "flowers"): 8, (_SMALL, "food101"): 9,
}  # fmt: skip
_BENCHMARK, _SOURCE = "vision", "imagenet100"  # names in configs/benchmark/vision.yaml
_SETTINGS_TABLE = 4  # Tables 1 and 2 are of its model and target
_RANDOM, _RANDOM_RANK = {5: "Random 6.94", 10: "Random 22.2"}, 16
# The paper does not give the lambda of Table 2; its l1 is that of Table 4 at rank 128 and lambda 1.
_PENALTY, _PENALTY_RANK, _PENALTY_LAM = {"l2": "l2 11.1", "hinge": "hinge 22.2"}, 128, 1.0


@dataclass(frozen=True)
class PublishedTarget:
    """The rows of one target set. After the first five, our columns are that set, the source set and their mean."""

    target: str
    notes: Sequence[str]

    def row(self, ours: Run | str) -> list[str] | None:
        """The paper's row for this configuration; None if it has none, as for the untouched model."""
        if isinstance(ours, str):
            return None
        found = _find(ours.settings, self.target)
        if found is None:
            return None
        rank, lam = ("" if value is None else f"{value:g}" for value in (ours.settings.rank, ours.settings.lam))
        *_, target, source, mean = found.cells
        front = [f"paper, Table {found.table}", rank, lam, _cell(found, "blocks"), ""]
        return front + [_cell(found, column) for column in (target, source, mean)]


def published_target(runs: Sequence[Run], target: str, sources: Sequence[str]) -> PublishedTarget | None:
    """The paper's rows for runs on this target set; None unless benchmark and any of the models are the paper's."""
    summaries = [run.summary for run in runs if run.summary is not None]
    theirs = all(each["benchmark"] == _BENCHMARK and each["limit"] is None for each in summaries)
    found = [row for run in runs if (row := _find(run.settings, target)) is not None]
    if not theirs or list(sources) != [_SOURCE] or not found:
        return None
    return PublishedTarget(target, list(_notes(found)))


def _notes(found: Sequence[PaperRow]) -> Iterable[str]:
    *others, last = sorted({str(row.table) for row in found})
    which = f"Tables {', '.join(others)} and {last}" if others else f"Table {last}"
    yield (
        f"paper: {which} of arXiv 2501.15377, one seed each; the checkpoint with the best validation accuracy, which "
        f"is that of the test images where a set has no validation split."
    )
    for row in dict.fromkeys((row.table, row.name) for row in found):
        for (name, _), text in wrong_cells(row[0]).items():
            if name == _wrong_name(row[1]):
                yield f"* {text}"


def _cell(row: PaperRow, column: str) -> str:
    printed = row.cells[column]
    return f"{printed}*" if (_wrong_name(row.name), column) in wrong_cells(row.table) else printed


def _wrong_name(name: str) -> str:
    """The row of an erratum: pairs in Table 1 have one number of blocks, listed as that of Ours."""
    return name.replace("Random", "Ours")


def _find(settings: RunSettings, target: str) -> PaperRow | None:
    """The row of Tables 1 to 9 with this configuration. The model is recognised by its tag, as in `selora doctor`."""
    number = _TABLE.get((settings.model.removeprefix(VIT_SCHEMA), target))
    if number is None:
        return None
    name = _name(settings)
    numbers = (number, 1, 2) if number == _SETTINGS_TABLE else (number,)
    return next((row for each in numbers for row in table(each) if row.name == name), None)


def _name(settings: RunSettings) -> str | None:
    """Name of a configuration in the nine tables of the paper."""
    if settings.kind == "full":
        return "FT"
    if settings.kind == "none":
        return "Linear" if settings.is_linear else None
    if settings.kind != "lora":
        return None
    if settings.random_k is not None:
        return _RANDOM.get(settings.random_k) if settings.rank == _RANDOM_RANK else None
    if not settings.gated:
        return f"LoRA {settings.rank}"
    if settings.penalty == "l1":
        return f"Ours {settings.rank} {settings.lam:g}"
    at = settings.rank == _PENALTY_RANK and settings.lam == _PENALTY_LAM
    return _PENALTY.get(str(settings.penalty)) if at else None
