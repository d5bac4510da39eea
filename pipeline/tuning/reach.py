"""Whether a Ray cluster can be used from here, and what to do where it cannot."""

from __future__ import annotations

import os
import re
import socket
import traceback

from pipeline.config import ConfigError

_SECONDS = 10.0


def check_reachable(address: str) -> None:
    """ConfigError at once for a HOST:PORT where nobody listens; Ray itself would try for minutes."""
    found = re.fullmatch(r"\[?([^/\[\]]+?)\]?:(\d+)", address)
    if found is None:
        return  # auto, ray://…: Ray's own words for an address
    try:
        socket.create_connection((found[1], int(found[2])), timeout=_SECONDS).close()
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(
            f"cannot use the Ray cluster at {address}: {reason}; is its head running, and is this the address that "
            "`ray start --head` printed?"
        ) from None


def token_fault(error: BaseException) -> str | None:
    """What to do where the cluster asked for a token; None for another error. Ray tells that in a cause of a cause."""
    if "AuthenticationError" not in "".join(traceback.format_exception(error)):
        return None
    mode = os.environ.get("RAY_AUTH_MODE", "not set")
    return (
        f"the token is missing or not the cluster's (RAY_AUTH_MODE is {mode}); set RAY_AUTH_MODE=token, and "
        "RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH to the token that the cluster was started with"
    )
