"""The result of a check, and how results are printed."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from pipeline.display import text_table


@dataclass(frozen=True)
class Finding:
    """The result of one check.

    Attributes:
        name: subject of the check.
        text: the result.
        todo: advice; empty if nothing is wrong.
        checked: False if these are only requirements and nothing was checked.
    """

    name: str
    text: str
    todo: str = ""
    checked: bool = True

    @property
    def ok(self) -> bool:
        return not self.todo or not self.checked


def format_findings(findings: Iterable[Finding]) -> str:
    """One line per finding, marked "ok" or "!!", followed by the advice."""
    rows = []
    for each in findings:
        mark = "" if not each.checked else "ok" if each.ok else "!!"
        rows.append((mark, each.name, each.text))
        if each.todo:
            rows.append(("", "", each.todo))
    return text_table((), rows, left=3)
