"""Delivers the missing records of one run's journals to one store, each once, in any number of attempts."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pipeline.files import read_json, replace_json
from pipeline.passwords import redact
from pipeline.tracking.identity import RunIdentity
from pipeline.tracking.journal import JOURNAL, Corrupt, Record, decode, journals, lock_path, read
from pipeline.tracking.locks import is_held
from pipeline.tracking.mlflow.store import (
    MAX_METRICS,
    MAX_PAIRS,
    PARENT_TAG,
    Away,
    Gone,
    Metric,
    MlflowStore,
    Refused,
    legal_param,
)

STATE_FILE = "mlflow.json"
SHIPPING_LOCK = ".mlflow.lock"
_MAX_REFUSED = 100

logger = logging.getLogger("selora.tracking")


@dataclass
class StoreState:
    """Progress of the delivery to one store. If it is lost, a second delivery changes nothing in the store."""

    run_id: str | None = None
    offsets: dict[str, int] = field(default_factory=dict)  # journal file -> bytes delivered
    delivered: int = 0
    files: dict[str, dict[str, Any]] = field(default_factory=dict)  # destination -> path, sha256, folder, sent
    status: list[Any] | None = None  # [status, time in ms] last read from the journal
    status_sent: str | None = None
    parent_linked: bool = False
    refused: list[str] = field(default_factory=list)
    error: str | None = None  # reason for the failure of the last attempt


def load_state(run_dir: Path, uri: str) -> StoreState:
    """The delivery state of one store; a new one if there is none or it cannot be read."""
    try:
        return StoreState(**read_json(run_dir / STATE_FILE)[redact(uri)])
    except (OSError, ValueError, KeyError, TypeError):
        return StoreState()


def save_state(run_dir: Path, uri: str, state: StoreState) -> None:
    """Write the state of one store next to those of others; a full disk only costs a second delivery later."""
    path = run_dir / STATE_FILE
    try:
        stores = read_json(path)
    except (OSError, ValueError):
        stores = {}
    try:
        replace_json(path, {**stores, redact(uri): asdict(state)})
    except OSError as error:
        logger.warning("%s: %s", path, error.strerror)


class Delivery:
    """Delivers one run's journals to one store; only for the holder of the shipping lock."""

    def __init__(self, run_dir: Path, uri: str, identity: RunIdentity, *, full: bool = False) -> None:
        self.run_dir, self.uri, self.identity = run_dir, uri, identity
        self.store = MlflowStore(uri, identity.experiment, run_dir.parent)
        self.state = load_state(run_dir, uri)
        self.sent = 0
        self.corrupt: list[str] = []
        self._params: dict[str, str] = {}
        self._checked = False
        self._saved: dict[str, Any] | None = None
        if full:
            self._start_over()

    def deliver(self, *, last: bool = False) -> None:
        """Send everything in the journals; `last` also closes a run whose process has ended.

        Raises:
            Away: the store is not available; the progress so far is remembered.
        """
        try:
            self._deliver(last)
            self.state.error = None
        except (Refused, Gone, Away) as error:
            self._checked = False  # the run itself may have been deleted: look it up again next time
            self.state.error = str(error)
            raise Away(str(error)) from error
        finally:
            self._save()

    def _deliver(self, last: bool) -> None:
        run_id = self._run_id()
        for path in journals(self.run_dir):
            self._send_journal(run_id, path)
        self._link_parent(run_id)
        failure = self._upload(run_id)
        self._send_status(run_id, last)
        if last:
            self._remove_twins(run_id)
        if failure is not None:
            raise failure

    def _save(self) -> None:
        content = asdict(self.state)
        if content != self._saved:
            save_state(self.run_dir, self.uri, self.state)
            self._saved = content

    def _run_id(self) -> str:
        """The MLflow run of this journal: remembered, found by its tag, or created."""
        if self._checked and self.state.run_id is not None:
            return self.state.run_id
        run = None
        if self.state.run_id is not None:
            try:
                run = self.store.get_run(self.state.run_id)
            except Gone:
                self._start_over()
        if run is None:
            found = self.store.find_runs(self.identity.run)
            run = found[0] if found else None
        if run is None:
            run = self.store.get_run(self.store.create_run(self.identity.run, self.identity.name, self._start_ms()))
        if run.info.lifecycle_stage != "active":
            raise Away(f"the run is deleted there; `mlflow runs restore --run-id {run.info.run_id}` brings it back")
        self.state.run_id = run.info.run_id
        self._params = dict(run.data.params)
        self._checked = True
        self._save()
        return run.info.run_id

    def _start_over(self) -> None:
        self.state = StoreState()
        self._checked = False

    def _start_ms(self) -> int:
        for record in read(self.run_dir / JOURNAL):
            if isinstance(record, Record):
                return record.time_ms
        return 0

    def _send_journal(self, run_id: str, path: Path) -> None:
        batch: list[Record] = []
        size = 0
        end = self.state.offsets.get(path.name, 0)
        for record in read(path, end):
            end = record.end
            if isinstance(record, Corrupt):
                self.corrupt.append(str(record))
                continue
            batch.append(record)
            size += count(record)
            if size >= MAX_METRICS:
                self._send_records(run_id, batch, path.name, end)
                batch, size = [], 0
        if batch or end != self.state.offsets.get(path.name, 0):
            self._send_records(run_id, batch, path.name, end)

    def _send_records(self, run_id: str, batch: list[Record], name: str, end: int) -> None:
        metrics: list[Metric] = []
        params: list[tuple[str, str]] = []
        tags: dict[str, str] = {}
        for record in batch:
            data = record.data
            if record.kind == "metrics":
                metrics += [(key, decode(v), record.time_ms, data["step"]) for key, v in data["values"].items()]
            elif record.kind == "params":
                params += data["values"].items()
            elif record.kind == "tags":
                tags |= data["values"]
            elif record.kind == "artifact":
                self._want_file(data)
            elif record.kind == "status":
                self.state.status = [data["status"], record.time_ms]
        self._send_metrics(run_id, metrics)
        self._send_params(run_id, params, tags)
        self._send_tags(run_id, tags)
        self.state.offsets[name] = end
        self.state.error = None  # it answers again; other faults show at the end of this delivery
        self._count(sum(count(record) for record in batch))
        self._save()

    def _count(self, number: int) -> None:
        self.sent += number
        self.state.delivered += number

    def _send_metrics(self, run_id: str, metrics: Sequence[Metric]) -> None:
        for start in range(0, len(metrics), MAX_METRICS):
            self._send_metrics_or_halves(run_id, metrics[start : start + MAX_METRICS])

    def _send_metrics_or_halves(self, run_id: str, metrics: Sequence[Metric]) -> None:
        """Send metrics; if the store refuses them, halve the batch until the refused value is alone."""
        try:
            self.store.log_metrics(run_id, metrics)
        except Refused as error:
            self._stop_if_deleted(run_id)
            if len(metrics) == 1:
                self._refuse(f"metric {metrics[0][0]} at step {metrics[0][3]}: {error}")
                return
            middle = len(metrics) // 2
            self._send_metrics_or_halves(run_id, metrics[:middle])
            self._send_metrics_or_halves(run_id, metrics[middle:])

    def _send_params(self, run_id: str, params: Sequence[tuple[str, str]], tags: dict[str, str]) -> None:
        """MLflow's params cannot change: the first value stays, and a later one becomes a tag (added to `tags`)."""
        fresh: dict[str, str] = {}
        for name, value in (legal_param(*pair) for pair in params):
            first = (self._params | fresh).setdefault(name, value)
            if first != value:
                tags[f"param_changed.{name}"] = f"{value} (was {first})"
            elif name not in self._params:
                fresh[name] = value
        for pairs in _chunks(fresh):
            self._send_pairs(run_id, "param", pairs)
            self._params |= pairs

    def _send_tags(self, run_id: str, tags: dict[str, str]) -> None:
        for pairs in _chunks(tags):
            self._send_pairs(run_id, "tag", pairs)

    def _send_pairs(self, run_id: str, kind: str, pairs: dict[str, str]) -> None:
        try:
            (self.store.log_params if kind == "param" else self.store.set_tags)(run_id, pairs)
        except Refused as error:
            self._stop_if_deleted(run_id)
            if len(pairs) == 1:
                self._refuse(f"{kind} {next(iter(pairs))}: {error}")
                return
            for name, value in pairs.items():
                self._send_pairs(run_id, kind, {name: value})

    def _stop_if_deleted(self, run_id: str) -> None:
        if self.store.get_run(run_id).info.lifecycle_stage != "active":
            raise Away(f"the run is deleted there; `mlflow runs restore --run-id {run_id}` brings it back")

    def _refuse(self, what: str) -> None:
        if len(self.state.refused) < _MAX_REFUSED:
            self.state.refused.append(what)

    def _want_file(self, data: dict[str, Any]) -> None:
        destination = f"{data['folder']}/{Path(data['path']).name}".lstrip("/")
        sent = self.state.files.get(destination, {}).get("sent")
        self.state.files[destination] = {**data, "sent": sent}

    def _upload(self, run_id: str) -> Away | None:
        """Upload the files whose content is missing from the store, and return the failure.

        Small files come first, so that an artifact store that fails or refuses large files delays neither them nor the
        status.
        """
        open_wishes = [(name, wish) for name, wish in self.state.files.items() if wish["sent"] != wish["sha256"]]
        for name, wish in sorted(open_wishes, key=lambda pair: _size(self.run_dir / pair[1]["path"])):
            path = self.run_dir / wish["path"]
            if not path.is_file():
                self._refuse(f"file {name}: {path} is gone")
            else:
                try:
                    self.store.upload(run_id, path, wish["folder"])
                except (Away, Refused, Gone) as error:
                    return Away(f"file {name}: {error}")
                self._count(1)
            wish["sent"] = wish["sha256"]
            self._save()
        return None

    def _link_parent(self, run_id: str) -> None:
        """Link the run to its parent as soon as the parent is in the store."""
        parent = self.identity.parent
        if parent is None or self.state.parent_linked:
            return
        found = self.store.find_runs(parent)
        if found:
            self.store.set_tags(run_id, {PARENT_TAG: found[0].info.run_id})
            self.state.parent_linked = True

    def _send_status(self, run_id: str, last: bool) -> None:
        status, time_ms = self.state.status or [None, 0]
        if last and status in (None, "RUNNING") and not is_held(lock_path(self.run_dir / JOURNAL)):
            # no process is left to record the end; without any recorded status there is nothing to end
            status, time_ms = "FINISHED" if status is None else "KILLED", self._last_ms()
        if status is not None and status != self.state.status_sent:
            self.store.set_status(run_id, status, time_ms)
            self.state.status_sent = status

    def _last_ms(self) -> int:
        times = [record.time_ms for record in read(self.run_dir / JOURNAL) if isinstance(record, Record)]
        return times[-1] if times else 0

    def _remove_twins(self, run_id: str) -> None:
        """Delete the empty runs of create requests that timed out but succeeded."""
        for run in self.store.find_runs(self.identity.run):
            empty = not run.data.metrics and not run.data.params
            if run.info.run_id != run_id and run.info.lifecycle_stage == "active" and empty:
                self.store.delete_run(run.info.run_id)


def pending(run_dir: Path, state: StoreState) -> int:
    """Number of values and files of a run that a store in this state does not have yet."""
    number = sum(wish["sent"] != wish["sha256"] for wish in state.files.values())
    for path in journals(run_dir):
        for record in read(path, state.offsets.get(path.name, 0)):
            if isinstance(record, Record):
                number += count(record) + (record.kind == "artifact")
    return number


def count(record: Record) -> int:
    """Number of values in a record; files are counted when they are uploaded."""
    return len(record.data["values"]) if record.kind in ("metrics", "params", "tags") else 0


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


def _chunks(pairs: dict[str, str]) -> list[dict[str, str]]:
    items = list(pairs.items())
    return [dict(items[start : start + MAX_PAIRS]) for start in range(0, len(items), MAX_PAIRS)]
