"""Micro-batches, activation checkpointing, compiled layers: less memory or time, the gradient of the whole batch."""

from __future__ import annotations

import json
import sys
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from ports import free_port
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))
import gradient_rank
from gradient_rank import WAYS, inputs, prepared

from pipeline.method.adapter import blocks
from pipeline.model.towers import compile_layers


def exact_gradients(objective: torch.nn.Module) -> dict[str, Tensor]:
    """Of one step on one rank, with the loss; the objective is in double precision."""
    objective.zero_grad()
    total = objective(*inputs(0, 1), 0)["total"]
    total.backward()
    named = {name: parameter.grad for name, parameter in objective.named_parameters()}
    return {"total": total.detach()} | {name: grad.clone() for name, grad in named.items() if grad is not None}


@pytest.mark.parametrize("way", ["micro", "layers", "both"])
def test_the_gradient_is_that_of_the_whole_batch(way: str, small_clip: str) -> None:
    whole, other = (exact_gradients(prepared(small_clip, "fp32", 0, WAYS[each])[2].double()) for each in ("whole", way))
    assert other.keys() == whole.keys()
    assert whole["model.logit_scale"].any()
    for name, value in whole.items():
        torch.testing.assert_close(other[name], value, rtol=0, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}")


def kept_bytes(objective: Any, call: Any) -> int:
    """Bytes that a forward keeps for its backward, each storage once, without the parameters."""
    own = {parameter.untyped_storage().data_ptr() for parameter in objective.parameters()}
    alive: dict[int, Tensor] = {}
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: alive.setdefault(t.untyped_storage().data_ptr(), t) if t.numel() else t, lambda t: t
    ):
        call()
    return sum(t.untyped_storage().nbytes() for pointer, t in alive.items() if pointer not in own)


def test_micro_batches_keep_their_features_and_one_micro_batch(small_clip: str) -> None:
    images, tokens = (part.repeat(16, *[1] * (part.ndim - 1)) for part in inputs(0, 1))
    whole, micro, layers = (
        prepared(small_clip, "fp32", 0, way)[2] for way in ({}, {"micro_batch_size": 4}, WAYS["layers"])
    )
    kept = {each: kept_bytes(each, lambda each=each: each(images, tokens, 0)) for each in (whole, micro, layers)}
    # in the backward, one micro-batch at a time is computed again and kept
    single = kept_bytes(whole, lambda: whole._run(images[:4], tokens[:4]))
    inputs_bytes, features, logits = images.nbytes + tokens.nbytes, 2 * len(images) * 32 * 4, 4 * len(images) ** 2
    assert kept[micro] < inputs_bytes + 2 * features + logits + 8 * len(images) * 4
    assert kept[micro] + single < 0.1 * kept[whole]
    assert kept[layers] < 0.3 * kept[whole]


@pytest.mark.parametrize(
    ("kind", "precision"),
    [
        ("lora", "fp32"),
        ("dora", "bf16"),
        pytest.param("lora", "bf16", marks=pytest.mark.slow),
        pytest.param("dora", "fp32", marks=pytest.mark.slow),
    ],
)
def test_the_plan_counts_what_is_kept_and_what_is_computed(small_clip: str, kind: str, precision: str) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    from pipeline.costs.scale import Recompute, shape_of, step_flops
    from pipeline.model.clip import model_config

    shape = shape_of("small", model_config(f"local-dir:{small_clip}"))
    assert shape is not None
    images, tokens = (part.repeat(16, *[1] * (part.ndim - 1)) for part in inputs(0, 1))
    count, size, each = len(images), len(images) // 2, 2 if precision == "bf16" else 4
    recomputes = {"whole": Recompute(), "layers": Recompute(layers=True), "micro": Recompute(micro_batch=size)}
    kept, flops = {}, {}
    for name, way in {"whole": {}, "layers": WAYS["layers"], "micro": {"micro_batch_size": size}}.items():
        objective = prepared(small_clip, precision, 0, {"train_rest": "none", **way}, kind)[2]
        kept[name] = kept_bytes(objective, lambda each=objective: each(images, tokens, 0))
        with FlopCounterMode(display=False) as counter:
            objective(images, tokens, 0)["total"].backward()
        flops[name] = counter.get_total_flops()
    kept["micro"] -= images.nbytes + tokens.nbytes  # the batch itself
    # in the backward, what is computed again is kept too: one of the two layers, one of the two micro-batches
    peak = {
        "whole": kept["whole"],
        "layers": kept["layers"] + kept["whole"] / 2,
        "micro": kept["micro"] + kept["whole"] / 2,
    }
    for name, recompute in recomputes.items():
        planned = shape.activation_bytes(count, 1, each, recompute)
        assert planned == pytest.approx(peak[name], rel=0.13), name
        more = step_flops(shape, count, recompute) - step_flops(shape, count)
        # the towers' ends (patches, projection) are a large part of a model as small as this
        assert more <= 1.01 * (flops[name] - flops["whole"]) <= 1.2 * more, name


@pytest.mark.slow  # the fast test of one compiled block is in tests/method/test_folded.py
def test_compiled_layers_are_two_graphs_whatever_the_gates_do(small_clip: str) -> None:
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    plain, compiled = (prepared(small_clip, "fp32", 0, WAYS["both"]) for _ in range(2))
    compile_layers(compiled[1].model, backend="aot_eager")
    objectives = [each[2].double() for each in (plain, compiled)]
    for turn in range(4):
        whole, other = map(exact_gradients, objectives)
        for name, value in whole.items():
            torch.testing.assert_close(other[name], value, rtol=0, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}")
        with torch.no_grad():
            for _, clip, _ in (plain, compiled):
                for block in list(blocks(clip.model).values())[turn::3]:
                    assert block.gate is not None
                    block.gate.score.copy_(0.2 - block.gate.score)
                if turn == 2:  # as a gate that settles does
                    shut = next(block for block in blocks(clip.model).values() if not block.is_open())
                    shut.requires_grad_(False)
        # one graph a tower, for the text is causal, and one for the layer with the settled block
        assert counters["stats"]["unique_graphs"] == (3 if turn == 3 else 2)
    assert not counters["graph_break"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.parametrize("quick_gelu", [False, True])
@pytest.mark.parametrize("way", ["whole", "micro", "layers", "both"])
@pytest.mark.parametrize("stack", [False, True])
def test_no_layer_leaves_its_graph(
    kind: str, quick_gelu: bool, way: str, stack: bool, small_clip: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where q, k and v are computed as one, which only a GPU does by itself."""
    from torch._dynamo.utils import counters

    from pipeline.method import stacked

    if stack:
        monkeypatch.setattr(stacked, "DEVICES", {"cpu"})
        monkeypatch.setattr(stacked, "cheapest", lambda work, device: "factors")
    config = json.loads((Path(small_clip) / "open_clip_config.json").read_text())
    config["model_cfg"]["quick_gelu"] = quick_gelu
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    torch._dynamo.reset()
    plain, other = (prepared(str(tmp_path), "fp32", 0, WAYS[way], kind) for _ in range(2))
    compile_layers(other[1].model, backend="aot_eager")
    counters.clear()
    whole, compiled = (exact_gradients(each[2].double()) for each in (plain, other))
    assert not counters["graph_break"]
    assert counters["stats"]["unique_graphs"] == 2
    for name, value in whole.items():
        torch.testing.assert_close(compiled[name], value, rtol=0, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}")


def deepspeed_gradients(
    fork_server: Any, world: int, folder: str, cases: list[tuple[str, int, str]], out: Path
) -> dict[tuple[str, int, str], dict[str, Tensor]]:
    port = free_port()
    ranks = [
        fork_server.Process(target=gradient_rank.main, args=(rank, world, port, folder, cases, out))
        for rank in range(world)
    ]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(500)
    assert [rank.exitcode for rank in ranks] == [0] * world
    return {case: torch.load(out / "{}-{}-{}.pt".format(*case)) for case in cases}


def distance(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """Length of the difference of all gradients of the first step, relative to their length."""
    names = [name for name in one if name.startswith("0/")]
    difference = sum(float((one[name] - other[name]).double().square().sum()) for name in names)
    return (difference / sum(float(one[name].double().square().sum()) for name in names)) ** 0.5


def check(found: dict[tuple[str, int, str], dict[str, Tensor]]) -> None:
    """In fp32 all agree to 1e-5; in bf16 no way is further from fp32 than the whole batch at once is."""
    exact = found["whole", 0, "fp32"]
    assert len([name for name in exact if name.endswith(("logit_scale", "score")) and name[0] == "0"]) == 25
    for (way, stage, precision), result in found.items():
        assert result.keys() == exact.keys()
        if precision == "bf16":
            assert distance(exact, result) < 1.5 * distance(exact, found["whole", stage, "bf16"]), (way, stage)
            continue
        assert distance(exact, result) < 1e-5, (way, stage)
        for name, value in exact.items():
            # Adam makes of a gradient near zero a step of full length (0.01), so rounding shows after it
            tolerance = 1e-3 if name.startswith("after/") else 3e-5
            torch.testing.assert_close(
                result[name], value, rtol=1e-4, atol=tolerance, msg=lambda m, w=f"{way} {stage} {name}": f"{w}: {m}"
            )


def test_deepspeed_gives_the_gradient_of_the_whole_batch(fork_server: Any, small_clip: str, tmp_path: Path) -> None:
    """DeepSpeed hands the optimizer the gradient of the whole batch."""
    cases = [("whole", 0, "fp32"), ("micro", 2, "fp32"), ("both", 3, "fp32")]
    check(deepspeed_gradients(fork_server, 2, small_clip, cases, tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 2])
def test_every_way_under_every_stage_in_both_precisions(
    world: int, fork_server: Any, small_clip: str, tmp_path: Path
) -> None:
    cases: list[tuple[str, int, str]]
    cases = [case for case in product(WAYS, (0, 1, 2, 3), ("fp32", "bf16")) if case[:2] != ("all", 3)]  # refused
    check(deepspeed_gradients(fork_server, world, small_clip, cases, tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 3])
def test_a_run_in_micro_batches_has_the_losses_of_a_run_without(launch, stage: int) -> None:
    common = (f"train.zero_stage={stage}", "train.steps=8")
    runs = [
        launch("name=whole", *common),
        launch("name=micro", "train.micro_batch_size=3", *common),
        launch("name=layers", "train.micro_batch_size=3", "train.activation_checkpointing=true", *common),
    ]
    for run in runs:
        assert run.wait() == [0, 0], run.text()
    whole, *others = (run.losses() for run in runs)
    assert len(whole) == 8
    for losses in others:
        assert losses == pytest.approx(whole, abs=2e-5)


def test_how_a_step_is_computed_may_change() -> None:
    """What only changes how a step is computed may change between two calls."""
    from pipeline.config import Config, override
    from pipeline.training.settings import changed_settings

    config = Config.model_validate({"data": {"train": "x"}})
    changes = {"train.micro_batch_size": 8, "train.activation_checkpointing": True, "train.compile": True}
    assert changed_settings(config, override(config, changes)) == []
    assert len(changed_settings(config, override(config, {"train.lr": 1.0}))) == 1
