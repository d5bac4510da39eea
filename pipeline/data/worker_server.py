"""Preloaded by a fork server of loader workers: their modules, and a quiet end for workers without a trainer.

The trainer may die while it sends a new worker its work. The worker then has nothing to report: the trainer's own exit
is what counts, and a traceback of multiprocessing would hide it.
"""

from __future__ import annotations

import sys
from pickle import UnpicklingError
from types import TracebackType

import pipeline.data.train.stream  # noqa: F401 - loaded once here instead of in every worker


def _end_quietly(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    cut_off = issubclass(kind, EOFError) or (issubclass(kind, UnpicklingError) and "truncated" in str(error))
    if not cut_off:
        sys.__excepthook__(kind, error, trace)


sys.excepthook = _end_quietly
