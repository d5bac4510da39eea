"""Tables of the report: all runs, and for each kind of adapter the layout of Tables 10 to 15 of the paper."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import mean

from pipeline.evaluation.summary import Summary
from pipeline.report.floors import at_floors
from pipeline.report.paper.clip_rows import CLIP_ROW, Published, published
from pipeline.report.paper.vision_rows import PublishedTarget, published_target
from pipeline.report.records import Collection, Run
from pipeline.report.series import configurations, labels
from pipeline.report.style import GROUPS
from pipeline.report.table import Kind, Table, percent

# (metric of the result files, its name in Tables 14 and 15 of the paper, where IR is image to text).
RECALLS = (
    ("text_retrieval_recall@1", "IR@1"),
    ("text_retrieval_recall@5", "IR@5"),
    ("image_retrieval_recall@1", "TR@1"),
    ("image_retrieval_recall@5", "TR@5"),
)
_TITLES = {
    "shift": "Distribution shift",
    "zero-shot": "Zero-shot classification",
    "retrieval": "Retrieval",
    "source": "Pretraining set (K-NN)",
}


def tables(collection: Collection) -> list[Table]:
    """The table of runs, that of floors, then one per group other than id and kind of adapter that has results."""
    floors = [table for part in collection.parts if (table := at_floors(part)) is not None]
    return [overview(collection), *floors[:1]] + [
        table
        for part in collection.parts
        for kind in _kinds(part)
        for group in _TITLES
        if (table := by_dataset(part, kind, group)) is not None
    ]


def _kinds(collection: Collection) -> list[str]:
    runs = _evaluated(collection)
    kinds = [kind for kind in ("lora", "dora") if any(run.settings.kind == kind for run in runs)]
    # If no run has adapters, full fine-tuning is still shown.
    return kinds or ["none"] if runs else []


def _evaluated(collection: Collection) -> list[Run]:
    return [run for run in collection.runs if run.summary is not None]


def overview(collection: Collection) -> Table:
    """A row per run: its method, its progress, the evaluated groups, and the share kept."""
    known = {entry["group"] for entry in collection.datasets.values()}
    groups = [name for name in GROUPS if name in known or name == "id"]
    compared = any(run.best is not None for run in collection.runs)
    last = ["forgetting (points)", *(["best and last checkpoint (%)"] if compared else [])]
    head = (
        ("", ("run", "method", "rank", "λ", "seed", "state", "active blocks")),
        ("mean of the group (%)", tuple(GROUPS[name] for name in groups)),
        ("kept (%)", ("mean", "worst", "worst set")),
        ("", tuple(last)),
    )
    starred = {part.chosen.name for part in collection.parts if part.chosen is not None}
    rows: list[list[str]] = []
    kinds: list[Kind] = []
    named = labels(collection.runs)
    if collection.untouched:
        means = [percent(collection.untouched.get(name)) for name in groups]
        rows.append(["untouched model", *[""] * 6, *means, "100.0", "100.0", "", "0.00", *[""] * compared])
        kinds.append("reference")
    for run in collection.runs:
        chosen = run.name in starred
        rows.append([
            ("★ " if chosen else "") + run.name,
            named[run.name],
            *_facts(run),
            *(percent(run.group(name)) for name in groups),
            *_kept(run),
            *([_best_and_last(run)] if compared else []),
        ])  # fmt: skip
        kinds.append("chosen" if chosen else "failed" if run.status == "failed" else "run")
    return Table(
        "runs", "All runs", head, rows, kinds, _overview_notes(collection, starred=bool(starred), compared=compared)
    )


def _facts(run: Run) -> list[str]:
    """Rank, λ, seed, state and active blocks."""
    settings = run.settings
    return [
        "" if settings.rank is None else str(settings.rank),
        "" if settings.lam is None else f"{settings.lam:g}",
        str(settings.seed),
        state(run),
        f"{sum(run.gates.values())} of {len(run.gates)}" if run.gates else "",
    ]


def _overview_notes(collection: Collection, *, starred: bool, compared: bool) -> list[str]:
    """How to read the table of all runs."""
    notes = [
        "Kept: result / result of the untouched model, as mean over the data sets of the groups other than "
        "in-distribution, each counted as 100 % at most, and of the worst of them; a set on which the untouched model "
        "is no better than guessing does not count. Forgetting: mean drop over these groups, in points."
    ]
    if starred:
        of_each = " of each target set" if len(collection.parts) > 1 else ""
        over = " over guessing" if collection.classifies else ""
        how = (
            f"the model on the Pareto front with the largest harmonic mean of in-distribution gain{over} (as share of "
            "the best gain) and kept."
            if collection.floor is None
            else f"the most in-distribution at the largest strength that keeps {100 * collection.floor:g} %; the table "
            "of accuracy at a share kept has it, and this one the whole fine-tuning."
        )
        notes.append(f"★ chosen{of_each}: {how}")
    if compared:
        notes.append(
            "Best checkpoint: the highest in-distribution accuracy of those kept; it was chosen by this number, which "
            "is therefore too optimistic. A run that was evaluated at no other shows it in all its columns."
        )
    return notes


def _kept(run: Run) -> list[str]:
    """The mean share kept, the worst dataset's share, its name, and the forgetting in points."""
    one, forgetting = run.point, None if run.summary is None else run.summary["forgetting"]
    shares = ["", "", ""] if one is None else [percent(one.kept), percent(one.worst_kept), one.worst]
    return [*shares, "" if forgetting is None else f"{100 * forgetting:.2f}"]


def _best_and_last(run: Run) -> str:
    best = run.best
    if best is None:
        return ""
    shown = f"{percent(best.id, 2)} at step {best.step}"
    if best.step == best.last_step:
        return f"{shown}, the last"
    return f"{shown}, {percent(best.last_id, 2)} at {best.last_step}"


def state(run: Run) -> str:
    """ "finished", "training 120/500", "failed at step 40: the loss is not finite"."""
    of = f"/{run.total_steps}" if run.total_steps else ""
    if run.status == "training":
        return f"training {run.step}{of}"
    if run.status in ("failed", "stopped"):
        text = f"{run.status} at step {run.step}{of}"
        return f"{text}: {run.error}" if run.error else text
    return run.status


@dataclass(frozen=True)
class _Columns:
    """The cells of a run in a table by dataset: id datasets, then the group's columns, with means as in the paper."""

    group: str
    ids: Sequence[str]
    sets: Sequence[str]  # datasets of the group; those that are not part of its mean come last
    outside: Sequence[str]

    @property
    def one_source(self) -> bool:
        """Whether the layout is that of Tables 3 to 9 of the paper: target, source set, and the mean of both."""
        return self.group == "source" and len(self.sets) == 1

    def names(self) -> list[tuple[str, list[str]]]:
        ids = [*self.ids, *(["id mean"] if len(self.ids) > 1 else [])]
        if self.group == "retrieval":
            return [("", ids), *((key, [name for _, name in RECALLS]) for key in self.sets), ("", ["mean", "both"])]
        sets = [f"{key}†" if key in self.outside else key for key in self.sets]
        if self.one_source:
            return [("", ids), (f"{GROUPS[self.group]}, K-NN", sets), ("", ["mean"])]
        return [("", ids), (GROUPS[self.group], [*sets, "mean"]), ("", ["both"])]

    def values(self, value: Callable[[str, str | None], float | None]) -> list[float | None]:
        """`value(dataset, metric)` for each name; a mean needs all of its parts."""
        ids = [value(key, None) for key in self.ids]
        id_mean = _mean(ids)
        counted = _mean([value(key, None) for key in self.sets if key not in self.outside])
        if self.group == "retrieval":
            cells = [value(key, metric) for key in self.sets for metric, _ in RECALLS]
        else:
            cells = [value(key, None) for key in self.sets]
        means = [_mean([id_mean, counted])]
        return [*ids, *([id_mean] if len(ids) > 1 else []), *cells, *([] if self.one_source else [counted]), *means]


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return mean(known) if known and len(known) == len(values) else None


def by_dataset(collection: Collection, kind: str, group: str) -> Table | None:
    """One of the six tables; None if the benchmark has no dataset of this group."""
    members = {key: entry for key, entry in collection.datasets.items() if entry["group"] == group}
    ids = [key for key, entry in collection.datasets.items() if entry["group"] == "id" and entry["in_mean"]]
    if not members or not ids:
        return None
    outside = [key for key, entry in members.items() if not entry["in_mean"]]
    columns = _Columns(group, ids, [key for key in members if key not in outside] + outside, outside)
    if collection.classifies and group == "source" and len(ids) == 1:
        paper = published_target(_of_kind(collection, kind), ids[0], columns.sets)
    else:
        paper = published(collection, kind, group, columns.ids, columns.sets)
    rows: list[list[str]] = []
    kinds: list[Kind] = []
    for row_kind, cells, ours in _rows(collection, kind, columns):
        rows.append(cells)
        kinds.append(row_kind)
        match = paper.row(ours) if paper is not None and ours is not None else None
        if match is not None:
            rows.append(match)
            kinds.append("paper")
    method = {"lora": ", LoRA", "dora": ", DoRA"}.get(kind, "")
    key, title = f"{group}-{kind}", _TITLES[group]
    if collection.classifies:
        key, title = "-".join([*ids, kind]), f"{', '.join(ids)} and what the model was pretrained on"
    head = [("", ["method", "rank", "λ", "blocks (%)", "seeds"]), *columns.names()]
    return Table(key, title + method, head, rows, kinds, _notes(columns, paper))


def _rows(collection: Collection, kind: str, columns: _Columns) -> Iterator[tuple[Kind, list[str], Run | str | None]]:
    """The untouched model, runs without adapters, adapters without and with gates; the seeds of a setting as a mean.

    The last item of each is the setting, for which the paper may have a row.
    """
    before = {key: entry["baseline"] for key, entry in collection.datasets.items()}
    recalls: dict[str, Mapping[str, float]] = {}
    for run in collection.runs:
        recalls |= run.untouched
    reference = columns.values(
        lambda key, metric: before.get(key) if metric is None else recalls.get(key, {}).get(metric)
    )
    if any(value is not None for value in reference):
        yield (
            "reference",
            ["untouched model", "", "", "", "", *_means([reference], 2 if columns.one_source else 1)],
            CLIP_ROW,
        )
    runs = _of_kind(collection, kind)
    named = labels(runs)
    for same in sorted(configurations(runs), key=_order):
        settings, best = same[0].settings, _best_of(same)
        axes = [
            "" if settings.rank is None else str(settings.rank),
            "" if settings.lam is None else f"{settings.lam:g}",
        ]
        digits = 2 if columns.one_source else 1  # as the paper's Tables 3 to 9
        name = named[same[0].name] + (f", {best}" if same[0].best_alone else "")
        shares, values = [collection.active_share(run) for run in same], [columns.values(_reader(run)) for run in same]
        chosen = collection.chosen is not None and collection.chosen in same
        own = [name, *axes, percent(_mean(shares), 2), str(len(same)), *_means(values, digits)]
        more = best is not None and not any(run.best_alone for run in same)
        yield "chosen" if chosen else "run", own, None if more else same[0]
        if more:
            compared = [run.best for run in same if run.best is not None]
            if settings.random_k is None:  # random blocks have no gates
                shares = [each.active_share for each in compared]
            values = [columns.values(_values(each.summary, {})) for each in compared]
            cells = [best or "", *axes, percent(_mean(shares), 2), str(len(same)), *_means(values, digits)]
            yield "best", cells, same[0]


def _of_kind(collection: Collection, kind: str) -> list[Run]:
    return [run for run in _evaluated(collection) if run.settings.kind in (kind, "full", "none")]


def _means(values: Sequence[Sequence[float | None]], digits: int) -> list[str]:
    """The mean of each column over seeds."""
    return [percent(_mean(cells), digits) for cells in zip(*values, strict=True)]


def _best_of(same: Sequence[Run]) -> str | None:
    """Label of the best checkpoints of these seeds; None unless every seed has one."""
    steps = {run.best.step for run in same if run.best is not None}
    if any(run.best is None for run in same):
        return None
    return f"best checkpoint, step {steps.pop()}" if len(steps) == 1 else "best checkpoint of each"


def _order(same: Sequence[Run]) -> tuple[bool, bool, bool, bool, float, float]:
    settings = same[0].settings
    has_blocks = settings.rank is not None
    return (
        has_blocks,
        settings.kind == "full",
        settings.random_k is not None,
        settings.gated,
        settings.lam or 0.0,
        settings.rank or 0,
    )


def _reader(run: Run) -> Callable[[str, str | None], float | None]:
    return _values(run.summary, run.metrics)


def _values(
    summary: Summary | None, metrics: Mapping[str, Mapping[str, float]]
) -> Callable[[str, str | None], float | None]:
    datasets = {} if summary is None else summary["datasets"]

    def value(key: str, metric: str | None) -> float | None:
        if metric is None:
            return datasets[key]["value"] if key in datasets else None
        return metrics.get(key, {}).get(metric)

    return value


def _notes(columns: _Columns, paper: Published | PublishedTarget | None) -> list[str]:
    notes = ["mean: of the sets of this table; both: mean of in-distribution and of that mean, as in the paper."]
    if columns.group == "retrieval":
        notes[0] = "IR@k: image to text, TR@k: text to image, as the paper names them. " + notes[0].replace(
            "sets", "recalls"
        )
    if columns.one_source:
        notes[0] = (
            f"{', '.join(columns.ids)}: by the classifier that was trained; {columns.sets[0]}: by K-NN among its "
            f"training images; mean: of both, as in the paper's Tables 3 to 9."
        )
    if columns.outside:
        notes.append("† not part of the mean.")
    if paper is not None:
        notes += paper.notes
    return notes
