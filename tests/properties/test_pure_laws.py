"""Laws of pure functions, for any input that hypothesis finds; SELORA_EXAMPLES sets the number of examples per law."""

from __future__ import annotations

import itertools
import os
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from pipeline.config import Config, ConfigError, override
from pipeline.data.order import Order, draw_without_repetition, rank_positions
from pipeline.tracking.identity import ensure_identity
from pipeline.tracking.journal import Corrupt, Journal, read
from pipeline.tracking.mlflow import delivery
from pipeline.tracking.mlflow.delivery import Delivery, load_state, pending
from pipeline.tracking.mlflow.store import Away, Refused
from pipeline.tuning.grid import Grid
from pipeline.tuning.trials import expand, keep_names

some = settings(
    max_examples=int(os.environ.get("SELORA_EXAMPLES", "25")),
    deadline=None,
    derandomize="SELORA_EXAMPLES" not in os.environ,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
    database=None,
)
sizes = st.lists(st.integers(0, 9), min_size=1, max_size=6).filter(any)


@some
@given(sizes, st.integers(1, 7), st.integers(1, 5), st.integers(0, 2**62), st.integers(0, 3))
def test_an_epoch_is_every_sample_once(shards: list[int], streams: int, window: int, seed: int, epoch: int) -> None:
    order = Order(shards, seed=seed, streams=streams, window=window)
    positions = range(epoch * order.samples, (epoch + 1) * order.samples)
    places = [order.locate(position) for position in positions]
    assert {place.epoch for place in places} == {epoch}
    wanted = [(shard, sample) for shard, size in enumerate(shards) for sample in range(size)]
    assert sorted((place.shard, place.sample) for place in places) == wanted
    # The two ways to ask agree: by position and window by window.
    found = {}
    for stream, number in itertools.product(range(streams), range(order.windows())):
        found |= dict(zip(*(part.tolist() for part in order.in_window(epoch, stream, number)), strict=True))
    assert found == {position: place.shard for position, place in zip(positions, places, strict=True)}


@some
@given(st.integers(1, 12), st.integers(1, 4), st.integers(0, 50), st.data())
def test_ranks_share_a_step_out_whatever_their_number(streams: int, turns: int, step: int, data: st.DataObject) -> None:
    batch = streams * turns
    world = data.draw(st.sampled_from([number for number in range(1, streams + 1) if streams % number == 0]))
    shares = [rank_positions(step, batch, streams, rank, world) for rank in range(world)]
    assert sorted(itertools.chain(*shares)) == list(range(step * batch, (step + 1) * batch))
    assert len({len(share) for share in shares}) == 1
    assert all(
        {position % streams for position in share}.isdisjoint(
            {position % streams for other in shares if other is not share for position in other}
        )
        for share in shares
    )


@some
@given(st.integers(1, 9), st.integers(0, 2**62), st.text(max_size=5), st.integers(0, 5))
def test_each_caption_comes_once_in_its_turn(choices: int, seed: int, sample: str, turn: int) -> None:
    drawn = [draw_without_repetition(choices, seed, sample, turn * choices + place) for place in range(choices)]
    assert sorted(drawn) == list(range(choices))


values = st.dictionaries(st.sampled_from("abc"), st.floats(), min_size=1, max_size=3)


@some
@given(st.lists(st.lists(values, max_size=4), min_size=1, max_size=4), st.data())
def test_a_journal_cut_anywhere_holds_each_value_once(
    attempts: list[list[dict[str, float]]], data: st.DataObject
) -> None:
    """Each attempt begins again at any earlier step, and the machine dies at any byte of what it wrote."""
    with tempfile.TemporaryDirectory() as folder:
        run, whole, sure = Path(folder) / "run", 0, {}
        for attempt in attempts:
            journal = Journal(run)
            first = data.draw(st.integers(0, whole))
            for step, found in enumerate(attempt, first):
                journal.metrics(step, found)
            journal.close()
            size = journal.path.stat().st_size if journal.path.exists() else 0
            os.truncate(journal.path, data.draw(st.integers(_sure_end(journal.path, sure), size)))
            rows = _rows(journal.path)
            assert len(rows) == len({row[:2] for row in rows}), "a value twice"
            assert sure.items() <= {row[:2]: repr(row[2]) for row in rows}.items(), "a value lost that was read before"
            sure = {row[:2]: repr(row[2]) for row in rows}
            whole = max((step for _, step, _ in rows), default=-1) + 1
        seqs = [record.seq for record in read(run / "journal.jsonl") if not isinstance(record, Corrupt)]
        assert seqs == sorted(set(seqs))


def _rows(path: Path) -> list[tuple[str, int, Any]]:
    return [
        (key, record.data["step"], value)
        for record in read(path)
        if not isinstance(record, Corrupt) and record.kind == "metrics"
        for key, value in record.data["values"].items()
    ]


def _sure_end(path: Path, sure: dict[Any, Any]) -> int:
    """The size of the file when ``sure`` had been read from it: what a reader saw is on the disk."""
    end, seen = 0, set()
    for record in read(path):
        if seen >= sure.keys():
            break
        end = record.end
        if not isinstance(record, Corrupt) and record.kind == "metrics":
            seen |= {(key, record.data["step"]) for key in record.data["values"]}
    return end


class Store:
    """An in-memory tracking store that dies at chosen calls, before or after it has stored the entries."""

    def __init__(self, faults: Iterator[int]) -> None:
        self.runs: dict[str, Any] = {}
        self.metrics: dict[tuple[str, int, int], float] = {}
        self.calls, self._faults = 0, faults
        self.taken: list[Any] = []

    def _fault(self, before: bool) -> None:
        if before:
            self._now = next(self._faults, 0)
        if self._now == (1 if before else 2):
            raise Away("cut")

    def find_runs(self, run: str) -> list[Any]:
        self._fault(True)
        found = [one for one in self.runs.values() if one.tag == run]
        self._fault(False)
        return sorted(found, key=lambda one: (one.info.lifecycle_stage != "active", one.info.run_id))

    def get_run(self, run_id: str) -> Any:
        self._fault(True)
        self._fault(False)
        return self.runs[run_id]

    def create_run(self, run: str, name: str, start_ms: int) -> str:
        self._fault(True)
        run_id = f"r{len(self.runs)}"
        info = SimpleNamespace(run_id=run_id, lifecycle_stage="active", status="RUNNING")
        self.runs[run_id] = SimpleNamespace(tag=run, info=info, data=SimpleNamespace(params={}, metrics={}, tags={}))
        self._fault(False)
        return run_id

    def delete_run(self, run_id: str) -> None:
        self._fault(True)
        self.runs[run_id].info.lifecycle_stage = "deleted"
        self._fault(False)

    def log_metrics(self, run_id: str, metrics: list[Any]) -> None:
        self._fault(True)
        for name, value, time_ms, step in metrics:  # a primary key of name, step and time keeps a second one out
            self.runs[run_id].data.metrics[name, step, time_ms] = repr(value)
        self._fault(False)

    def log_params(self, run_id: str, params: dict[str, str]) -> None:
        self._fault(True)
        known = self.runs[run_id].data.params
        if any(known.get(name, value) != value for name, value in params.items()):
            raise Refused("changed")
        known |= params
        self._fault(False)

    def set_tags(self, run_id: str, tags: dict[str, str]) -> None:
        self._fault(True)
        self.runs[run_id].data.tags |= tags
        self._fault(False)

    def set_status(self, run_id: str, status: str, time_ms: int) -> None:
        self._fault(True)
        self.runs[run_id].info.status = status
        self._fault(False)


class Killed(BaseException):
    """The shipper ends at once: nothing of it runs any more."""


@some
@given(
    st.lists(st.tuples(values, st.dictionaries(st.sampled_from("xy"), st.sampled_from("12"))), min_size=1, max_size=5),
    st.lists(st.integers(0, 2), max_size=14),
    st.lists(st.booleans(), max_size=6),
)
def test_any_cuts_and_deaths_deliver_each_value_once(
    writes: list[tuple[dict[str, float], dict[str, str]]], faults: list[int], deaths: list[bool]
) -> None:
    """Writes and deliveries in turn; a request is cut before or after it, the shipper dies at any save."""
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        run = Path(folder) / "run"
        store, dying = Store(iter(faults)), iter(deaths)
        save = delivery.save_state

        def save_or_die(*arguments: Any) -> None:
            if next(dying, False):
                raise Killed
            save(*arguments)

        patch.setattr(delivery, "save_state", save_or_die)
        patch.setattr(delivery, "MlflowStore", lambda *_: store)
        identity = ensure_identity(run, "name", "experiment", "http://store", None)
        journal, expected = Journal(run), {}
        for step, (found, params) in enumerate(writes):
            journal.metrics(step, found)
            if params:
                journal.write("params", values=params)
            expected |= {(key, step): repr(value) for key, value in found.items()}
            with suppress(Away, Killed):
                Delivery(run, "http://store", identity).deliver()
        journal.write("status", status="FINISHED")
        journal.close()
        for _ in range(len(faults) + len(deaths) + 2):
            try:
                Delivery(run, "http://store", identity).deliver(last=True)
            except (Away, Killed):
                continue
            break
        else:
            raise AssertionError("never delivered")
        [alive] = [one for one in store.runs.values() if one.info.lifecycle_stage == "active"]
        got = list(alive.data.metrics.items())
        assert {(key, step): value for (key, step, _), value in got} == expected and len(got) == len(expected)
        assert alive.info.status == "FINISHED"
        first: dict[str, str] = {}
        for _, params in writes:
            first = params | first
        assert alive.data.params == first
        assert pending(run, load_state(run, "http://store")) == 0


BASE = Config.model_validate({"data": {"train": "shards"}})
axes = st.fixed_dictionaries(
    {},
    optional={
        "adapter.rank": st.lists(st.integers(1, 64), min_size=1, max_size=3, unique=True),
        "adapter.kind": st.lists(st.sampled_from(["lora", "dora", "full"]), min_size=1, max_size=3, unique=True),
        "gate.lam": st.lists(st.sampled_from([0.0, 0.1, 0.3, 1.0]), min_size=1, max_size=3, unique=True),
        "gate.enabled": st.lists(st.booleans(), min_size=1, max_size=2, unique=True),
        "train.lr": st.lists(st.sampled_from([1e-5, 3e-5, 1e-3]), min_size=1, max_size=2, unique=True),
        "seed": st.lists(st.integers(0, 9), min_size=1, max_size=2, unique=True),
    },
).filter(bool)


@some
@given(axes, st.randoms(use_true_random=False))
def test_a_grid_is_every_different_run_once(choices: dict[str, list[Any]], draw: Any) -> None:
    """Whatever the order of axes and values: the same configs, each with a name, an id and a place of its own."""
    trials = _expanded(choices)
    for each in (lambda trial: trial.id, lambda trial: trial.name, lambda trial: trial.config.out + trial.config.name):
        assert len({each(trial) for trial in trials}) == len(trials)
    wanted = {
        _key(override(BASE, dict(zip(choices, point, strict=True)))) for point in itertools.product(*choices.values())
    }
    assert {_key(trial.config) for trial in trials} <= wanted
    shuffled = [(key, draw.sample(found, len(found))) for key, found in choices.items()]
    draw.shuffle(shuffled)
    again = _expanded(dict(shuffled))
    assert len(again) == len(trials)
    stored = [{"id": one.id, "name": one.name, "changes": one.changes, "baseline": one.baseline} for one in trials]
    assert [(one.id, one.name) for one in keep_names(trials, stored, BASE.seed)] == [
        (one.id, one.name) for one in trials
    ]


def _expanded(choices: dict[str, list[Any]]) -> list[Any]:
    try:
        return expand(BASE, Grid(choices))
    except ConfigError:
        assume(False)
        raise


def _key(config: Config) -> tuple[Any, ...]:
    return (
        config.adapter.rank,
        config.adapter.kind,
        config.gate.lam,
        config.gate.enabled,
        config.train.lr,
        config.seed,
    )


@pytest.mark.slow
def test_the_laws_hold_for_many_more(repository: Path) -> None:
    """Other examples at every run, a thousand of each."""
    import subprocess
    import sys

    command = [sys.executable, "-m", "pytest", "-n", "0", "-p", "no:cacheprovider", str(Path(__file__))]
    environment = {**os.environ, "SELORA_EXAMPLES": "1000"}
    done = subprocess.run(command, cwd=repository, env=environment, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stdout[-4000:]
