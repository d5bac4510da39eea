"""The journal of a run: one JSON object per line, appended, never rewritten.

    {"seq": 7, "time_ms": 1764000000000, "kind": "metrics", "step": 30, "values": {"loss": 0.71, "grad_norm": "nan"}}

The journal is the original record of a run; a tracking store holds a copy. Each record has the time at which it was
written, so a second delivery equals the first in every field, and a store with a primary key keeps it once.
"""

from __future__ import annotations

import json
import logging
import math
import os
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.config import ConfigError
from pipeline.tracking.locks import Busy, ProcessLock

JOURNAL = "journal.jsonl"
JOURNAL_GLOB = "journal*.jsonl"  # that of the run, and one per node with system metrics
_LOCK_WAIT_SECONDS = 20.0  # a killed run may still be ending when the same command is started again
_MEMORY_LIMIT = 100_000  # records kept in memory while the disk is full

logger = logging.getLogger("selora.tracking")


@dataclass(frozen=True)
class Record:
    """One line of a journal; `end` is the byte offset after it."""

    seq: int
    time_ms: int
    kind: str
    data: dict[str, Any]
    end: int


@dataclass(frozen=True)
class Corrupt:
    """A complete line that is not a record; `end` is the byte offset after it."""

    path: Path
    line: int
    end: int

    def __str__(self) -> str:
        return f"{self.path.name} line {self.line} cannot be read"


class Journal:
    """The only writer of one journal file.

    Args:
        run_dir: directory of the run, created if it is missing.

    Raises:
        ConfigError: the directory cannot be written, or another process writes this journal.
    """

    def __init__(self, run_dir: Path, name: str = JOURNAL) -> None:
        self.path = run_dir / name
        self.replayed = 0  # values dropped because an earlier attempt of the run has already written them
        self._mutex = threading.RLock()  # re-entrant: a signal handler may write while the loop is writing
        self._waiting: list[bytes] = []
        self._lost = 0
        self._disk_error: str | None = None
        try:
            run_dir.mkdir(parents=True, exist_ok=True)
            self._lock = ProcessLock(lock_path(self.path), _LOCK_WAIT_SECONDS)
        except Busy as busy:
            raise ConfigError(
                f"{run_dir}: this run is being written by {busy}; wait for it or choose another name"
            ) from None
        except OSError as error:
            raise ConfigError(f"{run_dir}: cannot write the run directory: {error.strerror}") from None
        self._last_step: dict[str, int] = {}
        self._seq, self._last_ms = 0, 0
        self.status: str | None = None  # number of the last record written
        try:
            self._good = self._recover()
            self._fd = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        except OSError as error:
            self._lock.release()
            raise ConfigError(f"{self.path}: {error.strerror}") from None

    def metrics(self, step: int, values: Mapping[str, float]) -> int:
        """Write the values whose key has no value at this step or a later one; returns the number written.

        A resumed run repeats the steps since its checkpoint; the values of the first attempt are kept.
        """
        with self._mutex:
            fresh = {key: _encode(value) for key, value in values.items() if step > self._last_step.get(key, -1 << 62)}
            self.replayed += len(values) - len(fresh)
            if fresh:
                self._last_step.update(dict.fromkeys(fresh, step))
                self.write("metrics", step=int(step), values=fresh)
            return len(fresh)

    def write(self, kind: str, **data: Any) -> None:
        """Append one record. A full disk is reported once and never raised: the record waits in memory."""
        with self._mutex:
            self._seq += 1
            self._last_ms = max(self._last_ms, time.time_ns() // 1_000_000)
            record = {"seq": self._seq, "time_ms": self._last_ms, "kind": kind, **data}
            line = json.dumps(record, ensure_ascii=False, allow_nan=False, separators=(",", ":")) + "\n"
            if kind == "status":
                self.status = data["status"]
            self._waiting.append(line.encode("utf-8", errors="replace"))
            self._write_waiting()

    def last_step(self) -> int:
        """The largest step at which any key has a value; -1 before the first."""
        return max(self._last_step.values(), default=-1)

    def close(self) -> None:
        """Release the journal; the log reports the number of records that could not be written."""
        with self._mutex:
            if self._fd < 0:
                return
            self._write_waiting()
            if self._waiting or self._lost:
                logger.warning(
                    "%s: %d records are lost: %s", self.path, len(self._waiting) + self._lost, self._disk_error
                )
            os.close(self._fd)
            self._fd = -1
            self._lock.release()

    def _write_waiting(self) -> None:
        while self._waiting:
            try:
                written = os.write(self._fd, self._waiting[0])
                if written < len(self._waiting[0]):
                    raise OSError(None, "no space left on device")
            except OSError as error:
                self._keep_in_memory(error)
                return
            self._good += written
            del self._waiting[0]
        if self._disk_error is not None:
            logger.warning("%s: can be written again", self.path)
            self._disk_error = None

    def _keep_in_memory(self, error: OSError) -> None:
        if self._disk_error is None:
            self._disk_error = error.strerror or str(error)
            logger.warning("%s: %s; records wait in memory and the run continues", self.path, self._disk_error)
        with suppress(OSError):  # otherwise the next reader reports the half line as unreadable
            os.ftruncate(self._fd, self._good)
        if len(self._waiting) > _MEMORY_LIMIT:
            del self._waiting[0]
            self._lost += 1

    def _recover(self) -> int:
        """Read the records of earlier attempts and cut off an incomplete last line; returns the bytes that are left."""
        if not self.path.exists():
            return 0
        end = 0
        for record in read(self.path):
            end = record.end
            if isinstance(record, Corrupt):
                logger.warning("%s; it is skipped", record)
                continue
            self._seq, self._last_ms = max(self._seq, record.seq), max(self._last_ms, record.time_ms)
            if record.kind == "metrics":
                self._last_step.update(dict.fromkeys(record.data["values"], record.data["step"]))
            elif record.kind == "status":
                self.status = record.data["status"]
        torn = self.path.stat().st_size - end
        if torn:
            logger.warning("%s: dropped an incomplete last line of %d bytes", self.path, torn)
            os.truncate(self.path, end)
        return end


def read(path: Path, offset: int = 0) -> Iterator[Record | Corrupt]:
    """The complete lines of a journal from byte `offset` on; a last line without a line end is ignored."""
    with path.open("rb") as file:
        file.seek(offset)
        for raw in file:
            if not raw.endswith(b"\n"):
                return
            offset += len(raw)
            record = _parse(raw, offset)
            yield record if record is not None else Corrupt(path, _line_number(path, offset), offset)


def tail(path: Path, size: int) -> Iterator[Record]:
    """The records in the last `size` bytes of a journal, without lines that are cut or cannot be read."""
    with path.open("rb") as file:
        start = max(0, file.seek(0, os.SEEK_END) - size)
        file.seek(start)
        start += len(file.readline()) if start else 0  # a line that begins before these bytes
    return (record for record in read(path, start) if isinstance(record, Record))


def decode(value: float | str) -> float:
    """A value of a metrics record as a number; nan and the infinities are kept as strings, since JSON has none."""
    return float(value)


def lock_path(journal: Path) -> Path:
    """The lock that the writer of `journal` holds while it runs."""
    return journal.with_name(f".{journal.stem}.lock")


def journals(run_dir: Path) -> list[Path]:
    """The run's journal files, its own first."""
    return sorted(run_dir.glob(JOURNAL_GLOB), key=lambda path: (path.name != JOURNAL, path.name))


def _encode(value: float) -> float | str:
    number = float(value)
    return number if math.isfinite(number) else str(number)


def _parse(raw: bytes, end: int) -> Record | None:
    try:
        data = json.loads(raw)
        record = Record(data.pop("seq"), data.pop("time_ms"), data.pop("kind"), data, end)
        sound = isinstance(record.seq, int) and isinstance(record.time_ms, int)
        if record.kind == "metrics":
            sound = sound and isinstance(data["step"], int) and all(map(_is_number, data["values"].values()))
        elif record.kind in ("params", "tags"):
            sound = sound and all(isinstance(value, str) for value in data["values"].values())
        elif record.kind == "artifact":
            sound = sound and {"path", "sha256", "folder"} <= data.keys()
        elif record.kind == "status":
            sound = sound and isinstance(data["status"], str)
        return record if sound else None
    except (ValueError, KeyError, AttributeError, TypeError):
        return None


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) or value in ("nan", "inf", "-inf")


def _line_number(path: Path, end: int) -> int:
    with path.open("rb") as file:
        return file.read(end).count(b"\n")
