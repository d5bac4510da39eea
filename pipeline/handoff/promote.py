"""From a run (or a sweep's chosen trial) to a version of a registered model, when the rule holds."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from pipeline.config import Config, ConfigError, Promote, load_config
from pipeline.data.images import decode, eval_resize, normalize
from pipeline.data.shards import load_index
from pipeline.evaluation.encode import Encoder
from pipeline.evaluation.ranks import Ranks
from pipeline.evaluation.rule import Clause, check
from pipeline.evaluation.summary import Summary, read_summary
from pipeline.evaluation.zeroshot import classifier_head
from pipeline.handoff.choice import chosen_run
from pipeline.handoff.source import Mismatch, Source, read_source
from pipeline.model.clip import save_open_clip
from pipeline.passwords import redact
from pipeline.prompts import caption, resolve_templates
from pipeline.tracking.mlflow_tracker import sync
from pipeline.tracking.registry import CHAMPION, DIGEST_TAG, Registry
from pipeline.tracking.served import Labels, example_image, load_served, predict, save_served
from pipeline.tracking.uris import resolve_uri

TOLERANCE = 1e-4  # largest difference of an embedding between the run's model and the registered one


@dataclass(frozen=True)
class Promotion:
    """What a promotion did. version None: a clause of the rule failed and nothing was registered."""

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
        lines = [str(clause) for clause in self.clauses] or ["no rule is set: see the section promote of the config"]
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
) -> Promotion:
    """Register the newest checkpoint of a run, or of a sweep's chosen trial, if the rule (default: the run's) holds.

    It becomes the challenger; with `champion`, or as the rule says, the champion. Weights that the model has already
    are not registered twice: that version gets the alias and the tags. class_names, templates: what the model answers
    with by itself (default: those it was trained on). Results that are missing or of other weights, and a store
    that does not answer, are ConfigErrors.
    """
    run_dir, chosen = chosen_run(Path(target), rule)
    config = load_config(run_dir / "config.yaml", [])
    rule = config.promote if rule is None else rule
    uri = resolve_uri(uri or config.tracking.uri, run_dir.absolute().parent)
    registry = Registry(uri, name, config.tracking.experiment)
    source = read_source(run_dir)
    summary = results_of(source)
    clauses = check(rule, summary)
    notes = [chosen] if chosen else []
    if not all(clause.holds for clause in clauses):
        return Promotion(name, uri, run_dir, clauses, notes=notes)
    tags = version_tags(source, summary)
    version = registry.version_of(source.weights_digest)
    new = version is None
    if version is None:
        labels, told = labels_of(source, config, class_names, templates)
        run_id, linked = linked_run(registry, source, uri)
        notes += [*told, *linked]
        version = _register(registry, source, labels, tags, run_id)
    else:
        registry.retag(version, tags)
    registry.make_challenger(version)
    before = None
    if champion or _deserves(rule, registry, version, tags, notes):
        before = registry.make_champion(version)
    aliases = tuple(registry.aliases(version))
    return Promotion(name, uri, run_dir, clauses, version, new, aliases, before, notes)


def rollback(name: str, uri: str | None = None) -> tuple[str, str]:
    """Give `champion` back to the version that had it before. Returns (version that had it, version that has it)."""
    return Registry(resolve_uri(uri, Path("runs")), name).roll_back()


def results_of(source: Source) -> Summary:
    """The run's eval/summary.json; a ConfigError unless it is of exactly these weights and of whole datasets."""
    folder = source.run_dir / "eval"
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


def version_tags(source: Source, summary: Summary) -> dict[str, str]:
    """Tags of the version: digests, code, gates and a summary of the results, all under selora."""
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
    if "id" in groups:
        tags["id"] = repr(groups["id"]["mean"])
    if summary["forgetting"] is not None:
        tags["forgetting"] = repr(summary["forgetting"])
    tags = {f"selora.{key}": value for key, value in tags.items()}
    assert DIGEST_TAG in tags  # what Registry looks equal weights up by
    return tags


def benchmark_digest(summary: Summary) -> str:
    """sha256 over what was measured: the datasets, their content, group and metric."""
    rows = {
        key: [row["group"], row["metric"], row["dataset_digest"], row["n"], row["in_mean"]]
        for key, row in summary["datasets"].items()
    }
    return hashlib.sha256(json.dumps(rows, sort_keys=True).encode()).hexdigest()


def labels_of(
    source: Source, config: Config, class_names: Sequence[str] | None, templates: str | Sequence[str] | None
) -> tuple[Labels, list[str]]:
    """The classes that the model answers with by itself, and what to tell the user about them."""
    notes = []
    if class_names is None:
        class_names, why = _trained_classes(source, config)
        if not class_names:
            notes.append(f"the model has no class names of its own ({why}): each request must bring them")
    texts = resolve_templates(templates if templates is not None else config.data.templates)
    clip = source.clip
    if not class_names:
        width = int(clip.model_cfg["embed_dim"])
        return Labels([], texts, torch.zeros(0, width)), notes
    encoder = Encoder(clip.model, clip.tokenizer, torch.device("cpu"))
    with torch.inference_mode():
        head = classifier_head(encoder, class_names, texts, Ranks.current())
    return Labels(class_names, texts, head.clone()), notes


def _trained_classes(source: Source, config: Config) -> tuple[Sequence[str], str]:
    try:
        index = load_index(config.data.train)
    except ConfigError as error:
        return (), str(error).splitlines()[0]
    if index.digest != source.found.state["data_digest"]:
        return (), f"{config.data.train} is no longer what it was trained on"
    return index.classes or (), "it was trained on captions"


def linked_run(registry: Registry, source: Source, uri: str) -> tuple[str | None, list[str]]:
    """The MLflow run of the training, brought to the store if it is not there yet; and a note where there is none."""
    run = source.facts().get("run")
    if run is None:
        return None, ["the run was never tracked: the version has no link to an MLflow run"]
    found = registry.run_id_of(run)
    if found is None:
        sync(source.run_dir, uri)
        found = registry.run_id_of(run)
    return found, [] if found else [f"{redact(uri)} does not have the run: the version has no link to it"]


def _register(registry: Registry, source: Source, labels: Labels, tags: Mapping[str, str], run_id: str | None) -> str:
    clip = source.clip
    with tempfile.TemporaryDirectory(prefix="selora-") as folder:
        stage = Path(folder)
        saved = save_open_clip(
            clip.model, clip.model_cfg, clip.preprocess_cfg, stage / "clip", tokenizer=clip.tokenizer
        )
        model = save_served(stage, saved, labels, tags)
        _compare(source, labels, load_served(model))
        return registry.register(model, tags, run_id)


def _compare(source: Source, labels: Labels, served: Any) -> None:
    """Raise Mismatch unless the registered model embeds a picture and some texts as the run's model does."""
    clip = source.clip
    encoder = Encoder(clip.model, clip.tokenizer, torch.device("cpu"))
    texts = [caption(labels.templates[0], name) for name in (*labels.class_names[:4], "something else")]
    picture = example_image()
    pixels = eval_resize(decode(picture, form="reference"), clip.preprocess_cfg)[None]
    with torch.inference_mode():
        images = encoder.images(normalize(pixels, clip.preprocess_cfg["mean"], clip.preprocess_cfg["std"]))
        wanted = torch.cat([encoder.texts(texts), images])
    rows = predict(served, {"text": texts}, task="embed_texts")
    rows += predict(served, {"image": [picture]}, task="embed_images")
    found = torch.tensor([row["embedding"] for row in rows])
    difference = float((found - wanted).abs().max())
    if not difference <= TOLERANCE:
        raise Mismatch(f"the registered model differs from the run's by {difference:.2g}, more than {TOLERANCE:g}")


def _deserves(rule: Promote, registry: Registry, version: str, tags: Mapping[str, str], notes: list[str]) -> bool:
    """Whether the rule makes the version champion; a refusal is told in `notes`."""
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
    """Why the first is not better than the second: no worse in id and forgetting, and better in one of them."""
    if tags["selora.benchmark_digest"] != champion.get("selora.benchmark_digest"):
        return "its results are of another benchmark"
    better = False
    for key, sign in (("selora.id", 1), ("selora.forgetting", -1)):
        if key not in tags or key not in champion:
            return f"{key.removeprefix('selora.')} is not known of both"
        ours, theirs = float(tags[key]), float(champion[key])
        if sign * ours < sign * theirs:
            return f"{key.removeprefix('selora.')} is {ours:.4f} here and {theirs:.4f} there"
        better |= ours != theirs
    return "" if better else "it is as good"
