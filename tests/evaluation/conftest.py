"""clip_benchmark as the independent implementation of the metrics."""

from __future__ import annotations

from clip_benchmark.metrics import zeroshot_classification

# clip_benchmark 1.6 calls float() on an array of one element, which NumPy has refused since 2.4. Its arithmetic stays.
zeroshot_classification.float = lambda value: float(value if isinstance(value, str) else value.item())  # pyright: ignore
