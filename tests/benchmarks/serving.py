"""The registered model behind MLflow's server under load: throughput, latency and memory, with bad requests among them.

    python tests/benchmarks/serving.py --clients 64 --seconds 300

A server is started on this machine with the demo's CLIP, or with `--model` (models:/NAME@champion or a directory).
Each client asks one question after the other over its own connection: mostly one photo, some of 8 photos, some with
class names of its own, and one in twenty that cannot be answered. Prints a table and exits with 1 where the server
restarted, answered a good question with anything but 200, or a bad one with anything but 4xx.
"""

from __future__ import annotations

import argparse
import base64
import http.client
import io
import json
import os
import random
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
import zlib
from collections import Counter
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from PIL import Image

from pipeline.data.shards.foreign import read_shards
from pipeline.demo.assets import MODEL, asset, unpack
from pipeline.tracking.served.served import Labels, load_served, predict, save_served

CLASSES = ["dress", "hat", "longsleeve", "outwear", "pants", "shirt", "shoes", "shorts", "skirt", "t-shirt"]
EVERY = 2.0  # seconds between looks at the server's memory


@dataclass
class Seen:
    """What the clients saw."""

    seconds: list[float] = field(default_factory=list)
    images: int = 0
    statuses: Counter[tuple[bool, int]] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, good: bool, status: int, seconds: float, images: int, answer: bytes) -> None:
        with self.lock:
            self.statuses[good, status] += 1
            if good:
                self.seconds.append(seconds)
                self.images += images
            if (status == 200) != good or (not good and not 400 <= status < 500):
                self.wrong.append(f"{status}: {answer[:200]!r}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=300)
    parser.add_argument("--model", help="models:/NAME@ALIAS or a directory (default: the demo's CLIP)")
    given = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # a stopped test leaves no server behind
    with tempfile.TemporaryDirectory(prefix="selora-serving-") as folder:
        root = Path(folder)
        photos = demo_photos(root)
        server, port = start(given.model or str(demo_model(root)), root / "server.log")
        try:
            return load(given.clients, given.seconds, photos, server, port, root / "server.log")
        finally:
            os.killpg(server.pid, signal.SIGTERM)
            server.wait(60)


def demo_photos(root: Path) -> list[str]:
    source = read_shards(unpack(root / "data", "clothing_train.tar.gz") / "clothing_train")
    return [base64.b64encode(sample.image.read_bytes()).decode() for sample in source.samples[:200]]


def demo_model(root: Path) -> Path:
    """The demo's CLIP as the registry holds it, with the vectors of ten class names."""
    (root / "stage").mkdir()
    empty = Labels([], ["a photo of a {c}."], torch.zeros(0, 128))
    bare = load_served(save_served(root / "stage", asset(MODEL), empty, {}))
    rows = predict(bare, {"text": [f"a photo of a {name}." for name in CLASSES]}, task="embed_texts")
    labels = Labels(CLASSES, ["a photo of a {c}."], torch.tensor([row["embedding"] for row in rows]).float())
    (root / "named").mkdir()
    return save_served(root / "named", asset(MODEL), labels, {})


def start(model: str, log: Path) -> tuple[subprocess.Popen[bytes], int]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    command = [sys.executable, "-m", "mlflow", "models", "serve", "-m", model, "--env-manager", "local"]
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    with log.open("w") as output:
        server = subprocess.Popen(
            [*command, "--host", "127.0.0.1", "--port", str(port), "--workers", "1"],
            env=os.environ | {"MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false", "PATH": path},
            cwd=log.parent,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    until = time.monotonic() + 200
    while time.monotonic() < until and server.poll() is None:
        try:
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
            connection.request("GET", "/ping")
            if connection.getresponse().status == 200:
                return server, port
        except OSError:
            time.sleep(0.5)
    raise SystemExit(f"the server does not start: {log.read_text()[-2000:]}")


def load(clients: int, seconds: float, photos: list[str], server: Any, port: int, log: Path) -> int:
    seen, stop = Seen(), threading.Event()
    before = workers(server.pid)
    bad()
    ask(port, seen, random.Random(0), photos, stop, once=True)  # the first request warms up
    threads = [
        threading.Thread(target=ask, args=(port, seen, random.Random(number), photos, stop))
        for number in range(clients)
    ]
    memory, started = [rss(server.pid)], time.monotonic()
    for thread in threads:
        thread.start()
    while time.monotonic() - started < seconds:
        time.sleep(EVERY)
        memory.append(rss(server.pid))
    stop.set()
    for thread in threads:
        thread.join()
    took = time.monotonic() - started
    restarted = workers(server.pid) != before
    report(seen, memory, took, clients, restarted)
    for line in seen.wrong[:5]:
        print(line, file=sys.stderr)
    if seen.wrong:
        print(log.read_text()[-1500:], file=sys.stderr)
    return int(restarted or bool(seen.wrong))


def ask(
    port: int, seen: Seen, draw: random.Random, photos: list[str], stop: threading.Event, once: bool = False
) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=300)
    while not stop.is_set():
        good, images, body = question(draw, photos)
        started = time.monotonic()
        connection.request("POST", "/invocations", body, {"Content-Type": "application/json"})
        answer = connection.getresponse()
        content = answer.read()
        seen.add(good, answer.status, time.monotonic() - started, images, content)
        if once:
            return


def question(draw: random.Random, photos: list[str]) -> tuple[bool, int, bytes]:
    """Whether it can be answered, its images, and the request."""
    kind = draw.random()
    if kind < 0.05:
        return False, 0, draw.choice(bad())
    images = 8 if kind < 0.15 else 1
    rows = [{"image": draw.choice(photos)} for _ in range(images)]
    params = {"class_names": ["a red shoe", "a blue hat", "trousers"]} if kind < 0.25 else {"top_k": 3}
    return True, images, json.dumps({"dataframe_records": rows, "params": params}).encode()


@cache
def bad() -> list[bytes]:
    """Requests that a server must refuse: no JSON, no image, half an image, too many pixels, rows or texts."""
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8))
    whole = io.BytesIO()
    noise.save(whole, "PNG")
    images = [huge_png(60_000), whole.getvalue()[:3000], b"GIF89a", b""]
    rows = [[{"image": base64.b64encode(image).decode()}] for image in images]
    rows += [[{"image": "no base64!"}], [{"path": "/etc/hostname"}], [{"image": ""}] * 2000]
    bodies = [json.dumps({"dataframe_records": each}).encode() for each in rows]
    row = [{"image": base64.b64encode(whole.getvalue()).decode()}]
    names = {"class_names": [f"thing {i}" for i in range(200_000)]}
    bodies.append(json.dumps({"dataframe_records": row, "params": names}).encode())
    return [*bodies, b"", b"{", b"[1, 2]", b'{"dataframe_records": 5}', b"\xff\xfe"]


def huge_png(side: int) -> bytes:
    """The head of a PNG of side x side pixels: a decoder that believes it would need gigabytes."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(bytes(3 * side + 1))) + chunk(b"IEND", b"")


def rss(pid: int) -> int:
    """Bytes of the server and its workers."""
    total = 0
    for process in [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]:
        try:
            total += process.memory_info().rss
        except psutil.NoSuchProcess:
            continue
    return total


def workers(pid: int) -> list[int]:
    return sorted(child.pid for child in psutil.Process(pid).children(recursive=True))


def report(seen: Seen, memory: list[int], took: float, clients: int, restarted: bool) -> None:
    times = 1000 * np.array(seen.seconds)
    mib, tail = 2**20, memory[len(memory) // 2 :]
    answered = sum(count for (good, _), count in seen.statuses.items() if good)
    refused = Counter({status: count for (good, status), count in seen.statuses.items() if not good})
    print("| clients | seconds | requests/s | images/s | p50 ms | p99 ms | memory MiB: start, half time, end, most |")
    print("|--:|--:|--:|--:|--:|--:|:--|")
    shown = [f"{memory[0] / mib:.0f}", f"{tail[0] / mib:.0f}", f"{memory[-1] / mib:.0f}", f"{max(memory) / mib:.0f}"]
    cells = [str(clients), f"{took:.0f}", f"{answered / took:.1f}", f"{seen.images / took:.1f}"]
    cells += [f"{np.percentile(times, 50):.0f}", f"{np.percentile(times, 99):.0f}", ", ".join(shown)]
    print(f"| {' | '.join(cells)} |")
    kinds = ", ".join(f"{count} x {status}" for status, count in sorted(refused.items()))
    print(f"bad requests: {kinds}; wrong answers: {len(seen.wrong)}; restarted: {'yes' if restarted else 'no'}")


if __name__ == "__main__":
    sys.exit(main())
