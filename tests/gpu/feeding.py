"""Stages around a step: the card itself, the tests marked gpu, loader, tokens and evaluation."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from copy import deepcopy

import torch
from setting import ROOT, Setting

from pipeline.data.images import normalize
from pipeline.evaluation.measures.encode import Encoder

# Rows, inner and columns of the products that ViT-B/16 makes of 512 images, and one large square.
PRODUCTS = ((8192, 8192, 8192), (100864, 768, 768), (100864, 768, 3072), (100864, 3072, 768), (768, 100864, 768))


def card(setting: Setting) -> None:
    """What the card gives by itself: memory bandwidth, bf16 products, copies from pinned memory."""
    if setting.device.type != "cuda":
        setting.findings.skip("card", "no CUDA device")
        return
    device, rows = setting.device, []
    memory = torch.cuda.get_device_properties(device).total_memory
    rows.append(("memory, GiB", memory / 2**30))
    source = torch.empty(2**30, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    rows.append(("copy on the card, GB/s", 2 * source.numel() / setting.timed(lambda: target.copy_(source)) / 1e9))
    for rows_, inner, columns in PRODUCTS:
        x = torch.randn(rows_, inner, device=device).bfloat16()
        w = torch.randn(inner, columns, device=device).bfloat16()
        rate = 2 * rows_ * inner * columns / setting.timed(lambda x=x, w=w: x @ w) / 1e12
        rows.append((f"bf16 product {rows_} x {inner} x {columns}, TFLOP/s", rate))
    host = torch.empty(512, 3, 224, 224, dtype=torch.uint8, pin_memory=True)
    rate = host.numel() / setting.timed(lambda: host.to(device, non_blocking=True)) / 1e9
    rows.append(("copy from pinned memory, GB/s", rate))
    setting.findings.table("The card", ("what", "value"), rows)


def unit_tests(setting: Setting) -> None:
    """The tests that need a card; without one pytest says why it skips them."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-m",
        "gpu",
        "-rs",
        "-p",
        "no:cacheprovider",
        str(ROOT / "tests" / "gpu"),
    ]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=max(60, setting.findings.left), check=False
    )
    last = (done.stdout.strip().splitlines() or done.stderr.strip().splitlines() or ["no output"])[-1]
    setting.findings.check("tests marked gpu pass", done.returncode == 0, last)
    if done.returncode:
        print((done.stdout + done.stderr)[-2500:], flush=True)


def loader(setting: Setting) -> None:
    """Images a second from shards to batches with tokens, by workers, and what the tokens cost."""
    from pipeline.data.shards.index import load_index
    from pipeline.data.train.stream import TrainDataset, train_loader
    from pipeline.model.clip import load_clip
    from pipeline.model.text import batch_tokenizer

    clip, rows, batch = load_clip(setting.model, seed=0), [], setting.size.batches[-1]
    tokenizer, seconds = batch_tokenizer(clip.model, clip.tokenizer), 1.0 if setting.tiny else 3.0
    for workers in setting.size.workers:
        for preprocessing in ("fast", "reference") if workers == setting.size.workers[-1] else ("fast",):
            if not setting.has(25, f"loader with {workers} workers"):
                continue
            dataset = TrainDataset(load_index(setting.shards), size=clip.preprocess_cfg["size"], seed=0, streams=4,
                                   window=64, preprocessing=preprocessing)  # fmt: skip
            batches = iter(train_loader(dataset, global_batch=batch, start_step=0, stop_step=10**4, workers=workers,
                                        tokenizer=tokenizer, pin=setting.device.type == "cuda"))  # fmt: skip
            for _ in range(workers):
                next(batches)
            begin, seen = time.perf_counter(), 0
            while time.perf_counter() - begin < seconds:
                seen += len(next(batches).images)
            rows.append((preprocessing, workers, seen / (time.perf_counter() - begin)))
            del batches
    captions = [f"a photo of a class {i}." for i in range(512)]
    begin = time.process_time()
    tokenizer(captions)
    note = f"Tokens of 512 captions take {1e3 * (time.process_time() - begin):.0f} ms of one core."
    head = ("data.preprocessing", "workers", "images/s")
    setting.findings.table(f"Loader, batches of {batch}, {len(os.sched_getaffinity(0))} cores", head, rows, note)


def evaluation(setting: Setting) -> None:
    """Images and prompts a second through the encoder of `selora evaluate`, by precision and batch."""
    from pipeline.model.clip import load_clip

    clip, rows = load_clip(setting.model, seed=0), []
    net = deepcopy(clip.model).eval().to(setting.device)
    size = clip.preprocess_cfg["size"]
    sides = (size, size) if isinstance(size, int) else tuple(size)
    prompts = [f"a photo of the class number {i}." for i in range(16 if setting.tiny else 480)]
    features = {}
    with torch.inference_mode():
        for precision in ("fp32", "bf16"):
            encoder = Encoder(net, clip.tokenizer, setting.device, precision)
            for batch in sorted({setting.size.batches[0], setting.size.batches[-1]}):
                images = torch.arange(batch * 3 * sides[0] * sides[1]).remainder(251).to(torch.uint8)
                images = images.view(batch, 3, *sides)

                def forward(encoder: Encoder = encoder, images: torch.Tensor = images) -> torch.Tensor:
                    return encoder.images(normalize(images.to(setting.device), (0.5,) * 3, (0.5,) * 3))

                rows.append((precision, f"images, {batch} at a time", batch / setting.timed(forward)))
                features[precision] = forward()
            rows.append((precision, "prompts", len(prompts) / setting.timed(lambda e=encoder: e.texts(prompts))))
    setting.findings.table("Evaluation, a second", ("precision", "what", "rate"), rows)
    cosine = float((features["fp32"] * features["bf16"]).sum(-1).min())
    setting.findings.check("bf16 features of an image are those of fp32", cosine > 0.999, f"least cosine {cosine:.5f}")
