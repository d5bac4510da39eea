"""Hosts made of network namespaces: own addresses, own names, own sshd, and a cable each that can be pulled.

python tests/launch/net_hosts.py DIR 2       # starts them, prints how to get in, ends them at Ctrl-C or SIGTERM
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

_SEARCH = f"{os.environ['PATH']}:/usr/sbin:/sbin"
# Two of these may stand side by side: names and network are this process's own.
_TAG = f"{os.getpid() % 65536:x}"
_SWITCH = f"sel{_TAG}"
_NETWORK = f"10.77.{os.getpid() % 250}"


def _port(index: int) -> str:
    """The switch's end of a host's cable."""
    return f"sel{_TAG}p{index}"


def _space(name: str) -> str:
    return f"sel{_TAG}-{name}"


def why_not() -> str | None:
    """Why there can be no such hosts here, or None."""
    missing = [name for name in ("ip", "sshd", "ssh", "unshare", "pdsh") if shutil.which(name, path=_SEARCH) is None]
    if missing:
        return f"{', '.join(missing)} not installed (Debian: iproute2, openssh-server, pdsh)"
    if os.geteuid() != 0:
        return "network namespaces need root"
    if subprocess.run(["ip", "netns", "add", _space("probe")], capture_output=True).returncode:
        return "the kernel allows no network namespace here"
    subprocess.run(["ip", "netns", "delete", _space("probe")], check=True)
    return None


@dataclass(frozen=True)
class Hosts:
    """`names` are known by name to each other; `ssh` is the beginning of a command line."""

    names: list[str]
    folder: Path

    def address(self, name: str) -> str:
        return f"{_NETWORK}.{self.names.index(name) + 1}"

    @property
    def ssh_options(self) -> str:
        return (
            f"-i {self.folder}/key -o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null -o LogLevel=ERROR "
            "-o BatchMode=yes"
        )

    def start(self, name: str, script: str, log: Path) -> subprocess.Popen[bytes]:
        """Run a shell script on a host, as somebody logged in there would."""
        with log.open("ab") as out:
            command = ["ssh", *self.ssh_options.split(), self.address(name), script]
            return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=out, stderr=out)

    def run(self, name: str, script: str) -> str:
        command = ["ssh", *self.ssh_options.split(), self.address(name), script]
        return subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=True).stdout

    def pull_cable(self, name: str) -> None:
        """The switch's side goes down: the host keeps its address and simply hears nothing more."""
        _ip("link", "set", _port(self.names.index(name)), "down")

    def plug_cable(self, name: str) -> None:
        _ip("link", "set", _port(self.names.index(name)), "up")

    def processes(self, name: str) -> dict[int, str]:
        """{id: command line} of what runs on a host."""
        found = {}
        command = ["ip", "netns", "pids", _space(name)]
        for pid in subprocess.run(command, capture_output=True, text=True).stdout.split():
            with suppress(OSError):
                found[int(pid)] = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
        return found

    def power_off(self, name: str) -> None:
        """The cable goes first: nobody hears the processes die."""
        self.pull_cable(name)
        self.end_processes(name)

    def end_processes(self, name: str) -> None:
        """kill -9 whatever runs on a host."""
        for pid in self.processes(name):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


@contextmanager
def hosts(folder: Path, number: int) -> Iterator[Hosts]:
    """`number` hosts named n1, n2, … on one switch, on which this machine is, too."""
    folder.mkdir(parents=True, exist_ok=True)
    made = Hosts([f"n{index + 1}" for index in range(number)], folder)
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / "key"], check=True)
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / "host_key"], check=True)
    shutil.copy(folder / "key.pub", folder / "authorized_keys")
    names = "".join(f"{made.address(name)} {name}\n" for name in made.names)
    (folder / "hosts").write_text(f"127.0.0.1 localhost\n{names}")
    Path("/run/sshd").mkdir(exist_ok=True)
    daemons: list[subprocess.Popen[bytes]] = []
    try:
        _ip("link", "add", _SWITCH, "type", "bridge")
        _ip("address", "add", f"{_NETWORK}.254/24", "dev", _SWITCH)
        _ip("link", "set", _SWITCH, "up")
        for index, name in enumerate(made.names):
            _add_host(made, index, name)
            daemons.append(_start_sshd(made, name))
        for name in made.names:
            _wait_for_ssh(made, name)
        yield made
    finally:
        for daemon in daemons:
            daemon.terminate()
            daemon.wait()
        for name in made.names:
            made.end_processes(name)
        for index, name in enumerate(made.names):
            subprocess.run(["ip", "netns", "delete", _space(name)], capture_output=True)
            subprocess.run(["ip", "link", "delete", _port(index)], capture_output=True)
        subprocess.run(["ip", "link", "delete", _SWITCH], capture_output=True)


def _add_host(made: Hosts, index: int, name: str) -> None:
    space, port = _space(name), _port(index)
    _ip("netns", "add", space)
    _ip("link", "add", port, "type", "veth", "peer", "name", "eth0", "netns", space)
    _ip("link", "set", port, "master", _SWITCH)
    _ip("link", "set", port, "up")
    for command in (
        ["address", "add", f"{made.address(name)}/24", "dev", "eth0"],
        ["link", "set", "eth0", "up"],
        ["link", "set", "lo", "up"],
    ):
        _ip("-n", space, *command)


def _start_sshd(made: Hosts, name: str) -> subprocess.Popen[bytes]:
    conf = made.folder / f"sshd-{name}.conf"
    conf.write_text(
        f"HostKey {made.folder}/host_key\nAuthorizedKeysFile {made.folder}/authorized_keys\nPermitRootLogin yes\n"
        f"PasswordAuthentication no\nUsePAM no\nStrictModes no\nMaxStartups 100\nPidFile none\n"
    )
    script = f"hostname {name} && mount --bind {made.folder}/hosts /etc/hosts && exec /usr/sbin/sshd -D -e -f {conf}"
    command = ["ip", "netns", "exec", _space(name), "unshare", "--uts", "--mount", "bash", "-c", script]
    with (made.folder / f"sshd-{name}.log").open("wb") as log:
        return subprocess.Popen(command, stdout=log, stderr=log, env=os.environ | {"PATH": _SEARCH})


def _wait_for_ssh(made: Hosts, name: str) -> None:
    deadline = time.monotonic() + 60
    while True:
        try:
            assert made.run(name, "hostname").strip() == name
            return
        except subprocess.CalledProcessError as error:
            if time.monotonic() > deadline:
                raise TimeoutError(f"{name}: {error.stderr}") from error
            time.sleep(0.3)


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, env=os.environ | {"PATH": _SEARCH})


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job starts with it ignored
    with hosts(Path(sys.argv[1]).absolute(), int(sys.argv[2])) as found:
        print(f'export PDSH_SSH_ARGS_APPEND="{found.ssh_options}"', flush=True)
        with suppress(KeyboardInterrupt):
            signal.pause()
