"""A real Slurm on this one machine: munge, a controller, and a daemon for each of two nodes.

    python tests/launch/slurm_cluster.py DIR       # starts it, prints the environment, ends it at Ctrl-C or SIGTERM

Everything runs in the foreground of this process's children, which are ended by their ids.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

ROOT = Path(__file__).parents[2]
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "unshare")
NODES = ("n1", "n2")
_SEARCH = f"{os.environ['PATH']}:/usr/sbin:/sbin"


def why_not() -> str | None:
    """Why there can be no Slurm here, or None."""
    missing = [name for name in PROGRAMS if shutil.which(name, path=_SEARCH) is None]
    if missing:
        return f"{', '.join(missing)} not installed (Debian: slurm-wlm, munge)"
    if os.geteuid() != 0:
        return "slurmd needs root"
    if subprocess.run(["unshare", "-m", "true"], capture_output=True).returncode:
        return "the kernel allows no mount namespace here"
    return None


@contextmanager
def slurm(folder: Path, cpus: int = 2) -> Iterator[dict[str, str]]:
    """Two idle nodes below `folder`; yields the environment in which sbatch and the rest find them.

    The nodes share the directory of `folder`, this checkout and its Python, wherever these are.
    """
    conf = _write_configuration(folder, cpus)
    shared = {folder.parent, ROOT, Path(sys.prefix), Path(sys.base_prefix)}
    environment = os.environ | {"SLURM_CONF": str(conf), "PATH": _SEARCH}
    started: list[subprocess.Popen[bytes]] = []
    try:
        started.append(_start(folder, "munged", ["munged", *_munge_options(folder)], environment, user="munge"))
        _wait(lambda: (folder / "munge/socket").exists(), folder, "munged")
        started.append(_start(folder, "slurmctld", ["slurmctld", "-D"], environment))
        for node in NODES:
            mounts = f"{_own_tmp(folder, node, shared)}mount --bind {folder}/hosts /etc/hosts"
            script = f"{mounts} && exec slurmd -D -N {node}"
            started.append(_start(folder, f"slurmd-{node}", ["unshare", "-m", "bash", "-c", script], environment))
        _wait(lambda: _idle(environment) == len(NODES), folder, "two idle nodes")
        yield environment
    finally:
        subprocess.run(["scancel", "--user", "root"], env=environment, capture_output=True)
        for process in reversed(started):
            process.terminate()
            try:
                process.wait(15)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def node_tmp(folder: Path, node: str) -> Path:
    """A node's /tmp, as this process finds it."""
    return folder / f"tmp-{node}"


def _own_tmp(folder: Path, node: str, shared: set[Path]) -> str:
    """Shell lines that give a node a /tmp of its own, in which it sees only the directories of `shared`."""
    own = node_tmp(folder, node)
    own.mkdir(mode=0o1777, parents=True)
    script = ""
    for directory in sorted(shared):
        if directory.is_relative_to("/tmp"):
            inside = own / directory.relative_to("/tmp")
            inside.mkdir(parents=True, exist_ok=True)
            script += f"mount --bind {directory} {inside} && "
    return f"{script}mount --rbind {own} /tmp && "


def _write_configuration(folder: Path, cpus: int) -> Path:
    for name in ("state", "munge", "spool-n1", "spool-n2"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    key = folder / "munge" / "key"
    key.write_bytes(os.urandom(1024))
    key.chmod(0o400)
    for path in (folder / "munge", key):
        shutil.chown(path, "munge", "munge")
    ports = _free_ports(1 + len(NODES))
    host = os.uname().nodename
    lines = [
        "ClusterName=test",
        f"SlurmctldHost={host}(127.0.0.1)",
        f"SlurmctldPort={ports[0]}",
        "SlurmUser=root",
        "AuthType=auth/munge",
        f"AuthInfo=socket={folder}/munge/socket",
        f"StateSaveLocation={folder}/state",
        f"SlurmdSpoolDir={folder}/spool-%n",
        f"SlurmctldPidFile={folder}/slurmctld.pid",
        f"SlurmdPidFile={folder}/slurmd-%n.pid",
        f"SlurmctldLogFile={folder}/slurmctld.txt",
        f"SlurmdLogFile={folder}/slurmd-%n.txt",
        "ProctrackType=proctrack/linuxproc",
        "TaskPlugin=task/none",
        "SlurmdParameters=config_overrides",
        "MpiDefault=none",
        "ReturnToService=2",
        "SchedulerType=sched/backfill",
        "SelectType=select/cons_tres",
        "SelectTypeParameters=CR_CPU",
        "AccountingStorageType=accounting_storage/none",
        "JobCompType=jobcomp/none",
        "KillWait=60",
        "MailProg=/bin/true",
        *(
            f"NodeName={node} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs={cpus} State=UNKNOWN"
            for node, port in zip(NODES, ports[1:], strict=True)
        ),
        f"PartitionName=all Nodes={','.join(NODES)} Default=YES MaxTime=INFINITE State=UP OverSubscribe=NO",
    ]
    conf = folder / "slurm.conf"
    conf.write_text("\n".join(lines) + "\n")
    # Ray takes 127.0.0.1 for "find out yourself".
    hosts = Path("/etc/hosts").read_text() + "".join(f"127.0.0.1{n} {node}\n" for n, node in enumerate(NODES, 1))
    (folder / "hosts").write_text(hosts)
    return conf


def _munge_options(folder: Path) -> list[str]:
    own = folder / "munge"
    return [
        "--foreground",
        "--force",
        f"--key-file={own}/key",
        f"--socket={own}/socket",
        f"--pid-file={own}/pid",
        f"--seed-file={own}/seed",
        f"--log-file={own}/log",
    ]


def _start(
    folder: Path, name: str, command: list[str], environment: dict[str, str], user: str | None = None
) -> subprocess.Popen[bytes]:
    with (folder / f"{name}.out").open("wb") as log:
        return subprocess.Popen(command, env=environment, stdout=log, stderr=log, user=user, cwd=folder)


def _idle(environment: dict[str, str]) -> int:
    command = ["sinfo", "--noheader", "--Node", "--format=%T"]
    said = subprocess.run(command, env=environment, capture_output=True, text=True).stdout
    return said.split().count("idle")


def _wait(done, folder: Path, what: str, seconds: float = 90) -> None:
    deadline = time.monotonic() + seconds
    while not done():
        if time.monotonic() > deadline:
            logs = "\n".join(
                f"== {path.name}\n{path.read_text()[-1500:]}"
                for path in sorted(folder.glob("*.out")) + sorted(folder.glob("*.txt"))
            )
            raise TimeoutError(f"no {what} within {seconds:.0f} s\n{logs}")
        time.sleep(0.3)


def _free_ports(number: int) -> list[int]:
    probes = [socket.create_server(("127.0.0.1", 0)) for _ in range(number)]
    ports = [probe.getsockname()[1] for probe in probes]
    for probe in probes:
        probe.close()
    return ports


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job starts with it ignored
    with slurm(Path(sys.argv[1]).absolute()) as found:
        print(f"export SLURM_CONF={found['SLURM_CONF']}", flush=True)
        with suppress(KeyboardInterrupt):
            signal.pause()
