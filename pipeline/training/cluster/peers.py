"""The ranks of one run as peers: they meet, give signs of life, and missing ranks are named.

A collective that waits for a dead host reports only "timed out", not which host. So a thread of every rank also writes
a pulse to a key-value store; when a collective fails, the store shows whose pulse is missing.
"""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta

import psutil
import torch.distributed as dist

from pipeline.config import Ended
from pipeline.training.cluster.distributed import World

BEAT_SECONDS = 3.0
_WARN_AFTER = 4  # missed beats before a warning
_NAMED = 8  # ranks listed in one message

logger = logging.getLogger("selora.training")


class PeerLost(Ended):
    """Ranks are missing; the message names them and their hosts. The run can continue from its last checkpoint."""


def meet(world: World, timeout: timedelta, env: Mapping[str, str] | None = None) -> dist.Store | None:
    """Wait until all ranks are at the store of MASTER_ADDR:MASTER_PORT, and return it.

    None if there is nothing to wait for: a world of one, or a process group that exists already.

    Raises PeerLost after `timeout`: on rank 0 with the ranks that did not arrive, on the others with the host that
    could not be reached.
    """
    if world.world_size == 1 or dist.is_initialized():
        return None
    env = os.environ if env is None else env
    use_route_to(env["MASTER_ADDR"])
    store = _connect(world, timeout, env)
    try:
        store.set(_key("here", world.rank), world.host)
        _roll_call(store, world, timeout, env.get("SELORA_HOSTS", ""))
    except dist.DistNetworkError as error:
        raise PeerLost(
            f"rank {world.rank} on {world.host}: rank 0 at {env['MASTER_ADDR']} left while the ranks were meeting, see "
            f"its message ({_first_line(error)})"
        ) from None
    return store


def _roll_call(store: dist.Store, world: World, timeout: timedelta, hosts: str) -> None:
    deadline = time.monotonic() + timeout.total_seconds()
    missing = list(range(world.world_size))
    while missing := [rank for rank in missing if not store.check([_key("here", rank)])]:
        if time.monotonic() > deadline:
            raise PeerLost(_absent(store, missing, world, timeout, hosts))
        time.sleep(0.1)


def _connect(world: World, timeout: timedelta, env: Mapping[str, str]) -> dist.Store:
    address, port = env["MASTER_ADDR"], int(env["MASTER_PORT"])
    # torchrun's agent serves its own store there; otherwise the first rank does.
    serves = world.rank == 0 and env.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    try:
        store = dist.TCPStore(
            address, port, is_master=serves, timeout=timeout, wait_for_workers=False, multi_tenant=True
        )
    except (dist.DistNetworkError, dist.DistStoreError) as error:
        where = "could not open" if serves else f"did not reach rank 0 at {address}, within {timeout.seconds} s,"
        way_out = "; set another MASTER_PORT on every host" if serves else ""
        raise PeerLost(
            f"rank {world.rank} on {world.host} {where} port {port}: {_first_line(error)}{way_out}"
        ) from None
    # Restarted workers meet at the same store as their predecessors.
    return dist.PrefixStore(f"selora/{env.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


def _absent(store: dist.Store, missing: list[int], world: World, timeout: timedelta, hosts: str) -> str:
    names = hosts.split(",") if hosts else []
    expected = dict.fromkeys(
        names[rank // world.local_world_size] for rank in missing if rank // world.local_world_size < len(names)
    )
    here = [rank for rank in range(world.world_size) if rank not in missing]
    came = dict.fromkeys(store.get(_key("here", rank)).decode() for rank in here)
    return (
        f"{len(missing)} of {world.world_size} ranks did not come within {timeout.seconds} s: {_list(missing)}"
        + (f", expected on {', '.join(expected)}" if expected else "")
        + f". Those on {', '.join(came)} are here. Check the log of the missing host, and the network between them"
    )


class Pulse:
    """Writes a pulse to the store every few seconds, and remembers the latest pulse of each other rank."""

    def __init__(self, store: dist.Store, world: World, seconds: float = BEAT_SECONDS) -> None:
        self._store, self._world, self._seconds = store.clone(), world, seconds
        self._hosts = [store.get(_key("here", rank)).decode() for rank in range(world.world_size)]
        self._keys = [_key("beat", rank) for rank in range(world.world_size)]
        self._seen: dict[int, tuple[bytes, float]] = {}
        self._warned: set[int] = set()
        self._unreachable: float | None = None
        self._over = threading.Event()
        store.set(self._keys[world.rank], "0")
        self._thread = threading.Thread(target=self._run, name="pulse", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Stop the pulse."""
        self._over.set()
        self._thread.join(2 * self._seconds)

    def verdict(self) -> str:
        """The missing ranks, after reading all pulses again; empty if all are alive."""
        seen = dict(self._seen)
        self._over.wait(2.5 * self._seconds)
        if self._unreachable is not None:
            return (
                f"rank {self._world.rank} on {self._world.host} cannot reach the first host, "
                f"{self._hosts[0]}, since {time.monotonic() - self._unreachable:.0f} s"
            )
        silent = [rank for rank, (word, _) in self._seen.items() if rank in seen and seen[rank][0] == word]
        if not silent:
            return ""
        since = max(time.monotonic() - self._seen[rank][1] for rank in silent)
        return f"{self._named(silent)} has given no sign of life for {since:.0f} s"

    def _run(self) -> None:
        number = 0
        while not self._over.wait(self._seconds):
            number += 1
            try:
                self._store.set(self._keys[self._world.rank], str(number))
                words = self._store.multi_get(self._keys)
                self._unreachable = None
            except (dist.DistError, RuntimeError) as error:
                # The store ends with its rank at the end of a run; before that, verdict() reports it.
                self._unreachable = self._unreachable or time.monotonic()
                logger.debug("no pulse: %s", _first_line(error))
                continue
            self._note(words)

    def _note(self, words: list[bytes]) -> None:
        now = time.monotonic()
        for rank, word in enumerate(words):
            if self._seen.get(rank, (b"", 0.0))[0] != word:
                self._seen[rank] = (word, now)
        if not self._world.is_main:
            return
        silent = {rank for rank, (_, at) in self._seen.items() if now - at > _WARN_AFTER * self._seconds}
        if silent - self._warned:
            logger.warning("no sign of life from %s; waiting", self._named(sorted(silent)))
        if self._warned - silent:
            logger.warning("%s is back", self._named(sorted(self._warned - silent)))
        self._warned = silent

    def _named(self, ranks: list[int]) -> str:
        hosts = dict.fromkeys(self._hosts[rank] for rank in ranks)
        return f"{_list(ranks)} on {', '.join(hosts)}"


@contextmanager
def watched_peers(store: dist.Store | None, world: World) -> Iterator[None]:
    """Keep a pulse during the block; raise a failed collective as PeerLost with the missing rank and host."""
    if store is None:
        yield
        return
    pulse = Pulse(store, world)
    try:
        yield
    except RuntimeError as error:
        if not is_broken_link(error):
            raise
        found = pulse.verdict() or "all ranks live: one of them left the others, see its own message"
        raise PeerLost(
            f"rank {world.rank} on {world.host}: a collective failed ({_first_line(error)}); {found}. "
            f"The same command continues from the last checkpoint, on as many hosts as there are"
        ) from error
    finally:
        pulse.stop()


def is_broken_link(error: BaseException) -> bool:
    """Whether a collective failed because of another rank or the network, not because of this rank's computation."""
    if isinstance(error, dist.DistError):
        return True
    text = str(error)
    return "gloo" in text or "NCCL" in text or "Connection closed by peer" in text or "connection to peer" in text


def use_route_to(address: str) -> None:
    """Let gloo use the interface that leads to `address`.

    By default it takes the address of the host's name, which on many systems is 127.0.1.1; ranks of other hosts then
    wait for a connection that cannot be made.
    """
    if "GLOO_SOCKET_IFNAME" in os.environ:
        return
    own = route_address(address)
    for name, entries in psutil.net_if_addrs().items():
        if own is not None and any(entry.address == own for entry in entries):
            os.environ["GLOO_SOCKET_IFNAME"] = name


def route_address(address: str) -> str | None:
    """This host's own address on the route to `address`; None without a route, or if it is the loopback."""
    try:
        family, kind, _, _, target = socket.getaddrinfo(address, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:
            probe.connect(target)  # a datagram socket only looks the route up
            own = str(probe.getsockname()[0])
    except OSError:
        return None
    return None if own.startswith("127.") or own == "::1" else own


def _key(what: str, rank: int) -> str:
    return f"{what}/{rank}"


def _list(ranks: list[int]) -> str:
    more = f" and {len(ranks) - _NAMED} more" if len(ranks) > _NAMED else ""
    return ("rank " if len(ranks) == 1 else "ranks ") + ", ".join(map(str, ranks[:_NAMED])) + more


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
