"""One rank of a world of two without a model: meets the other, then sums a number with it every moment."""

from __future__ import annotations

import os
import sys
import time
from datetime import timedelta

import torch
import torch.distributed as dist

from pipeline.training.cluster.distributed import World
from pipeline.training.cluster.peers import PeerLost, meet, watched_peers
from pipeline.training.engine import start_process_group

rank, seconds = int(sys.argv[1]), timedelta(seconds=float(sys.argv[2]))
world = World(rank, 2, 0, 1, torch.device("cpu"))
os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": "0"}
try:
    store = meet(world, seconds)
    group = start_process_group(world, seconds, store)
    print("met by", os.environ["GLOO_SOCKET_IFNAME"], flush=True)
    with watched_peers(store, world):
        for number in range(int(sys.argv[3])):
            dist.all_reduce(torch.ones(1000), group=group)
            print("sum", number, flush=True)
            time.sleep(0.2)
except PeerLost as lost:
    print("lost:", lost, flush=True)
    os._exit(1)
