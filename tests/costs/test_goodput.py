"""The simulation of a long training against formulas, and its monotonicity."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from pipeline.costs.goodput import Job, Nodes, disturbed_step, intervals, recommend, simulate, slowest

JOB = Job(step_s=1.0, node_bytes=0, copy_s=20.0, write_s=20.0)
CALM = Nodes(nodes=64, mtbf_hours=640.0, jitter=0.0, restart_s=300.0)  # a failure in ten hours


def daly(work: float, cost: float, restart: float, mtbf: float) -> float:
    """Share of useful time with a blocking checkpoint of `cost` after each `work` seconds (Daly 2006)."""
    return work / (mtbf * math.exp(restart / mtbf) * math.expm1((work + cost) / mtbf))


@pytest.mark.parametrize("every", [100, 600, 1500, 6000])
def test_a_blocking_checkpoint_matches_dalys_formula(every: int) -> None:
    found = simulate(JOB, CALM, every, failures=20_000).share
    assert found == pytest.approx(daly(every, 20, 300, CALM.mtbf_s), rel=0.02)


@pytest.mark.parametrize(("cost", "hours"), [(5.0, 640.0), (20.0, 640.0), (60.0, 6400.0)])
def test_the_recommended_interval_is_youngs(cost: float, hours: float) -> None:
    """sqrt(2 C M), around which the optimum is flat; the goodput is that of Young's interval to half a percent."""
    job, cluster = replace(JOB, copy_s=cost, write_s=cost), replace(CALM, mtbf_hours=hours)
    young = math.sqrt(2 * cost * cluster.mtbf_s)
    found = recommend(job, cluster)
    assert young / 2 < found.every < 2.5 * young
    assert found.share >= simulate(job, cluster, round(young)).share - 0.005
    assert found.every in intervals(job, cluster)


def test_a_background_write_costs_less_than_one_that_blocks() -> None:
    blocking, behind = simulate(JOB, CALM, 600), simulate(replace(JOB, copy_s=1.0), CALM, 600)
    assert behind.share > blocking.share + 0.02
    # It is no checkpoint before it is written.
    instant = simulate(replace(JOB, copy_s=1.0, write_s=1.0), CALM, 600)
    assert instant.share > behind.share


def test_more_nodes_fail_more_often_and_wait_longer() -> None:
    shares = [recommend(JOB, replace(CALM, nodes=nodes, jitter=0.05)).share for nodes in (1, 8, 64)]
    assert shares == sorted(shares, reverse=True)
    assert recommend(JOB, replace(CALM, nodes=64)).every < recommend(JOB, replace(CALM, nodes=1)).every


def test_the_slowest_of_normal_nodes_is_known() -> None:
    """The mean of the largest of n standard normal draws: 0 for one, 1.42 for 8, 2.38 for 64."""
    for nodes, deviations in ((1, 0.0), (8, 1.42), (64, 2.38)):
        assert slowest(nodes, 0.02) == pytest.approx(1 + 0.02 * deviations, abs=0.004)
    assert slowest(8, 0.0) == 1.0


def test_reading_ahead_hides_the_store_until_it_is_slower() -> None:
    job = replace(JOB, node_bytes=0.5e9)
    slow, fast = replace(CALM, store_gbit=2.0), replace(CALM, store_gbit=40.0)
    assert disturbed_step(job, fast) == 1.0
    assert disturbed_step(job, slow) == pytest.approx(2.0)
    assert disturbed_step(job, replace(fast, read_ahead=False)) == pytest.approx(1.1)
