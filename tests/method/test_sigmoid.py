"""The sigmoid loss against open_clip's own; over ranks it is in test_contrastive.py, with the other loss."""

import pytest
import torch
from open_clip.loss import SigLipLoss
from torch.nn import functional as F

from pipeline.method.sigmoid import sigmoid_loss

Inputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def inputs(dtype: torch.dtype = torch.float64) -> Inputs:
    """Features (9, 5) of both towers, a scale and a bias, all with gradients."""
    generator = torch.Generator().manual_seed(0)
    image, text = (F.normalize(torch.randn(9, 5, generator=generator), dim=-1).to(dtype) for _ in range(2))
    scale, bias = torch.tensor([20.0], dtype=dtype), torch.tensor([-7.0], dtype=dtype)
    return image.requires_grad_(), text.requires_grad_(), scale.requires_grad_(), bias.requires_grad_()


def assert_same(one: torch.Tensor, other: torch.Tensor, given: Inputs, atol: float) -> None:
    """Equal in value and in the gradient of every input."""
    torch.testing.assert_close(one, other, rtol=0, atol=atol)
    for a, b in zip(*(torch.autograd.grad(loss, given) for loss in (one, other)), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=atol)


@pytest.mark.parametrize(("dtype", "atol"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_it_equals_open_clips_loss_in_value_and_gradient(dtype: torch.dtype, atol: float) -> None:
    given = inputs(dtype)
    assert_same(sigmoid_loss(*given), SigLipLoss()(*given), given, atol)


@pytest.mark.parametrize("chunk_rows", [1, 4, 9, 50])
@pytest.mark.parametrize("by_class", [False, True])
def test_chunks_of_rows_change_nothing(chunk_rows: int, by_class: bool) -> None:
    given = inputs()
    labels = torch.tensor([0, 1, 0, -1, 2, 0, -1, 1, 5]) if by_class else None
    whole, chunked = (sigmoid_loss(*given, labels=labels, chunk_rows=rows) for rows in (None, chunk_rows))
    assert_same(chunked, whole, given, 1e-12)


def test_captions_of_the_same_class_are_positives_too() -> None:
    """Written out pair by pair; a row without a class has itself alone."""
    given = inputs()
    image, text, scale, bias = given
    labels = [0, 1, 0, -1, 2, 0, -1, 1, 5]
    total = torch.zeros((), dtype=torch.float64)
    for i, own in enumerate(labels):
        for j, other in enumerate(labels):
            z = 1 if i == j or own == other >= 0 else -1
            total = total - F.logsigmoid(z * (scale * image[i] @ text[j] + bias)).squeeze()
    assert_same(sigmoid_loss(*given, labels=torch.tensor(labels)), total / len(labels), given, 1e-12)


def test_with_every_label_different_it_is_the_plain_loss() -> None:
    given = inputs()
    for labels in (torch.arange(9), torch.full((9,), -1)):
        assert_same(sigmoid_loss(*given, labels=labels), sigmoid_loss(*given), given, 1e-12)


def test_what_a_chunked_loss_keeps_does_not_grow_with_the_square() -> None:
    image, text = (F.normalize(torch.randn(256, 8), dim=-1).requires_grad_() for _ in range(2))
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        sigmoid_loss(image, text, torch.tensor(20.0), torch.tensor(-10.0), chunk_rows=32)
    assert max(t.numel() for t in kept) == 256 * 8


def test_logits_are_fp32_for_bf16_features_and_under_autocast() -> None:
    image, text, scale, bias = (each.detach() for each in inputs(torch.bfloat16))
    exact = sigmoid_loss(image.float(), text.float(), scale.float(), bias.float())
    with torch.autocast("cpu", torch.bfloat16):
        loss = sigmoid_loss(image, text, scale, bias)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, exact)


def test_it_stays_finite_and_exact_at_extreme_logits() -> None:
    image = torch.eye(6, dtype=torch.float64).requires_grad_()
    loss = sigmoid_loss(image, -image.detach(), torch.tensor(150.0), torch.tensor(-10.0))
    loss.backward()
    torch.testing.assert_close(loss.item(), 160.0 + 5 * 4.5398899e-5, rtol=0, atol=1e-9)
    assert image.grad is not None
    assert image.grad.isfinite().all()
