"""Ranks that meet, and the message about one that does not arrive or becomes silent."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import time
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any

import pytest
import torch
import torch.distributed as dist

from pipeline.training.cluster import peers
from pipeline.training.cluster.distributed import World
from pipeline.training.cluster.peers import PeerLost, meet, watched_peers


@pytest.fixture(autouse=True)
def no_process_group() -> None:
    """An earlier test of the same process may have left its group of one, and ranks in a group do not meet again."""
    if dist.is_initialized():
        dist.destroy_process_group()


def world(rank: int, size: int, host: str) -> World:
    return World(rank, size, 0, 1, torch.device("cpu"), host)


def meeting(**more: str) -> dict[str, str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(probe.getsockname()[1]), **more}


def test_a_missing_rank_is_named_with_its_host() -> None:
    """A rank that never comes is named with the host it was expected on."""
    with pytest.raises(PeerLost) as caught:
        meet(world(0, 2, "n1"), timedelta(seconds=1), meeting(SELORA_HOSTS="n1,n2"))
    text = str(caught.value)
    assert "1 of 2 ranks did not come within 1 s: rank 1, expected on n2. Those on n1 are here" in text


def test_a_leading_host_that_cannot_be_reached_is_named() -> None:
    env = meeting()
    with pytest.raises(PeerLost, match=f"rank 1 on n2 did not reach rank 0 at 127.0.0.1, .* port {env['MASTER_PORT']}"):
        meet(world(1, 2, "n2"), timedelta(seconds=1), env)


def test_a_port_that_another_job_has_names_the_variable() -> None:
    with socket.socket(socket.AF_INET6) as other:
        other.bind(("::", 0))
        other.listen()
        env = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(other.getsockname()[1])}
        with pytest.raises(PeerLost, match=f"could not open port {env['MASTER_PORT']}: .*; set another MASTER_PORT"):
            meet(world(0, 2, "n1"), timedelta(seconds=1), env)


def test_ranks_meet_at_an_address_of_ipv6() -> None:
    """Rank 0 serves there and finds itself; the message about the other rank shows it."""
    with pytest.raises(PeerLost, match="1 of 2 ranks did not come within 1 s: rank 1. Those on n1 are here"):
        meet(world(0, 2, "n1"), timedelta(seconds=1), meeting(MASTER_ADDR="::1"))


def _be(rank: int, env: dict[str, str], talk: Connection, work: Callable[[], Any]) -> None:
    peers.BEAT_SECONDS = 0.2
    peers.Pulse.__init__.__defaults__ = (0.2,)
    store = meet(world(rank, 2, f"n{rank + 1}"), timedelta(seconds=60), env)
    talk.send("met")
    try:
        with watched_peers(store, world(rank, 2, f"n{rank + 1}")):
            work()
    except PeerLost as lost:
        talk.send(str(lost))


def _wait_for_ever() -> None:
    time.sleep(600)


def _fail_like_gloo() -> None:
    time.sleep(2.0)
    raise RuntimeError("[gloo/transport/tcp/pair.cc:538] Connection closed by peer [10.0.0.2]:4242")


def test_a_dead_rank_is_named_with_its_host() -> None:
    """A rank that died is named with its host when a collective fails."""
    context, env = multiprocessing.get_context("fork"), meeting()
    ends = [context.Pipe() for _ in range(2)]
    processes = [
        context.Process(target=_be, args=(rank, env, ends[rank][1], work))
        for rank, work in enumerate((_fail_like_gloo, _wait_for_ever))
    ]
    for process in processes:
        process.start()
    try:
        assert [end[0].recv() for end in ends] == ["met", "met"]
        assert processes[1].pid is not None
        os.kill(processes[1].pid, signal.SIGKILL)
        assert ends[0][0].poll(60)
        text = ends[0][0].recv()
    finally:
        for process in processes:
            process.kill()
            process.join()
    assert "rank 0 on n1: a collective failed" in text
    assert "rank 1 on n2 has given no sign of life" in text
    assert "continues from the last checkpoint" in text


def test_an_error_of_this_rank_alone_stays_what_it_is() -> None:
    assert not peers.is_broken_link(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    store = meet(world(0, 1, "n1"), timedelta(seconds=1))
    with pytest.raises(RuntimeError, match="shapes"), watched_peers(store, world(0, 1, "n1")):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")
