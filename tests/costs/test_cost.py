"""Counts of `selora cost`: the closed form, torch's counter, and the paper's two claims."""

from collections.abc import Callable
from pathlib import Path

import open_clip
import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from pipeline.cli.main import main
from pipeline.config import ConfigError
from pipeline.costs.cost import (
    CONVENTIONS,
    OWN_CONVENTION,
    Cost,
    block_macs,
    counted_adapter_macs,
    model_cost,
    trained_parameters,
)
from pipeline.costs.cost_report import cost_report, paper_claims
from pipeline.method.adapter import attach_adapter, merge_adapter
from pipeline.model.clip import Clip, load_clip
from pipeline.model.restore import find_run
from pipeline.model.towers import adapter_targets, split_attention

# method notes, section 7: overhead GMAC of rank 256, all / plain, all / gated with average blocks and with image fc1
VIT_B_16_RANK_256 = {
    "two_path": (8, 10.55, 1.51, 1.47, 1.41),
    "folded": (8, 31.41, 2.53, 2.33, 2.05),
    "dense_delta": (8, 51.05, 3.48, 3.06, 2.46),
    "dense_and_two_path": (8, 41.95, 3.04, 2.73, 2.32),
    "dora_dense_norm": (5, 41.95, 3.04, 2.84, 2.55),
    "dora_nvlabs": (5, 61.59, 4.00, 3.62, 3.06),
    "dora_peft_0_13": (5, 116.55, 6.67, 5.58, 4.97),
    "dora_peft": (5, 96.92, 5.72, 4.91, 4.65),
    "merged": (8, 0.0, 1.0, 1.0, 1.0),
}


@pytest.fixture(scope="module")
def vit_b_16() -> Clip:
    """ViT-B/16 as shapes without numbers."""
    model = split_attention(open_clip.create_model("ViT-B-16", device="meta"))
    return Clip(model, open_clip.get_tokenizer("ViT-B-16"), {"size": (224, 224)}, {}, "", "ViT-B-16", None)


@pytest.fixture(scope="module")
def vit_cost(vit_b_16: Clip) -> Cost:
    return model_cost(vit_b_16)


def test_vit_b_16_has_the_published_cost_and_the_counter_agrees(vit_b_16: Clip, vit_cost: Cost) -> None:
    cost = vit_cost
    assert cost.parameters == 149_620_737
    assert cost.base == cost.counted
    assert {tower: round(macs / 1e9, 2) for tower, macs in cost.base.items()} == {"image": 17.56, "text": 2.98}
    assert sum(cost.base.values()) / 1e9 == pytest.approx(20.54, abs=0.005)
    assert [round(cost.adapter_parameters(rank, "lora") / 1e6, 2) for rank in (4, 256)] == [1.11, 70.78]
    assert trained_parameters(vit_b_16, "all", "none") == 26_737_665
    for kind, convention in OWN_CONVENTION.items():
        overhead = cost.overhead(256, convention)
        counted = counted_adapter_macs(vit_b_16, 256, kind)
        assert counted == {tower: cost.base[tower] + overhead[tower] for tower in cost.base}


@pytest.mark.parametrize("convention", VIT_B_16_RANK_256)
def test_ratios_at_rank_256(vit_cost: Cost, convention: str) -> None:
    active, gmac, to_plain, average, narrow = VIT_B_16_RANK_256[convention]
    cost = vit_cost
    base, overhead = sum(cost.base.values()), sum(cost.overhead(256, convention).values())
    fc1 = sum(cost.overhead(256, convention, [f"image.{layer}.fc1" for layer in range(active)]).values())
    assert overhead / 1e9 == pytest.approx(gmac, rel=0.01)
    assert (base + overhead) / base == pytest.approx(to_plain, rel=0.01)
    assert (base + overhead) / (base + overhead * active / 144) == pytest.approx(average, rel=0.01)
    assert (base + overhead) / (base + fc1) == pytest.approx(narrow, rel=0.01)


M, N, R, T = 7, 11, 3, 5


def plain_forms() -> dict[str, Callable[[], object]]:
    """Each convention written out on one layer, the product with W0 included."""
    x, w, a, b = torch.randn(T, M), torch.randn(N, M), torch.randn(R, M), torch.randn(N, R)
    eye = torch.eye(M)
    return {
        "merged": lambda: x @ w.T,
        "two_path": lambda: x @ w.T + (x @ a.T) @ b.T,
        "folded": lambda: x @ (w + b @ a).T,
        "dense_delta": lambda: x @ w.T + x @ (b @ a).T,
        "dense_and_two_path": lambda: (b @ a, x @ w.T + (x @ a.T) @ b.T),
        "dora_two_path": lambda: ((w @ a.T) * b, b @ (a @ a.T), x @ w.T + (x @ a.T) @ b.T),
        "dora_dense_norm": lambda: ((w + b @ a).norm(dim=1), x @ w.T + (x @ a.T) @ b.T),
        "dora_nvlabs": lambda: ((w + b @ a).norm(dim=1), x @ w.T, x @ w.T + (x @ a.T) @ b.T),
        "dora_peft_0_13": lambda: ((eye @ a.T) @ b.T, x @ w.T, x @ w.T + (x @ a.T) @ b.T),
        "dora_peft": lambda: ((eye @ a.T) @ b.T, x @ w.T + (x @ a.T) @ b.T),
    }


@pytest.mark.parametrize("convention", CONVENTIONS)
def test_closed_form_of_every_convention_matches_the_counter(convention: str) -> None:
    with FlopCounterMode(display=False) as counter:
        plain_forms()[convention]()
    assert counter.get_total_flops() // 2 - T * M * N == block_macs(M, N, R, T, convention)


def test_an_unknown_convention_is_refused() -> None:
    with pytest.raises(ValueError, match="convention='dense'"):
        block_macs(M, N, R, T, "dense")


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_pruned_counts_the_named_blocks_only_and_merged_is_plain(tiny_clip_dir: Path, kind: str) -> None:
    tiny_clip = load_clip(f"local-dir:{tiny_clip_dir}")
    cost = model_cost(tiny_clip)
    chosen = ["image.0.fc1", "text.1.q_proj"]
    overhead = cost.overhead(2, "two_path" if kind == "lora" else "dora_two_path", chosen)
    counted = counted_adapter_macs(tiny_clip, 2, kind, chosen)  # pyright: ignore[reportArgumentType]
    assert counted == {tower: cost.base[tower] + overhead[tower] for tower in cost.base}
    model: nn.Module = tiny_clip.model
    attach_adapter(adapter_targets(model), rank=2, kind=kind)  # pyright: ignore[reportArgumentType]
    merge_adapter(model)
    assert model_cost(tiny_clip).counted == cost.base


def test_the_papers_claims_come_with_the_convention_that_fits(vit_cost: Cost) -> None:
    """The paper's claims come with the convention that gives them."""
    fits = {(row["kind"], row["convention"]) for row in paper_claims(vit_cost) if row["fits"]}
    assert fits == {("lora", "dense_delta"), ("dora", "dora_peft_0_13")}


def test_a_run_is_counted_with_its_own_blocks(
    tmp_path: Path, make_run: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(tmp_path / "run", kind="dora", train_rest="proj_ln")
    state = find_run(run).state
    assert main(["cost", str(run), "--latency", "2", "--json", str(tmp_path / "cost.json")]) == 0
    said = capsys.readouterr().out
    report = cost_report(str(run))
    (row,) = report["rows"]
    assert (row["kind"], row["rank"]) == ("dora", state["adapter"]["rank"])
    assert row["active"] == sum(gate["open"] for gate in state["gate_map"].values())
    assert row["unmerged"]["counted"] == row["unmerged"]["macs"]
    assert "latency of dora" in said
    assert (tmp_path / "cost.json").is_file()
    with pytest.raises(ConfigError, match=r"active: 1000 blocks of \d+ cannot be open"):
        cost_report(str(run), active=1000)
