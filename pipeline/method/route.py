"""The cheapest exact way to compute a block, forward and backward together.

T tokens pass through a linear m -> n with a pair of rank r. With D = dL/dW (n, m), the three ways are

- two_path: x W0' + s (x A') B', and the same two paths back: 4Tmn + 6Tr(m+n) FLOPs;
- factors: W = W0 + s B A formed once, for the output and for dx; the gradients of A and B through rank r, D never
  formed: 4Tmn + 2mnr + 4Tr(m+n);
- dense: W formed once, D formed, the gradients of A and B from D: 6Tmn + 6mnr.

two_path is best for few tokens, dense for a high rank, factors in between.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, NamedTuple

Way = Literal["two_path", "factors", "dense"]
Product = tuple[int, int, int]  # (rows, inner, columns) of a matrix product

# FLOPs in the time of one element moved: a thin product is bound by memory, and costs the same for r = 4 and r = 16.
RIDGE = {"cpu": 24, "cuda": 370}


class Work(NamedTuple):
    """One block in one step. `is_open` None: not known on the host, so both cases must be covered."""

    tokens: int
    inputs: int
    outputs: int
    rank: int
    dora: bool = False
    input_grad: bool = True
    is_open: bool | None = True


def cheapest(work: Work, device: str = "cpu") -> Way:
    """The way with the lowest `cost` on this kind of device."""
    ways: tuple[Way, ...] = ("two_path", "factors", "dense")
    return min(ways, key=lambda way: cost(way, work, device))


def cost(way: Way, work: Work, device: str = "cpu") -> int:
    """FLOPs of forward and backward; memory traffic counts as the FLOPs that fit into its time."""
    ridge = RIDGE.get(device, RIDGE["cuda"])
    products = sum(
        max(2 * rows * inner * columns, ridge * (rows * inner + inner * columns + rows * columns))
        for rows, inner, columns in _products(way, work)
    )
    return products + ridge * _passes(way, work) * work.tokens * work.outputs


def _products(way: Way, work: Work) -> Iterator[Product]:
    t, m, n, r = work.tokens, work.inputs, work.outputs, work.rank
    closed = work.is_open is False
    yield t, m, n
    if work.input_grad:
        yield t, n, m
    if way == "two_path":
        yield from [(t, m, r), (t, r, n)]  # z = x A', z B'
        yield from [(t, n, r), (r, t, m), (n, t, r)]  # u = dy B, u' x, dy' z
        if work.input_grad:
            yield t, r, m  # u A
        if work.dora:
            yield n, m, r  # the norm
        return
    if not closed or work.dora:
        yield n, r, m  # W, or only its norm
    if way == "dense":
        yield from [(n, t, m), (n, m, r)]  # D, D A'
        if not closed:
            yield r, n, m  # B' D
    else:
        yield from [(t, m, r), (n, t, r)]  # z, dy' z
        if not closed:
            yield from [(t, n, r), (r, t, m)]  # u, u' x


def _passes(way: Way, work: Work) -> int:
    """Number of element-wise passes over a (tokens, out) tensor, each reading or writing it once or twice."""
    if way == "two_path":
        return 10 if work.dora else 6
    return 3 if way == "factors" and work.dora else 0
