"""The account of a source: seen = packed + left out (by reason) + ignored (by kind)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

# Names in a line of the summary; the report has all of them.
SHOWN = 5
# Largest share of the images that may be left out, unless --max-unreadable says otherwise.
MAX_UNREADABLE = 0.01


@dataclass(frozen=True)
class LeftOut:
    """One intended sample that is not packed.

    Attributes:
        name: Its name for the user: a path inside the source, or ``line 7`` of a table without a name.
        reason: Reason in words that many samples share, because samples are counted by it ("no caption").
        detail: The full reason for this sample, if more is known: a decoder's message, the content of its line.
    """

    name: str
    reason: str
    detail: str = ""

    def __str__(self) -> str:
        return f"{self.name}: {self.detail or self.reason}"


@dataclass(frozen=True)
class Account:
    """The sum over a source. Folders count files; tables and JSON files count named images.

    Attributes:
        seen: Their number, counted independently by the reader.
        packed: Number of samples.
        left_out: Intended samples that are not packed.
        ignored: Kind -> number of files that were never intended as samples (``"hidden files"``, ``".txt files"``).

    Raises:
        ValueError: When the sum does not add up, which is a fault of the reader, not of the source.
    """

    seen: int
    packed: int
    left_out: tuple[LeftOut, ...] = ()
    ignored: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        total = self.packed + len(self.left_out) + sum(self.ignored.values())
        if total != self.seen:
            raise ValueError(f"{self.seen} seen, but {total} accounted for: {self.as_json()}")

    @property
    def reasons(self) -> dict[str, int]:
        """Reason -> number of samples left out for it, most frequent first."""
        return dict(Counter(each.reason for each in self.left_out).most_common())

    def __str__(self) -> str:
        return self.text()

    def text(self, packed: str = "packed") -> str:
        """The sum in one line, followed by a line for each reason and kind; before packing, samples are "to pack"."""
        lines = [
            f"{self.seen} seen = {self.packed} {packed} + {len(self.left_out)} left out + "
            f"{sum(self.ignored.values())} ignored"
        ]
        for reason, count in self.reasons.items():
            names = [str(each) if each.detail else each.name for each in self.left_out if each.reason == reason]
            more = f" and {count - SHOWN} more" if count > SHOWN else ""
            lines.append(f"  {count} left out, {reason}: {', '.join(names[:SHOWN])}{more}")
        lines += [f"  {count} ignored: {kind}" for kind, count in self.ignored.items()]
        return "\n".join(lines)

    @staticmethod
    def from_json(content: Mapping[str, Any]) -> Account:
        """The account written by ``as_json``.

        Raises:
            ValueError: For anything else.
        """
        try:
            left_out = tuple(LeftOut(each["name"], each["reason"], each["detail"]) for each in content["names"])
            return Account(content["seen"], content["packed"], left_out, dict(content["ignored"]))
        except (KeyError, TypeError) as error:
            raise ValueError(f"not the sum over a source: {error}") from error

    def as_json(self) -> dict[str, Any]:
        """The account with every name, for index.json and ``--report``."""
        return {
            "seen": self.seen,
            "packed": self.packed,
            "left_out": self.reasons,
            "ignored": dict(self.ignored),
            "names": [{"name": each.name, "reason": each.reason, "detail": each.detail} for each in self.left_out],
        }
