"""`selora track sync`: upload the journal entries of runs that are missing from MLflow."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from pipeline.config import ConfigError
from pipeline.passwords import redact
from pipeline.tracking.identity import RunIdentity, read_identity
from pipeline.tracking.journal import JOURNAL
from pipeline.tracking.locks import Busy, ProcessLock
from pipeline.tracking.mlflow.delivery import SHIPPING_LOCK, Delivery, load_state, pending
from pipeline.tracking.mlflow.moved import found_again
from pipeline.tracking.mlflow.store import Away, client_environment
from pipeline.tracking.mlflow.uris import resolve_uri

_LOCK_SECONDS = 5.0


@dataclass(frozen=True)
class SyncReport:
    """Result of one sync. Metric values, params, tags and files are counted."""

    run_dir: Path
    uri: str
    run_id: str | None
    sent: int
    already: int
    pending: int
    refused: tuple[str, ...] = ()
    corrupt: tuple[str, ...] = ()
    error: str | None = None

    @property
    def complete(self) -> bool:
        return self.pending == 0 and self.error is None

    def __str__(self) -> str:
        text = f"{self.run_dir}: {self.sent} sent, {self.already} already there, {self.pending} pending at {self.uri}"
        for note in (self.error, *self.refused, *self.corrupt):
            text += f"\n  {note}" if note else ""
        return text


def sync(run_dir: Path, uri: str | None = None, *, full: bool = False) -> SyncReport:
    """Upload the entries of a run's journal that are missing from MLflow.

    Args:
        run_dir: directory of one run.
        uri: the store; None: the one that the run was started with.
        full: deliver everything again, for a store that lost data; equal values are stored once.

    Raises:
        ConfigError: no run in this directory, or a malformed address. If the store does not answer, the report has an
            `error`.
    """
    identity = read_identity(run_dir)
    if identity is None or not (run_dir / JOURNAL).is_file():
        raise ConfigError(f"{run_dir}: not the directory of a tracked run, it has no {JOURNAL}")
    uri = resolve_uri(uri or found_again(identity.uri, run_dir), run_dir.absolute().parent)
    try:
        with ProcessLock(run_dir / SHIPPING_LOCK, _LOCK_SECONDS), client_environment():
            return _sync_locked(run_dir, uri, identity, full)
    except Busy as busy:
        state = load_state(run_dir, uri)
        error = f"{busy} is delivering this run right now"
        return SyncReport(run_dir, redact(uri), state.run_id, 0, state.delivered, pending(run_dir, state), error=error)


def _sync_locked(run_dir: Path, uri: str, identity: RunIdentity, full: bool) -> SyncReport:
    delivery = Delivery(run_dir, uri, identity, full=full)
    already = delivery.state.delivered
    error = None
    try:
        delivery.deliver(last=True)
    except Away as away:
        error = str(away)
    state = delivery.state
    left = pending(run_dir, state)
    if state.delivered < already:  # the store had lost the run, so it was delivered again
        already = 0
    return SyncReport(
        run_dir,
        redact(uri),
        state.run_id,
        delivery.sent,
        already,
        left,
        tuple(state.refused),
        tuple(delivery.corrupt),
        error,
    )


def sync_all(paths: Iterable[Path], uri: str | None = None, *, full: bool = False) -> list[SyncReport]:
    """Sync several runs; a directory that is not a run means all runs below it. Parents come before their children."""
    runs: dict[Path, None] = {}
    for path in paths:
        found = [path] if (path / JOURNAL).is_file() else [journal.parent for journal in sorted(path.rglob(JOURNAL))]
        if not found:
            raise ConfigError(f"{path}: not a run, and there is none below it (a run directory has a {JOURNAL})")
        runs |= dict.fromkeys(found)
    return [sync(run, uri, full=full) for run in sorted(runs, key=_is_child)]


def _is_child(run_dir: Path) -> bool:
    identity = read_identity(run_dir)
    return identity is not None and identity.parent is not None
