"""The groups of results: their means, the change against the untouched model, and forgetting."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pipeline.display import text_table
from pipeline.evaluation.datasets.benchmark import GROUPS, Benchmark
from pipeline.evaluation.results import Result
from pipeline.selection.kept import kept_of

Summary = dict[str, Any]


def summarise(
    benchmark: Benchmark, results: Mapping[str, Result], model: Mapping[str, Any], baseline: Summary | None
) -> Summary:
    """Collect everything that tables and reports need from the result files of one model.

    Args:
        model: facts about the model (name, pretrained, model_digest, ..).
        baseline: the summary of the untouched model.

    Returns:
        Per dataset `change` = value - baseline. A group's mean and change run over its rows with `in_mean`, and its
        `with_id` is the outer mean of the paper's tables 10 to 15, in which id weighs one half, whatever the number of
        the other sets. `forgetting` is the mean drop over the groups other than id (positive: knowledge lost), `kept`
        the mean over the datasets other than id of min(1, value / baseline) and the worst of them; both are None
        without a baseline.
    """
    old = {} if baseline is None else baseline["datasets"]
    datasets = {
        row.key: {
            "group": row.group,
            "in_mean": row.in_mean,
            "metric": results[row.key]["metric"],
            "value": results[row.key]["value"],
            "chance": results[row.key]["chance"],
            "n": results[row.key]["n"],
            "interval": results[row.key].get("interval"),
        }
        | _against(results[row.key], old.get(row.key))
        for row in benchmark.rows
        if row.key in results
    }
    groups = {}
    for group in GROUPS:
        rows = [row for row in benchmark.rows if row.group == group and row.in_mean]
        if rows and any(row.key in datasets for row in rows):
            groups[group] = _group([datasets[row.key] for row in rows if row.key in datasets])
            # A classifier belongs to one target set; it does not lack the others of group id.
            expected = [] if group == "id" and model.get("classifier") else rows
            groups[group]["missing"] = [row.key for row in expected if row.key not in datasets]
    for name in groups.keys() - {"id"} if "id" in groups else ():
        groups[name]["with_id"] = (groups["id"]["mean"] + groups[name]["mean"]) / 2
    drops = [-groups[g]["change"] for g in groups if g != "id" and groups[g]["change"] is not None]
    kept = kept_of(datasets)
    return {
        **model,
        "benchmark": benchmark.name,
        "groups": groups,
        "datasets": datasets,
        "forgetting": sum(drops) / len(drops) if drops else None,
        "kept": None if kept is None else kept._asdict(),
    }


def _against(result: Result, old: Mapping[str, Any] | None) -> dict[str, float | None]:
    # A value on other images, or on some of them, is not a baseline.
    if old is None or old["dataset_digest"] != result["dataset_digest"] or old["n"] != result["n"]:
        return {"dataset_digest": result["dataset_digest"], "baseline": None, "change": None}
    change = result["value"] - old["value"]
    return {"dataset_digest": result["dataset_digest"], "baseline": old["value"], "change": change}


def _group(members: list[dict[str, Any]]) -> dict[str, Any]:
    changes = [member["change"] for member in members]
    return {
        "mean": _mean([member["value"] for member in members]),
        "change": None if None in changes else _mean(changes),
        "datasets": len(members),
    }


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def format_summary(summary: Summary) -> str:
    """A plain table for the terminal: every dataset by group, then the groups' means; percent and points."""
    head = ("group", "dataset", "metric", "value", "change", "chance", "n", "95 %")
    lines: list[tuple[str, ...]] = []
    for group in GROUPS:
        members = {key: each for key, each in summary["datasets"].items() if each["group"] == group}
        for key, each in members.items():
            name = key if each["in_mean"] else f"{key} (not in mean)"
            lines.append((group, name, each["metric"], *_numbers(each["value"], each["change"]),
                          f"{100 * each['chance']:.2f}", str(each["n"]), _interval(each["interval"])))  # fmt: skip
        if len(members) > 1 and group in summary["groups"]:
            mean = summary["groups"][group]
            lines.append((group, "mean", "", *_numbers(mean["mean"], mean["change"]), "", "", ""))
        if "with_id" in summary["groups"].get(group, {}):
            lines.append(
                (group, "mean with id", "", f"{100 * summary['groups'][group]['with_id']:.2f}", "", "", "", "")
            )
    title = f"{summary['model']} · {summary['pretrained'] or 'no pretrained tag'} · benchmark {summary['benchmark']}"
    return "\n".join([title, text_table(head, lines, left=3), *_closing_lines(summary)])


def _closing_lines(summary: Summary) -> list[str]:
    lines = []
    if summary["limit"] is not None:
        lines.append(f"(at most {summary['limit']} samples of each dataset, and of a bank for K-NN the same share)")
    absent = [key for group in summary["groups"].values() for key in group["missing"]]
    if absent:
        lines.append(f"not evaluated: {', '.join(absent)}")
    if (kept := kept_of(summary["datasets"])) is not None:
        lines.append(
            f"kept {100 * kept.mean:.2f} % (mean over the datasets other than id of min(1, after / before)), "
            f"least of {kept.worst}: {100 * kept.worst_share:.2f} %"
        )
    if summary["forgetting"] is not None:
        lines.append(f"forgetting {100 * summary['forgetting']:.2f} points (mean drop over the groups other than id)")
    return lines


def _numbers(value: float, change: float | None) -> tuple[str, str]:
    return f"{100 * value:.2f}", "" if change is None else f"{100 * change:+.2f}"


def _interval(ends: list[float] | None) -> str:
    """Only for a dataset that was evaluated in part: for a whole one there is nothing to estimate."""
    return "" if ends is None or ends[0] == ends[1] else f"{100 * ends[0]:.1f}..{100 * ends[1]:.1f}"
