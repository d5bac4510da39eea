"""The share of a long training's time that contributes to its result: stragglers, store, checkpoints, failing nodes.

A simulation from failure to failure. Between two failures a run does whole rounds of `every` steps and a checkpoint;
a failure takes it back to the newest checkpoint that was completely written. The best interval is found by trying (J.
T. Daly, "A higher order estimate of the optimum checkpoint interval for restart dumps", 2006, has a formula for a
checkpoint that blocks while it is written; a test compares with it).
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from statistics import fmean

FAILURES, DRAWS = 2000, 500
_HOUR = 3600.0


@dataclass(frozen=True)
class Nodes:
    """Nodes, their reliability and their store.

    Attributes:
        nodes: number of nodes that train one run.
        mtbf_hours: mean time between two failures of one node. Meta's 54 days of Llama 3 on 2,048 nodes with 419
            interruptions (arXiv 2407.21783, section 3.3.4) make 6,300 hours.
        restart_s: seconds from a failure to the next step: noticing it, meeting again, loading the model.
        jitter: standard deviation of a node's step time, as a share of it; all nodes wait for the slowest.
        store_gbit: Gbit/s from the store to one node.
        read_ahead: whether shards are fetched during training (`data.read_ahead`).
    """

    nodes: int
    mtbf_hours: float = 6000.0
    restart_s: float = 300.0
    jitter: float = 0.02
    store_gbit: float = 10.0
    read_ahead: bool = True

    @property
    def mtbf_s(self) -> float:
        """Seconds between two failures of the run."""
        return self.mtbf_hours * _HOUR / self.nodes


@dataclass(frozen=True)
class Job:
    """One run, as the simulation sees it.

    Attributes:
        step_s: seconds of an undisturbed step.
        node_bytes: bytes that a node reads from the store for a step; 0 once they are cached.
        copy_s: seconds for which a checkpoint stops the training, while it is gathered and copied to the host.
        write_s: seconds until it is on the disk, while training continues.
    """

    step_s: float
    node_bytes: float
    copy_s: float
    write_s: float


@dataclass(frozen=True)
class Goodput:
    """The result of an interval: `share` of the time that contributes to the result, in [0, 1]."""

    every: int
    share: float


@cache
def slowest(nodes: int, jitter: float, seed: int = 0) -> float:
    """Mean of the slowest node's step time over that of an undisturbed one; step times are log-normal."""
    draw = random.Random(seed)  # noqa: S311 - a draw, no secret
    sigma = math.sqrt(math.log1p(jitter**2))
    mean = -(sigma**2) / 2  # of the logarithm, so that a node's own mean is 1
    return fmean(math.exp(max(draw.gauss(mean, sigma) for _ in range(nodes))) for _ in range(DRAWS))


def disturbed_step(job: Job, cluster: Nodes) -> float:
    """Seconds of a step with stragglers, and with the store if it is slower than the cards."""
    step = job.step_s * slowest(cluster.nodes, cluster.jitter)
    fetch = job.node_bytes * 8 / (cluster.store_gbit * 1e9)
    return max(step, fetch) if cluster.read_ahead else step + fetch


def simulate(job: Job, cluster: Nodes, every: int, failures: int = FAILURES, seed: int = 0) -> Goodput:
    """Goodput with a checkpoint every `every` steps, simulated over a number of failures."""
    draw = random.Random(seed)  # noqa: S311
    # A checkpoint starts when the previous one is written.
    period = max(every * disturbed_step(job, cluster) + job.copy_s, job.write_s)
    useful = wall = 0.0
    for _ in range(failures):
        up = draw.expovariate(1 / cluster.mtbf_s)
        rounds, rest = divmod(up, period)
        kept = rounds - (rounds > 0 and rest < job.write_s - job.copy_s)
        useful += kept * every * job.step_s
        wall += up + cluster.restart_s
        while (again := draw.expovariate(1 / cluster.mtbf_s)) < cluster.restart_s:
            wall += again  # it fails while it restarts
    return Goodput(every, useful / wall)


def intervals(job: Job, cluster: Nodes) -> list[int]:
    """Intervals to try, in steps: round numbers from a minute to a tenth of the time between failures."""
    first, last = 60 / job.step_s, max(600.0, cluster.mtbf_s / 10) / job.step_s
    tried = (factor * 10**power for power in range(8) for factor in (1, 2, 3, 5, 7))
    return [every for every in tried if first / 2 <= every <= last] or [max(1, round(first))]


def recommend(job: Job, cluster: Nodes, tried: Iterable[int] | None = None) -> Goodput:
    """The longest interval within a thousandth of the best goodput, because it writes least."""
    found = [simulate(job, cluster, every) for every in (tried or intervals(job, cluster))]
    best = max(each.share for each in found)
    return max((each for each in found if each.share > best - 1e-3), key=lambda each: each.every)
