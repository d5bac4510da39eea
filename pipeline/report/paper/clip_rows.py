"""The numbers of the paper for rows of a table that have a configuration of the paper."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pipeline.report.paper.tables import PaperRow, table, wrong_cells
from pipeline.report.records import Collection, Run

CLIP_ROW = "CLIP"  # the untouched model instead of a run
_PAPER_MODELS = ("ViT-B-16", "ViT-B-16-quickgelu")
_PAPER_LAM, _PAPER_PENALTY = 1.0, "l1"
_TABLE = {
    ("lora", "shift"): 10, ("dora", "shift"): 11,
    ("lora", "zero-shot"): 12, ("dora", "zero-shot"): 13,
    ("lora", "retrieval"): 14, ("dora", "retrieval"): 15,
}  # fmt: skip
_BENCHMARK = "paper"  # name in configs/benchmark/paper.yaml; the keys below are also from there
_COLUMN = {
    "imagenet": "IN-1K", "imagenet-a": "IN-A", "imagenetv2": "IN-V2", "imagenet_sketch": "IN-S", "imagenet-r": "IN-R",
    "objectnet": "ON", "cifar10": "C10", "cifar100": "C100", "dtd": "DTD", "mnist": "MNI", "sun397": "SUN",
    "fgvc_aircraft": "AIR", "flowers": "FLW", "food101": "FOD", "pets": "Pets",
    "mscoco": "COCO", "flickr30k": "Flickr30k",
}  # fmt: skip
_RECALLS = ("IR@1", "IR@5", "TR@1", "TR@5")


@dataclass(frozen=True)
class Published:
    """Rows of one table of the paper, in our columns; "" where the paper has no number."""

    number: int
    columns: Sequence[str | None]  # the paper's name for each of our columns after the first five
    wrong: Mapping[tuple[str, str], str]  # {(row, column): correct value}
    notes: Sequence[str]

    def row(self, ours: Run | str) -> list[str] | None:
        """The paper's row for this configuration; None if it has none."""
        name = CLIP_ROW if isinstance(ours, str) else _name(ours)
        found = next((row for row in table(self.number) if row.name == name), None)
        if found is None:
            return None
        rank, gated = found.cells["rank"], found.cells["method"] == "Ours"
        front = ["paper", rank, f"{_PAPER_LAM:g}" if gated else "", self._cell(found, "blocks"), ""]
        return front + [self._cell(found, column) if column is not None else "" for column in self.columns]

    def _cell(self, row: PaperRow, column: str) -> str:
        printed = row.cells.get(column, "")
        return f"{printed}*" if (row.name, column) in self.wrong else printed


def _name(run: Run) -> str | None:
    """Name of a run's configuration in Tables 10 to 15; None if they have no such row."""
    settings = run.settings
    if settings.model.replace("/", "-") not in _PAPER_MODELS or settings.pretrained != "openai":
        return None
    if settings.kind == "full":
        return "FLYP"
    if settings.rank is None or settings.random_k is not None:
        return None
    if not settings.gated:
        return f"{'LoRA' if settings.kind == 'lora' else 'DoRA'} {settings.rank}"
    the_papers = settings.lam == _PAPER_LAM and settings.penalty == _PAPER_PENALTY
    return f"Ours {settings.rank}" if the_papers else None


def published(
    collection: Collection, kind: str, group: str, ids: Sequence[str], sets: Sequence[str]
) -> Published | None:
    """The paper's table of this kind and group; None unless model and benchmark are the paper's."""
    number = _TABLE.get((kind, group))
    names = {key: _COLUMN.get(key) for key in (*ids, *sets)}
    whole = all(run.summary["limit"] is None for run in collection.runs if run.summary is not None)
    if number is None or collection.benchmark != _BENCHMARK or not whole:
        return None
    if len(ids) != 1 or not any(_name(run) for run in collection.runs):
        return None
    mean_column = None if group == "retrieval" else "inner mean"
    if group == "retrieval":
        columns = [names[ids[0]], *(f"{names[key]} {recall}" for key in sets for recall in _RECALLS)]
    else:
        columns = [names[key] for key in (*ids, *sets)]
    missing = {key for key in table(number)[0].values if key not in columns}
    if missing:
        return None
    wrong = wrong_cells(number)
    notes = [f"paper: Table {number} of arXiv 2501.15377, trained on ImageNet-1K."]
    notes += [f"* {text}" for text in wrong.values()]
    return Published(number, [*columns, mean_column, "mean"], wrong, notes)
