"""A Ray cluster of separate nodes with token authentication, one of which loses its power."""

from __future__ import annotations

import os
import secrets
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(2400)]

ROOT, BIN = Path(__file__).parents[2], Path(sys.executable).parent
GRID = "grid: {gate.lam: [0.3, 1.0]}\nresources: {workers: 2, cpus_per_worker: 1, gpus_per_worker: 0, eval_cpus: 1}\n"
# A directory for Ray that is each host's own, as it is on real ones.
ON_A_NODE = (
    f"mkdir -p /tmp/ray; mountpoint -q /tmp/ray || mount -t tmpfs none /tmp/ray; cd {ROOT}; "
    f"export PYTHONPATH={ROOT} OMP_NUM_THREADS=1 RAY_memory_monitor_refresh_ms=0; "
)


def wait_for(condition: Callable[[], object], seconds: float, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + seconds
    while True:
        ended = process.poll() is not None
        if condition():
            return
        assert not ended, f"ended with {process.returncode}: {log.read_text()[-3000:]}"
        assert time.monotonic() < deadline, log.read_text()[-3000:]
        time.sleep(0.2)


@contextmanager
def ray_cluster(hosts, folder: Path, token: str) -> Iterator[str]:
    """A node of one CPU on each host; yields the address."""
    head, address = hosts.names[0], f"{hosts.address(hosts.names[0])}:6379"
    start = f"RAY_AUTH_MODE=token RAY_AUTH_TOKEN={token} exec {BIN}/ray start --block --num-cpus 1 --num-gpus 0 "
    start += "--object-store-memory 100000000 --disable-usage-stats --node-ip-address "
    with ExitStack() as stack:
        for name in hosts.names:
            role = "--head --port 6379" if name == head else f"--address {address}"
            log = folder / f"ray-{name}.txt"
            process = hosts.start(name, f"{ON_A_NODE}{start}{hosts.address(name)} {role}", log)
            stack.callback(process.wait)
            stack.callback(process.terminate)  # behind a pulled cable ssh would wait for ever
            stack.callback(hosts.end_processes, name)
            wait_for(lambda log=log: log.exists() and "Ray runtime started" in log.read_text(), 240, process, log)
        yield address


def test_a_sweep_survives_the_loss_of_a_node(
    three_hosts,
    open_folder: Path,
    training: list[str],
    losses_of: Callable[[Path], dict[int, float]],
    equal_runs: Callable[[Path, Path], bool],
) -> None:
    """A sweep survives the loss of a node and ends with equal numbers."""

    def steps() -> dict[Path, int]:
        found = {path.parent: losses_of(path.parent) for path in sweep_dir.glob("trials/*/journal.jsonl")}
        return {run_dir: max(losses, default=0) for run_dir, losses in found.items()}

    token, log, grid = secrets.token_hex(32), open_folder / "ray-sweep.txt", open_folder / "ray-grid.yaml"
    grid.write_text(GRID)
    sweep_dir = open_folder / "runs" / "raynet"
    command = f"{BIN}/python -m pipeline sweep {training[0]} {grid} {' '.join(training[1:])} name=raynet --address "
    with ray_cluster(three_hosts, open_folder, token) as address:
        for stranger in ("RAY_AUTH_MODE=token RAY_AUTH_TOKEN=other", "RAY_AUTH_MODE=disabled"):
            refused = open_folder / f"{stranger.split('=')[-1]}.txt"
            assert three_hosts.start("n2", f"{ON_A_NODE}{stranger} {command}{address}", refused).wait(300) == 2
            said = refused.read_text()
            assert f"cannot use the Ray cluster at {address}: the token is missing or not the cluster's" in said
            assert f"(RAY_AUTH_MODE is {stranger.split()[0].split('=')[1]}); set RAY_AUTH_MODE=token, and" in said
            assert "Traceback" not in said
            assert not any(steps().values())

        driver = three_hosts.start(
            "n1", f"{ON_A_NODE}RAY_AUTH_MODE=token RAY_AUTH_TOKEN={token} exec {command}{address}", log
        )
        wait_for(lambda: any(step >= 6 for step in steps().values()), 900, driver, log)
        cut = next(run for run, step in steps().items() if step >= 6)
        with_workers = [
            name
            for name in three_hosts.names
            if any(line.startswith("ray::_rank") for line in three_hosts.processes(name).values())
        ]
        assert len(with_workers) == 2, [three_hosts.processes(name) for name in three_hosts.names]
        three_hosts.power_off(with_workers[-1])
        assert driver.wait(1500) == 0, log.read_text()[-3000:]
    trials = sorted(path for path in (sweep_dir / "trials").iterdir())
    assert [steps()[path] for path in trials] == [16, 16]
    hand = ["name=hand", f"out={open_folder}/runs"]
    launcher = [BIN / "torchrun", "--standalone", "--nproc-per-node", "2", "-m", "pipeline", "train"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    subprocess.run([*launcher, cut / "config.yaml", *hand], env=environment, check=True, timeout=900)
    assert equal_runs(open_folder / "runs" / "hand", cut)
    assert (cut / "journal.jsonl").read_text().count('"RUNNING"') >= 2
