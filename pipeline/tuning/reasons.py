"""Why a trial ended, told in a line. Ray wraps the cause in errors of its own, and each starts with a headline."""

from __future__ import annotations

import re

from pipeline.tuning.trial import final_reason

_WRAPPED = ("controller_failure", "health_check_failure", "cause")
_LOST_A_PEER = re.compile(r"connection (reset|closed|refused)|broken pipe|nccl|gloo|peer", re.IGNORECASE)
_LOW_MEMORY = re.compile(r"running low on memory[^.]*", re.IGNORECASE)
_EXIT_DETAIL = re.compile(r"Worker exit detail: (.*?)(?: Some common causes| There are some potential|$)", re.DOTALL)
_LONGEST = 300


def told(error: BaseException) -> str:
    """What is behind an error of Ray's or of our own."""
    cause, rank = _cause(error, None)
    text = final_reason(cause) or _of_a_dead_process(str(cause)) or _plain(cause)
    text = text if len(text) <= _LONGEST else text[:_LONGEST] + "…"
    return text if rank is None else f"rank {rank}: {text}"


def _cause(error: BaseException, rank: int | None) -> tuple[BaseException, int | None]:
    """(the error inside all wrappers, its rank); of several ranks the one that did not merely lose another."""
    failures = getattr(error, "worker_failures", None)
    if failures:
        number, first = min(failures.items(), key=lambda pair: (_lost_a_peer(pair[1]), pair[0]))
        return _cause(first, number)
    for name in _WRAPPED:
        inner = getattr(error, name, None)
        if isinstance(inner, BaseException):
            return _cause(inner, rank)
    return error, rank


def _lost_a_peer(error: BaseException) -> bool:
    return bool(_LOST_A_PEER.search(f"{type(error).__name__} {error}"))


def _of_a_dead_process(text: str) -> str | None:
    """Ray's report of a process that is gone, without its advice; None for any other text."""
    if memory := _LOW_MEMORY.search(text):
        return f"out of memory: Ray ended a process, the node was {memory[0]}"
    if detail := _EXIT_DETAIL.search(text):
        return f"its process died, killed by somebody or for want of memory ({detail[1].strip().rstrip('.')})"
    return None


def _plain(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    kind = type(error).__name__
    # Ray's own text is a headline and what it stands for; everybody else's begins with the matter.
    matter = next((line for line in lines if not line.endswith(":")), kind)
    return matter if matter == kind else f"{kind}: {matter}"
