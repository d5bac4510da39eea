"""Ray's errors in plain words: why a cluster cannot be used, and why a trial ended.

Ray wraps the cause in its own errors, each of which starts with a headline.
"""

from __future__ import annotations

import os
import re
import socket
import traceback
from collections.abc import Mapping

from pipeline.config import ConfigError
from pipeline.tuning.trial import final_reason

_SECONDS = 10.0
_LOST_A_PEER = re.compile(r"connection (reset|closed|refused)|broken pipe|nccl|gloo|peer", re.IGNORECASE)
_LOW_MEMORY = re.compile(r"running low on memory[^.]*", re.IGNORECASE)
_EXIT_DETAIL = re.compile(r"Worker exit detail: (.*?)(?: Some common causes| There are some potential|$)", re.DOTALL)
_LONGEST = 300


class Died(Exception):
    """The process was killed, or it ran out of memory."""


class Failed(Exception):
    """The function raised; the message is the error in a line or two."""


class RanksFailed(Exception):
    """Training processes ended with an error.

    Args:
        failures: {rank: error} of each of them.
    """

    def __init__(self, failures: Mapping[int, BaseException]) -> None:
        super().__init__(failures)
        self.failures = dict(failures)


def check_reachable(address: str) -> None:
    """Raise ConfigError at once if nothing listens at HOST:PORT; Ray itself would try for minutes."""
    found = re.fullmatch(r"\[?([^/\[\]]+?)\]?:(\d+)", address)
    if found is None:
        return  # auto, ray://…: special addresses of Ray
    try:
        socket.create_connection((found[1], int(found[2])), timeout=_SECONDS).close()
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(
            f"cannot use the Ray cluster at {address}: {reason}; is its head running, and is this the address that "
            "`ray start --head` printed?"
        ) from None


def token_fault(error: BaseException) -> str | None:
    """Advice if the cluster requires a token, which Ray reports in a cause of a cause; None for another error."""
    if "AuthenticationError" not in "".join(traceback.format_exception(error)):
        return None
    mode = os.environ.get("RAY_AUTH_MODE", "not set")
    return (
        f"the token is missing or not the cluster's (RAY_AUTH_MODE is {mode}); set RAY_AUTH_MODE=token, and "
        "RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH to the token that the cluster was started with"
    )


def reason_behind(error: BaseException) -> str:
    """The reason behind an error of Ray or of selora."""
    cause, rank = _cause(error, None)
    text = str(cause) if isinstance(cause, Died | Failed) else None
    text = text or final_reason(cause) or _of_a_dead_process(str(cause)) or _plain(cause)
    text = text if len(text) <= _LONGEST else text[:_LONGEST] + "…"
    return text if rank is None else f"rank {rank}: {text}"


def _cause(error: BaseException, rank: int | None) -> tuple[BaseException, int | None]:
    """(the error inside all wrappers, its rank); with several ranks, one that did not merely lose another."""
    if isinstance(error, RanksFailed):
        number, first = min(error.failures.items(), key=lambda pair: (_lost_a_peer(pair[1]), pair[0]))
        return _cause(first, number)
    inner = getattr(error, "cause", None)
    return _cause(inner, rank) if isinstance(inner, BaseException) else (error, rank)


def _lost_a_peer(error: BaseException) -> bool:
    return bool(_LOST_A_PEER.search(f"{type(error).__name__} {error}"))


def _of_a_dead_process(text: str) -> str | None:
    """Ray's report of a lost process, without its advice; None for any other text."""
    if memory := _LOW_MEMORY.search(text):
        return f"out of memory: Ray ended a process, the node was {memory[0]}"
    if detail := _EXIT_DETAIL.search(text):
        return f"its process was killed, or it ran out of memory ({detail[1].strip().rstrip('.')})"
    return None


def _plain(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    kind = type(error).__name__
    # In Ray's own text the cause follows a headline; other texts begin with the cause.
    matter = next((line for line in lines if not line.endswith(":")), kind)
    return matter if matter == kind else f"{kind}: {matter}"
