"""What became of everything that a source holds: seen = packed + left out (by reason) + ignored (by kind)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

# Names in a line of the summary; the report has all of them.
SHOWN = 5


@dataclass(frozen=True)
class LeftOut:
    """One thing that was meant as a sample and is not packed.

    Attributes:
        name: What the user calls it: a path inside the source, or ``line 7`` of a table that names none.
        reason: Why, in words that many samples share, since the samples are counted by them ("no caption").
        detail: The reason in full for this one, where more is known: a decoder's message, what its line holds.
    """

    name: str
    reason: str
    detail: str = ""

    def __str__(self) -> str:
        return f"{self.name}: {self.detail or self.reason}"


@dataclass(frozen=True)
class Account:
    """The sum over a source. Files are counted in folders, named images in tables and json files.

    Attributes:
        seen: How many there are, counted where they were found.
        packed: How many become samples.
        left_out: Those meant as samples that do not.
        ignored: Kind -> number of what was never meant as a sample (``"hidden files"``, ``".txt files"``).

    Raises:
        ValueError: When the sum does not add up, which is a fault of the reader and not of the source.
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
        """Reason -> number of samples left out for it, the most frequent first."""
        return dict(Counter(each.reason for each in self.left_out).most_common())

    def __str__(self) -> str:
        """The sum in a line, and a line for each reason and kind."""
        lines = [
            f"{self.seen} seen = {self.packed} packed + {len(self.left_out)} left out + "
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
        """The sum that ``as_json`` wrote.

        Raises:
            ValueError: For anything else.
        """
        try:
            left_out = tuple(LeftOut(each["name"], each["reason"], each["detail"]) for each in content["names"])
            return Account(content["seen"], content["packed"], left_out, dict(content["ignored"]))
        except (KeyError, TypeError) as error:
            raise ValueError(f"not the sum over a source: {error}") from error

    def as_json(self) -> dict[str, Any]:
        """The sum with every name, as index.json keeps it and ``--report`` writes it."""
        return {
            "seen": self.seen,
            "packed": self.packed,
            "left_out": self.reasons,
            "ignored": dict(self.ignored),
            "names": [{"name": each.name, "reason": each.reason, "detail": each.detail} for each in self.left_out],
        }
