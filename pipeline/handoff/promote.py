"""From a run (or a sweep's chosen trial) to a version of a registered model, if the promotion rule holds."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pipeline.config import ConfigError, Promote, load_config
from pipeline.evaluation.strength import Strength
from pipeline.evaluation.summary import Summary
from pipeline.handoff.card.facts import CardFacts
from pipeline.handoff.card.text import summary_line, write_card
from pipeline.handoff.choice import chosen_run, strength_at_floor
from pipeline.handoff.served_run import build_served, check_labels, labels_of
from pipeline.handoff.source import TrainedModel, read_source
from pipeline.handoff.strength import run_at_strength
from pipeline.passwords import redact
from pipeline.runs.results import EVAL, read_floors, read_summary, reported_at
from pipeline.runs.sweep import floor_of
from pipeline.selection.frontier import floors_of
from pipeline.selection.kept import kept_of
from pipeline.selection.rule import Clause, check
from pipeline.tracking.mlflow.moved import found_again
from pipeline.tracking.mlflow.registry import CHAMPION, DIGEST_TAG, REGISTRY_VARIABLE, Registry
from pipeline.tracking.mlflow.sync import sync
from pipeline.tracking.mlflow.uris import resolve_uri
from pipeline.tracking.served.served import Labels


@dataclass(frozen=True)
class Promotion:
    """Result of a promotion. version None: the rule or the floor does not hold, and nothing was registered."""

    name: str
    uri: str
    run_dir: Path
    clauses: list[Clause]
    version: str | None = None
    new: bool = False
    aliases: tuple[str, ...] = ()
    previous_champion: str | None = None
    notes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [str(clause) for clause in self.clauses]
        if self.version is not None and not lines:
            lines = ["no rule is set: see the section promote of the config"]
        if self.version is None:
            return "\n".join([*lines, *self.notes, f"{self.run_dir} is not promoted"])
        what = "registered as" if self.new else "has the weights of"
        aliases = f", alias {', '.join(self.aliases)}" if self.aliases else ""
        lines += self.notes
        lines.append(f"{self.run_dir} {what} {self.name} version {self.version}{aliases}, at {redact(self.uri)}")
        if CHAMPION in self.aliases and self.previous_champion is not None:
            lines.append(f"champion before: version {self.previous_champion} (--rollback gives it back)")
        return "\n".join(lines)


def promote(
    target: str | Path,
    name: str,
    rule: Promote | None = None,
    *,
    champion: bool = False,
    uri: str | None = None,
    class_names: Sequence[str] | None = None,
    templates: str | Sequence[str] | None = None,
    strength: Strength | None = None,
) -> Promotion:
    """Register the newest checkpoint of a run, or of a sweep's chosen trial, if the rule (default: the run's) holds.

    strength: register the model at this strength, or with "auto" at the largest that keeps the floor in the rule;
    missing results at it, on which the rule is checked, are evaluated here. For a sweep with a floor the default is the
    strength that the sweep has chosen, with its results.

    The version becomes the challenger, or the champion with `champion` or by the rule. Weights that are already
    registered are not registered twice: their version gets the alias and the tags. class_names, templates: the model's
    default classes (default: those of the training); not for a ViT. Missing results, results of other weights, and a
    store that does not answer are ConfigErrors.
    """
    run_dir, chosen = chosen_run(Path(target), rule)
    config = load_config(run_dir / "config.yaml", [])
    rule = config.promote if rule is None else rule
    uri = resolve_uri(uri or found_again(config.tracking.uri, run_dir), run_dir.absolute().parent)
    registry = Registry(uri, name, config.tracking.experiment)
    notes = [*([chosen] if chosen else []), *_other_registry(uri)]
    if strength is None:
        source, summary, remarks = _as_evaluated(Path(target), run_dir, rule)
        notes += remarks
    else:
        found, outcome = run_at_strength(run_dir, strength, rule, config)
        notes += [] if found is None else [str(found)]
        if outcome is None:
            return Promotion(name, uri, run_dir, [], notes=notes)
        summary = outcome.summary
        source = read_source(run_dir, strength=summary["strength"]["alpha"])
    check_labels(source, class_names, templates)
    clauses = check(rule, summary)
    if not all(clause.holds for clause in clauses):
        return Promotion(name, uri, run_dir, clauses, notes=notes)
    tags = version_tags(source, summary)
    version = registry.version_of(source.weights_digest)
    new = version is None
    if version is None:
        labels, remarks = labels_of(source, config, class_names, templates)
        run_id, linked = linked_run(registry, source, uri)
        notes += [*remarks, *linked]
        facts = CardFacts.of(source, "mlflow", name, ["loaded by MLflow, its vectors compared with the run's model"])
        version = _register(registry, source, labels, tags, run_id, facts)
    else:
        registry.retag(version, tags)
    registry.make_challenger(version)
    before = None
    if champion or _deserves(rule, registry, version, tags, notes):
        before = registry.make_champion(version)
    aliases = tuple(registry.aliases(version))
    return Promotion(name, uri, run_dir, clauses, version, new, aliases, before, notes)


def _as_evaluated(target: Path, run_dir: Path, rule: Promote) -> tuple[TrainedModel, Summary, list[str]]:
    """The model, its results and notes; for a sweep with a floor, at the strength that the sweep has chosen."""
    alpha = strength_at_floor(target, run_dir, rule)
    if alpha is None:
        source = read_source(run_dir)
        return source, results_of(source), []
    source, floor, floors = read_source(run_dir, strength=alpha), floor_of(target), read_floors(run_dir / EVAL)
    assert floor is not None  # both are the source of the strength
    assert floors is not None
    at = floors_of(floors)[floor]
    facts = {"alpha": alpha, "floor": f"kept >= {floor:g}", "choosing_digest": floors["choosing_digest"]}
    remarks = f"strength {alpha:g} keeps {floor:.2%} on the images it was chosen on, and {at.kept:.2%} on the others"
    return source, {**results_of(source, run_dir / reported_at(alpha)), "strength": facts}, [remarks]


def rollback(name: str, uri: str | None = None) -> tuple[str, str]:
    """Return `champion` to the previous champion. Returns (version before, version now)."""
    return Registry(resolve_uri(uri, Path("runs")), name).roll_back()


def results_of(source: TrainedModel, folder: Path | None = None) -> Summary:
    """The summary in a folder (default: RUN/eval); ConfigError unless it has these weights and whole datasets."""
    folder = source.run_dir / EVAL if folder is None else folder
    again = f"run `selora evaluate {source.run_dir}`"
    if not (folder / "summary.json").is_file():
        raise ConfigError(f"{source.run_dir} has no results: {again} first")
    summary = read_summary(folder)
    if summary.get("model_digest") != source.weights_digest:
        raise ConfigError(
            f"{folder}: these results are of the weights {str(summary.get('model_digest'))[:12]}, and "
            f"{source.found.label} has {source.weights_digest[:12]}: {again} again"
        )
    if summary.get("limit") is not None:
        raise ConfigError(
            f"{folder}: these results are of {summary['limit']} images a dataset: {again} without --limit"
        )
    return summary


def version_tags(source: TrainedModel, summary: Summary) -> dict[str, str]:
    """Tags of the version: digests, code, gates and a summary of the results, all with the prefix selora."""
    groups = summary["groups"]
    results = [
        f"{name} {found['mean']:.4f}" + ("" if found["change"] is None else f" ({found['change']:+.4f})")
        for name, found in groups.items()
    ]
    tags = source.facts() | {
        "benchmark": summary["benchmark"],
        "benchmark_digest": benchmark_digest(summary),
        "result": ", ".join(results),
        "preprocessing": summary["preprocessing"],
        "precision": summary["precision"],
    }
    if (at := summary.get("strength")) is not None and "floor" in at:
        tags |= {"floor": at["floor"], "choosing_digest": at["choosing_digest"]}
    if "id" in groups:
        tags["id"] = repr(groups["id"]["mean"])
    if summary["forgetting"] is not None:
        tags["forgetting"] = repr(summary["forgetting"])
    if (kept := kept_of(summary["datasets"])) is not None:
        tags |= {"kept": repr(kept.mean), "kept_worst": f"{kept.worst} {kept.worst_share:.4f}"}
    tags = {f"selora.{key}": value for key, value in tags.items()}
    assert DIGEST_TAG in tags  # Registry finds equal weights by it
    return tags


def benchmark_digest(summary: Summary) -> str:
    """sha256 over the measured datasets: their content, group and metric."""
    rows = {
        key: [row["group"], row["metric"], row["dataset_digest"], row["n"], row["in_mean"]]
        for key, row in summary["datasets"].items()
    }
    return hashlib.sha256(json.dumps(rows, sort_keys=True).encode()).hexdigest()


def linked_run(registry: Registry, source: TrainedModel, uri: str) -> tuple[str | None, list[str]]:
    """The MLflow run of the training, uploaded if it is missing; and a note if there is none."""
    run = source.facts().get("run")
    if run is None:
        return None, ["the run was never tracked: the version has no link to an MLflow run"]
    found = registry.run_id_of(run)
    if found is None:
        sync(source.run_dir, uri)
        found = registry.run_id_of(run)
    return found, [] if found else [f"{redact(uri)} does not have the run: the version has no link to it"]


def _register(
    registry: Registry,
    source: TrainedModel,
    labels: Labels | None,
    tags: Mapping[str, str],
    run_id: str | None,
    facts: CardFacts,
) -> str:
    with tempfile.TemporaryDirectory(prefix="selora-") as folder:
        model = build_served(source, labels, tags, Path(folder))
        write_card(model, facts)
        return registry.register(model, tags, run_id, summary_line(facts))


def _other_registry(uri: str) -> list[str]:
    """A note if MLFLOW_REGISTRY_URI names a store other than the run's."""
    other = os.environ.get(REGISTRY_VARIABLE)
    if not other or other == uri:
        return []
    return [f"{REGISTRY_VARIABLE}={redact(other)} is not used: a version is registered where its run is; see --uri"]


def _deserves(rule: Promote, registry: Registry, version: str, tags: Mapping[str, str], notes: list[str]) -> bool:
    """Whether the rule makes the version champion; a refusal is added to `notes`."""
    if rule.champion == "by_hand":
        return False
    now = registry.alias(CHAMPION)
    if rule.champion == "always" or now is None or now == version:
        return True
    refusal = _not_better(tags, registry.tags(now))
    if refusal:
        notes.append(f"promote.champion=if_better: version {now} stays champion, {refusal}")
    return not refusal


def _not_better(tags: Mapping[str, str], champion: Mapping[str, str]) -> str:
    """Why the first is not better than the second: no worse in id and kept, and better in one of them.

    A champion without the tag for kept, from an older version, is compared by forgetting.
    """
    if tags["selora.benchmark_digest"] != champion.get("selora.benchmark_digest"):
        return "its results are of another benchmark"
    better = False
    kept = ("selora.kept", 1) if "selora.kept" in champion else ("selora.forgetting", -1)
    for key, sign in (("selora.id", 1), kept):
        if key not in tags or key not in champion:
            return f"{key.removeprefix('selora.')} is not known of both"
        ours, theirs = float(tags[key]), float(champion[key])
        if sign * ours < sign * theirs:
            return f"{key.removeprefix('selora.')} is {ours:.4f} here and {theirs:.4f} there"
        better |= ours != theirs
    return "" if better else "it is as good"
