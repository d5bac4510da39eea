"""Reads an MLflow experiment: runs with params, tags, last values, chosen histories and small text files."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.config import ConfigError
from pipeline.passwords import redact
from pipeline.tracking.mlflow.moved import relocate
from pipeline.tracking.mlflow.store import PARENT_TAG, as_config_errors, client_environment
from pipeline.tracking.mlflow.uris import resolve_uri, sqlite_path

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

_PAGE = 1000


@dataclass(frozen=True)
class StoredRun:
    """One run of the store. `status` is MLflow's; `files` holds the texts of the requested files that exist."""

    run_id: str
    name: str
    status: str
    parent: str | None
    start_ms: int
    params: dict[str, str]
    tags: dict[str, str]
    metrics: dict[str, float]
    histories: dict[str, list[tuple[int, float]]]
    files: dict[str, str]


def read_experiment(
    experiment: str,
    uri: str | None = None,
    *,
    histories: Sequence[str] = (),
    files: Sequence[str] = (),
    out: Path = Path("runs"),
) -> list[StoredRun]:
    """The active runs of an experiment, oldest first.

    Nothing is created or changed, except the addresses of files in a store that was moved.
    uri: the store; None: MLFLOW_TRACKING_URI, else OUT/mlflow.db. histories: metrics of which all values are read (one
    request each). files: artifact paths to read as text; missing files are left out.

    Raises ConfigError if the store cannot be reached or has no such experiment.
    """
    uri = resolve_uri(uri, out)
    file = sqlite_path(uri)
    if file is not None and not file.is_file():
        raise ConfigError(f"tracking.uri={uri!r}: there is no such file")
    with client_environment(), as_config_errors(uri):
        from mlflow import MlflowClient

        relocate(uri)
        client = MlflowClient(uri)
        found = client.get_experiment_by_name(experiment)
        if found is None:
            known = ", ".join(sorted(one.name for one in client.search_experiments()))
            raise ConfigError(f"{redact(uri)} has no experiment {experiment!r}; there are: {known}")
        runs = _all_runs(client, found.experiment_id)
        return [_read(client, run, histories, files) for run in sorted(runs, key=_age)]


def _all_runs(client: MlflowClient, experiment_id: str) -> list[Run]:
    runs: list[Run] = []
    token: str | None = None
    while True:
        page = client.search_runs([experiment_id], max_results=_PAGE, page_token=token)
        runs += page
        token = page.token
        if not token:
            return runs


def _age(run: Run) -> tuple[int, str]:
    return run.info.start_time or 0, run.info.run_id


def _read(client: MlflowClient, run: Run, histories: Sequence[str], files: Sequence[str]) -> StoredRun:
    run_id = run.info.run_id
    values = {
        key: sorted((point.step, point.value) for point in client.get_metric_history(run_id, key))
        for key in histories
        if key in run.data.metrics
    }
    return StoredRun(
        run_id,
        run.info.run_name or run_id,
        run.info.status,
        run.data.tags.get(PARENT_TAG),
        run.info.start_time or 0,
        dict(run.data.params),
        dict(run.data.tags),
        dict(run.data.metrics),
        values,
        _texts(client, run_id, files),
    )


def _texts(client: MlflowClient, run_id: str, wanted: Sequence[str]) -> dict[str, str]:
    folders = {str(Path(path).parent) for path in wanted}
    present = {
        one.path for folder in folders for one in client.list_artifacts(run_id, None if folder == "." else folder)
    }
    with tempfile.TemporaryDirectory() as scratch:
        return {
            path: Path(client.download_artifacts(run_id, path, scratch)).read_text(encoding="utf-8")
            for path in wanted
            if path in present
        }
