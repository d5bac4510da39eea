"""Hollow models: parameters take no memory until something is written into them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import ModuleType
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

# Where torch's modules look up the functions that fill new parameters.
_PLACES: tuple[ModuleType, ...] = (nn.init, torch.nn.modules.activation)


@contextmanager
def without_values() -> Iterator[None]:
    """Inside the block, new modules do not fill their parameters: untouched pages take no memory.

    Buffers are computed, unlike on the meta device.
    """
    with ExitStack() as stack:
        for place in _PLACES:
            for name in [name for name in vars(place) if name.endswith("_") and not name.startswith("_")]:
                stack.enter_context(patch.object(place, name, _as_it_is))
        yield


def _as_it_is(tensor: Tensor, *_: Any, **__: Any) -> Tensor:
    return tensor
