"""Options of an ONNX or Triton export, with defaults from the run's config."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pipeline.config import ConfigError, load_config
from pipeline.evaluation.command import EvalRequest, progress
from pipeline.handoff.graphs import GraphOptions
from pipeline.handoff.served_run import check_labels, labels_of
from pipeline.handoff.source import TrainedModel
from pipeline.model.onnx.write import Pixels, Precision
from pipeline.runs.run import CONFIG_FILE


def graph_options(
    source: TrainedModel,
    run_dir: Path,
    *,
    precision: Precision = "fp32",
    pixels: Pixels = "uint8",
    classnames: Sequence[str] | None = None,
    templates: str | None = None,
    benchmark: str | None = None,
    limit: int | None = None,
) -> GraphOptions:
    """The options of a run's export.

    Args:
        source: the model that is exported.
        run_dir: its run.
        precision: precision of the graphs.
        pixels: input of the image graph.
        classnames: classes of the zero-shot head; None: those of the training, if it had classes.
        templates: name of caption templates; None: the run's.
        benchmark: benchmark that measures the loss of int8; None: the run's.
        limit: number of images of each of its datasets; None: all.

    Raises:
        ConfigError: classes for a ViT, which has its own, or int8 without a benchmark.
    """
    config = load_config(run_dir / CONFIG_FILE)
    check_labels(source, classnames, templates)
    labels, _ = labels_of(source, config, classnames, templates)
    if precision != "int8":
        if benchmark is not None or limit is not None:
            raise ConfigError("--benchmark and --limit need --int8, whose loss they measure")
        return GraphOptions(precision, pixels, labels)
    request = EvalRequest(benchmark=benchmark, limit=limit)
    try:
        table = request.table(config)
    except ConfigError as error:
        raise ConfigError(f"--int8: its loss is measured on a benchmark, and {error}") from error
    return GraphOptions(precision, pixels, labels, table, request.settings(config), progress)
