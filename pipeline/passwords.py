"""Passwords in addresses, found in any text, so that nothing that is written or printed contains one."""

from __future__ import annotations

import re
from urllib.parse import unquote

MASK = "***"
# A database's password may hold a slash, which SQLAlchemy accepts; in a web address it would end the host.
_DATABASE = re.compile(r"(?<![\w+])((?:postgresql|mysql|mssql)[+\w]*://[^/@\s:]*):[^@\s]*@", re.IGNORECASE)
_ANY = re.compile(r"(?<=://)([^/@\s:]*):[^/@\s]*@")
# ?password=…, and PWD=… inside of the quoted odbc_connect of SQL Server.
_QUERY = re.compile(r"((?:password|passwd|pwd)(?:=|%3D))(?:(?!%3B)[^&;\s'\"])+", re.IGNORECASE)


def password_in(address: str) -> str | None:
    """The password of ``scheme://user:password@host``, as it was before it was written into an address."""
    found = _ANY.search(address)
    return None if found is None or MASK in found[0] else unquote(found[0][len(found[1]) + 1 : -1])


def redact(text: str) -> str:
    """`text` with the password of every address in it replaced by ***."""
    text = _ANY.sub(rf"\1:{MASK}@", _DATABASE.sub(rf"\1:{MASK}@", text))
    return _QUERY.sub(rf"\1{MASK}", text)
