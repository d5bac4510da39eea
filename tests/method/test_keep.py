"""The distance to the untouched model, against its formula in double precision."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pipeline.method.keep import drift, keep_loss


def unit(rows: int, seed: int, **options) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.nn.functional.normalize(torch.randn(rows, 7, generator=generator, dtype=torch.float64), dim=1)


def test_for_unit_vectors_it_is_half_the_squared_distance() -> None:
    now, before = unit(5, 0), unit(5, 1)
    assert drift(now, before).item() == pytest.approx(0.5 * (now - before).square().sum(1).mean().item(), abs=1e-14)
    assert drift(3 * now, before).item() == pytest.approx(drift(now, before).item(), abs=1e-14)


def test_it_vanishes_with_its_gradient_at_the_untouched_model() -> None:
    now = unit(5, 0).requires_grad_()
    loss = drift(now, now.detach())
    loss.backward()
    assert loss.item() == pytest.approx(0, abs=1e-14)
    assert now.grad is not None and now.grad.abs().max() < 1e-14


def test_the_gradient_is_that_of_finite_differences() -> None:
    before = unit(4, 1)
    now = unit(4, 0).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: drift(x, before), now)


def test_images_and_texts_count_by_their_own_means() -> None:
    image, image0, text, text0 = unit(4, 0), unit(4, 1), unit(9, 2), unit(9, 3)
    both = keep_loss(image, image0, text, text0)
    assert torch.equal(both, drift(image, image0) + drift(text, text0))
    assert torch.equal(keep_loss(None, None, text, text0), drift(text, text0))
    with pytest.raises(ValueError, match="reference"):
        keep_loss(None, None, None, None)


def test_bf16_features_are_compared_in_fp32() -> None:
    now, before = unit(64, 0).float(), unit(64, 1).float()
    with torch.autocast("cpu", torch.bfloat16):
        loss = drift(now.bfloat16(), before)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(drift(now.bfloat16().float(), before).item(), abs=1e-6)
