"""Environment variables that are passed to the processes of a cluster, and those that its nodes must set themselves.

Ray writes the environment that it passes on into its logs, so secrets are not passed on.
"""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping, MutableMapping
from contextlib import contextmanager

from pipeline.config import ConfigError
from pipeline.passwords import redact
from pipeline.sockets import LONGEST, short_place

_PREFIXES = ("SELORA_", "NCCL_", "GLOO_", "RAY_TRAIN_", "AWS_", "HF_", "GOOGLE_", "GCSFS_", "AZURE_", "FSSPEC_")
_NAMES = {
    "MLFLOW_DISABLE_TELEMETRY", "DS_ACCELERATOR", "XDG_CACHE_HOME", "TORCH_HOME", "STORAGE_EMULATOR_HOST",
    "SSL_CERT_FILE", "SSL_CERT_DIR", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE",
    *(f"{what}_PROXY" for what in ("HTTP", "HTTPS", "ALL", "NO")),
}  # fmt: skip
# Variables for the launcher and the tracker of this process only.
_ONLY_HERE = {"SELORA_HOSTS", "SELORA_STOPPED", "SELORA_SHIPPED", "SELORA_SHIPPING_URI"}
_SECRET = re.compile(r"SECRET|PASSWORD|PASSWD|TOKEN|CREDENTIAL|(^|_)KEY(_|$)")
_WHERE_ONE_IS = re.compile(r"_(FILE|PATH|URI)$|^GOOGLE_APPLICATION_CREDENTIALS$")
# Ray's longest socket is TMP/ray/session_<date and process: 34>/sockets/plasma_store; the limit is in bytes.
_LONGEST_TMP = LONGEST - len("/ray/session_2026-01-01_00-00-00_000000_4194304/sockets/plasma_store")


def passed_on(environment: Mapping[str, str]) -> dict[str, str]:
    """selora's variables, those of stores, endpoints and proxies, and those of the network libraries.

    Args:
        environment: environment of the process that starts a sweep.

    Returns:
        {name: value} without secrets; a tracking address without its password.
    """
    found = {name: value for name, value in _wanted(environment).items() if not _is_secret(name, value)}
    if "MLFLOW_TRACKING_URI" in environment:
        found["MLFLOW_TRACKING_URI"] = redact(environment["MLFLOW_TRACKING_URI"])
    return found


def kept_back(environment: Mapping[str, str]) -> list[str]:
    """Names of secrets that `passed_on` leaves out although the nodes may need them."""
    return sorted(name for name, value in _wanted(environment).items() if _is_secret(name, value))


def _wanted(environment: Mapping[str, str]) -> dict[str, str]:
    return {
        name: value
        for name, value in environment.items()
        if name not in _ONLY_HERE and (name.startswith(_PREFIXES) or name.upper() in _NAMES)
    }


def _is_secret(name: str, value: str) -> bool:
    named = bool(_SECRET.search(name.upper())) and not _WHERE_ONE_IS.search(name.upper())
    return named or redact(value) != value


@contextmanager
def short_sockets(environment: MutableMapping[str, str]) -> Iterator[None]:
    """Give the sockets of a cluster on this machine valid addresses for the block.

    Args:
        environment: RAY_TMPDIR and TMPDIR determine their place; if that is too long, both are set to a short
            directory, because Ray's processes have sockets in either.

    Raises:
        ConfigError: RAY_TMPDIR is too long, or no short directory can be written.
    """
    given = environment.get("RAY_TMPDIR")
    place = given or environment.get("TMPDIR") or "/tmp"
    if len(os.fsencode(place)) <= _LONGEST_TMP:
        yield
        return
    short = short_place()
    if given or short is None:
        raise ConfigError(
            f"{'RAY_TMPDIR' if given else 'TMPDIR'}={place}: too long for the addresses of Ray's sockets; "
            f"set RAY_TMPDIR to a directory of at most {_LONGEST_TMP} bytes"
        )
    directory = tempfile.mkdtemp(prefix="selora-", dir=short)
    before = {name: environment[name] for name in ("TMPDIR",) if name in environment}
    environment.update({"RAY_TMPDIR": directory, "TMPDIR": directory})
    try:
        yield
    finally:
        del environment["RAY_TMPDIR"]
        environment.update(before)
        shutil.rmtree(directory, ignore_errors=True)
