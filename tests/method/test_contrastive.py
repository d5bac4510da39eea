import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from open_clip import ClipLoss
from torch.nn import functional as F

from pipeline.method.contrastive import flyp_loss

WORKER = Path(__file__).with_name("flyp_rank.py")


def features(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    a, b = (F.normalize(torch.randn(9, 5, generator=generator), dim=-1).to(dtype) for _ in range(2))
    return a.requires_grad_(), b.requires_grad_()


def test_one_rank_equals_open_clip_loss_in_value_and_gradient() -> None:
    image, text = features()
    scale = torch.tensor([20.0], requires_grad=True)
    ours = torch.autograd.grad(flyp_loss(image, text, scale), (image, text, scale))
    theirs = torch.autograd.grad(ClipLoss()(image, text, scale), (image, text, scale))
    torch.testing.assert_close(flyp_loss(image, text, scale), ClipLoss()(image, text, scale), rtol=0, atol=1e-6)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


@pytest.mark.parametrize("chunk_rows", [1, 4, 9, 50])
def test_chunks_of_rows_change_neither_loss_nor_gradient(chunk_rows: int) -> None:
    image, text = (t.detach().double().requires_grad_() for t in features())
    scale = torch.tensor(20.0, dtype=torch.float64, requires_grad=True)
    whole, chunked = (flyp_loss(image, text, scale, chunk_rows=rows) for rows in (None, chunk_rows))
    torch.testing.assert_close(chunked, whole, rtol=0, atol=1e-12)
    for a, b in zip(*(torch.autograd.grad(x, (image, text, scale)) for x in (whole, chunked)), strict=True):
        torch.testing.assert_close(b, a, rtol=0, atol=1e-12)


def test_a_chunked_loss_keeps_no_square_of_the_batch() -> None:
    """What a chunked loss keeps for the backward does not grow with the square of the batch."""
    image, text = (F.normalize(torch.randn(256, 8), dim=-1).requires_grad_() for _ in range(2))
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        flyp_loss(image, text, torch.tensor(20.0), chunk_rows=32)
    assert max(t.numel() for t in kept) == 256 * 8


def test_a_loss_stays_finite_at_the_largest_scale() -> None:
    """A loss of features far apart stays finite at the largest scale."""
    image = F.normalize(torch.eye(6), dim=-1).requires_grad_()
    flyp_loss(image, -image.detach(), torch.tensor(100.0)).backward()
    assert image.grad is not None
    assert image.grad.isfinite().all()


def test_a_scalar_logit_scale_works_too() -> None:
    image, text = features()
    assert torch.equal(flyp_loss(image, text, torch.tensor(7.0)), flyp_loss(image, text, torch.tensor([7.0])))


def test_logits_are_fp32_for_bf16_features_and_under_autocast() -> None:
    image, text = features(torch.bfloat16)
    exact = flyp_loss(image.float(), text.float(), torch.tensor([30.0]))
    with torch.autocast("cpu", torch.bfloat16):
        loss = flyp_loss(image, text, torch.tensor([30.0]))
    assert loss.dtype == torch.float32
    assert torch.equal(loss, exact)


@pytest.mark.timeout(600)
@pytest.mark.parametrize("world", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_gradients_over_ranks_equal_the_one_rank_gradients(world: int, tmp_path: Path) -> None:
    command = [sys.executable, str(WORKER)]
    ranks = [subprocess.Popen([*command, str(rank), str(world), str(tmp_path)]) for rank in range(world)]
    assert [rank.wait() for rank in ranks] == [0] * world
    worker = runpy.run_path(str(WORKER))
    for name, classes in worker["CASES"]:
        expected = worker["gradients"](0, 1, name, classes)
        # loss; A, B, score; with magnitude; logit scale; logit bias
        assert len(expected) == 1 + 2 * 3 + 2 * 4 + 1 + (name == "sigmoid")
        assert all(grad.any() for key, grad in expected.items() if "image.0." not in key or key.endswith("score"))
        for rank in range(world):
            got = torch.load(tmp_path / f"rank{rank}-{name}-{classes}.pt")
            assert got.keys() == expected.keys()
            for key, grad in expected.items():
                torch.testing.assert_close(got[key], grad, rtol=0, atol=1e-5, msg=lambda m, n=key: f"{n}: {m}")


def soft_target_loss(image: torch.Tensor, text: torch.Tensor, scale: torch.Tensor, labels: list[int]) -> torch.Tensor:
    """Row by row: cross entropy against a target that is uniform over the rows of the same class."""
    logits = scale * image @ text.T
    total = logits.new_zeros(())
    for i, label in enumerate(labels):
        same = [j for j, other in enumerate(labels) if j == i or (label >= 0 and other == label)]
        target = torch.zeros(len(labels), dtype=logits.dtype)
        target[same] = 1 / len(same)
        total = total + F.cross_entropy(logits[i], target) + F.cross_entropy(logits[:, i], target)
    return total / (2 * len(labels))


@pytest.mark.parametrize("chunk_rows", [None, 4])
def test_captions_of_the_same_class_are_positives_too(chunk_rows: int | None) -> None:
    image, text = (t.detach().double().requires_grad_() for t in features())
    scale = torch.tensor(20.0, dtype=torch.float64, requires_grad=True)
    labels = [0, 1, 0, -1, 2, 0, -1, 1, 5]
    ours = flyp_loss(image, text, scale, labels=torch.tensor(labels), chunk_rows=chunk_rows)
    plain = soft_target_loss(image, text, scale, labels)
    torch.testing.assert_close(ours, plain, rtol=0, atol=1e-12)
    for a, b in zip(*(torch.autograd.grad(x, (image, text, scale)) for x in (ours, plain)), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_with_every_label_different_it_is_the_plain_loss() -> None:
    image, text = features(torch.float64)
    scale = torch.tensor(20.0, dtype=torch.float64)
    for labels in (torch.arange(9), torch.full((9,), -1)):
        loss = flyp_loss(image, text, scale, labels=labels)
        torch.testing.assert_close(loss, flyp_loss(image, text, scale), rtol=0, atol=1e-12)
