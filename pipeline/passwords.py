"""Passwords in addresses: found in any text, so that nothing that is written or said holds one."""

from __future__ import annotations

import re

MASK = "***"
# A database's password may hold a slash, as SQLAlchemy takes it; in an address of the web that would end the host.
_DATABASE = re.compile(r"(?<![\w+])((?:postgresql|mysql|mssql)[+\w]*://[^/@\s:]*):[^@\s]*@", re.IGNORECASE)
_ANY = re.compile(r"(?<=://)([^/@\s:]*):[^/@\s]*@")
# ?password=…, and PWD=… inside of the quoted odbc_connect of SQL Server.
_QUERY = re.compile(r"((?:password|passwd|pwd)(?:=|%3D))(?:(?!%3B)[^&;\s'\"])+", re.IGNORECASE)


def redact(text: str) -> str:
    """`text` with the password of every address in it replaced by ***."""
    text = _ANY.sub(rf"\1:{MASK}@", _DATABASE.sub(rf"\1:{MASK}@", text))
    return _QUERY.sub(rf"\1{MASK}", text)
