"""Skips tests whose requirements this machine lacks, unless SELORA_REQUIRE names them."""

from __future__ import annotations

import os
from collections import Counter
from typing import NoReturn

import pytest

# What a machine may lack. SELORA_REQUIRE=slurm,hosts names what must be there; .ci/run sets it to all it installs.
LACKS = ("avif", "docker", "gpu", "hosts", "namespaces", "registry", "slurm", "tmpfs", "wordnet")


def pytest_configure() -> None:
    """Refuse a misspelled requirement, which would require nothing."""
    unknown = sorted(_required() - set(LACKS))
    if unknown:
        raise pytest.UsageError(f"SELORA_REQUIRE={','.join(unknown)}: not one of {', '.join(LACKS)}")


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip what needs a GPU where there is none."""
    if item.get_closest_marker("gpu") is None:
        return
    import torch

    if not torch.cuda.is_available():
        lacking("gpu", "there is no CUDA device")


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """End each run with one line of what was skipped and why."""
    reasons = Counter(
        report.longrepr[2].removeprefix("Skipped: ")
        for report in terminalreporter.stats.get("skipped", [])
        if isinstance(report.longrepr, tuple)
    )
    listed = "; ".join(f"{count} of {reason}" for reason, count in sorted(reasons.items()))
    terminalreporter.write_line(f"skipped: {listed or 'nothing'}")


def _required() -> set[str]:
    return set(filter(None, os.environ.get("SELORA_REQUIRE", "").split(",")))


def lacking(what: str, why: str) -> NoReturn:
    """Skip the test, or fail it where SELORA_REQUIRE names what this machine lacks."""
    assert what in LACKS, what
    if what in _required():
        pytest.fail(f"{what}: {why}, and SELORA_REQUIRE={os.environ['SELORA_REQUIRE']}", pytrace=False)
    pytest.skip(f"{what}: {why}")
