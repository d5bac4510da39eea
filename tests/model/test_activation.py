"""QuickGELU that keeps only its input: exact in value and gradient, with a third of the memory."""

from __future__ import annotations

import open_clip
import pytest
import torch
from open_clip.transformer import QuickGELU as Stock
from torch import Tensor

from pipeline.model.activation import QuickGELU, lean_activations


def test_the_gradient_is_exact() -> None:
    x = (3 * torch.randn(4, 5, dtype=torch.float64)).requires_grad_(True)
    assert torch.autograd.gradcheck(QuickGELU(), x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_are_open_clips_bit_for_bit(dtype: torch.dtype) -> None:
    x = (4 * torch.randn(64, 64)).to(dtype)
    assert torch.equal(QuickGELU()(x.clone().requires_grad_(True)), Stock()(x))
    with torch.no_grad():
        assert torch.equal(QuickGELU()(x), Stock()(x))


def kept(module: torch.nn.Module, x: Tensor) -> int:
    """Bytes of distinct tensors that the forward keeps for the backward."""
    storages: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = module(x)
    assert out.requires_grad
    return sum(storages.values())


def test_it_keeps_one_tensor_where_open_clips_keeps_two_or_three() -> None:
    x = torch.randn(32, 64, requires_grad=True) * 1
    assert kept(QuickGELU(), x) == x.nbytes
    assert kept(Stock(), x) >= 2 * x.nbytes


def test_a_loaded_clip_has_it_in_every_layer() -> None:
    with torch.device("meta"):
        model = lean_activations(open_clip.create_model("ViT-B-16-quickgelu", device="meta"))
    assert sum(isinstance(module, QuickGELU) for module in model.modules()) == 24
    assert not any(isinstance(module, Stock) for module in model.modules())


def test_compiled_it_is_one_graph() -> None:
    compiled = torch.compile(QuickGELU(), backend="aot_eager", fullgraph=True)
    x = torch.randn(8, 8, requires_grad=True)
    torch.testing.assert_close(torch.autograd.grad(compiled(x).sum(), x), torch.autograd.grad(Stock()(x).sum(), x))
