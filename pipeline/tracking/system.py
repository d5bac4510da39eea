"""System metrics of a node while a run trains, sampled into the node's own journal, so that no outage loses them."""

from __future__ import annotations

import logging
import os
import re
import shutil
import subprocess
import threading
from pathlib import Path

import psutil

from pipeline.config import ConfigError
from pipeline.tracking.journal import Journal

_GPU_FIELDS = ("utilization.gpu", "memory.used", "memory.total", "power.draw")
_GPU_SECONDS = 10.0

logger = logging.getLogger("selora.tracking")


class SystemSampler:
    """A thread that writes system/<node>/… every `seconds` to run_dir/journal-<node>.jsonl, with MLflow's names.

    It ends by itself when the parent of this process is no longer `parent`, the process id of the trainer.
    """

    def __init__(self, run_dir: Path, node: str, seconds: float, parent: int) -> None:
        self._run_dir, self._seconds = run_dir, seconds
        self._node = re.sub(r"[^A-Za-z0-9_-]", "_", node)
        self._over = threading.Event()
        self._parent = parent
        self._thread = threading.Thread(target=self._run, name="system-sampler", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Stop sampling and release the node's journal."""
        self._over.set()
        self._thread.join(timeout=2 * _GPU_SECONDS)

    def _run(self) -> None:
        try:
            journal = Journal(self._run_dir, f"journal-{self._node}.jsonl")
        except ConfigError as error:
            logger.warning("no system metrics of %s: %s", self._node, error)
            return
        step = journal.last_step() + 1
        network = psutil.net_io_counters()
        psutil.cpu_percent()  # the first call only sets the reference for the second
        # a restarted run needs this journal at once, so release it when the trainer is killed
        while not self._over.wait(self._seconds) and os.getppid() == self._parent:
            values = sample_machine(self._run_dir) | sample_gpus()
            received, sent = psutil.net_io_counters().bytes_recv, psutil.net_io_counters().bytes_sent
            values["network_receive_megabytes"] = (received - network.bytes_recv) / 1e6
            values["network_transmit_megabytes"] = (sent - network.bytes_sent) / 1e6
            journal.metrics(step, {f"system/{self._node}/{name}": value for name, value in values.items()})
            step += 1
        journal.close()


def sample_machine(directory: Path) -> dict[str, float]:
    """Processor and memory of the machine, and the disk that holds `directory`."""
    memory, disk = psutil.virtual_memory(), psutil.disk_usage(str(directory))
    return {
        "cpu_utilization_percentage": psutil.cpu_percent(),
        "system_memory_usage_megabytes": memory.used / 1e6,
        "system_memory_usage_percentage": memory.percent,
        "disk_usage_percentage": disk.percent,
        "disk_usage_megabytes": disk.used / 1e6,
        "disk_available_megabytes": disk.free / 1e6,
    }


def sample_gpus() -> dict[str, float]:
    """Use, memory and power of each NVIDIA GPU from nvidia-smi; empty without GPUs."""
    if shutil.which("nvidia-smi") is None:
        return {}
    command = ["nvidia-smi", f"--query-gpu={','.join(_GPU_FIELDS)}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, encoding="utf-8", timeout=_GPU_SECONDS, check=True)
    except (OSError, subprocess.SubprocessError):
        return {}
    return parse_gpus(done.stdout)


def parse_gpus(text: str) -> dict[str, float]:
    """Values from nvidia-smi's lines, one GPU per line; an unavailable field ("[N/A]") is left out."""
    values: dict[str, float] = {}
    for index, line in enumerate(text.strip().splitlines()):
        use, used, total, power = (_number(part) for part in (line.split(",") + [""] * 4)[:4])
        if use is not None:
            values[f"gpu_{index}_utilization_percentage"] = use
        if used is not None:
            values[f"gpu_{index}_memory_usage_megabytes"] = used * 1.048576
            if total:
                values[f"gpu_{index}_memory_usage_percentage"] = 100 * used / total
        if power is not None:
            values[f"gpu_{index}_power_usage_watts"] = power
    return values


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None
