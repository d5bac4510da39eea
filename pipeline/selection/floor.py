"""The floor that a fine-tuned model must keep, and the largest strength that keeps it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import log
from typing import Any

from pipeline.config import ConfigError, Promote
from pipeline.selection.rule import check

STEPS = 20  # candidate strengths are 1/20, 2/20, .., 1
# Power of the strength in the share lost: about the mean over the runs of tests/benchmarks/keeping.py.
TYPICAL_POWER = 1.6


@dataclass(frozen=True)
class Floor:
    """The clauses of promotion that limit what may be lost: promote.min_kept and promote.max_forgetting."""

    rule: Promote

    @staticmethod
    def of(rule: Promote) -> Floor:
        """The floor in a promotion rule; ConfigError if the rule has none."""
        if rule.min_kept is None and rule.max_forgetting is None:
            raise ConfigError(
                "strength=auto: looks for the largest strength that keeps a floor, and none is set: give "
                "promote.min_kept (share kept, as in 0.95) or promote.max_forgetting (mean drop, as in 0.02)"
            )
        return Floor(Promote(min_kept=rule.min_kept, max_forgetting=rule.max_forgetting))

    def margin(self, summary: Mapping[str, Any]) -> float:
        """Distance of results above the floor, negative below it; ConfigError if it cannot be determined."""
        clauses = check(self.rule, summary)
        margins = [each.margin for each in clauses]
        known = [each for each in margins if each is not None]
        if len(known) < len(margins):
            raise ConfigError("\n".join(f"strength=auto: {each}" for each in clauses if each.margin is None))
        return min(known)

    @property
    def of_untouched(self) -> float:
        """The margin of the untouched model, which keeps everything."""
        margins = [] if self.rule.min_kept is None else [1 - self.rule.min_kept]
        return min([*margins, *([] if self.rule.max_forgetting is None else [self.rule.max_forgetting])])

    def __str__(self) -> str:
        parts = [] if self.rule.min_kept is None else [f"promote.min_kept >= {self.rule.min_kept:g}"]
        parts += [] if self.rule.max_forgetting is None else [f"promote.max_forgetting <= {self.rule.max_forgetting:g}"]
        return " and ".join(parts)


def strongest(margin: Callable[[float], float], untouched: float) -> tuple[float, dict[float, float]]:
    """The largest strength with a margin of 0 or more, and the margins of all strengths that were tried.

    The search tries 1 first, then up to three times the strength at which a power law through the nearest known losses
    meets the floor, then the middle: one to eight tries, mostly two to four, if the margin falls as the strength rises.

    Args:
        margin: function from a strength in (0, 1] to its margin; each call is an evaluation.
        untouched: the margin at 0.

    Returns:
        0 if not even 1/STEPS keeps the floor.
    """
    known = {STEPS: margin(1.0)}
    low, high = (STEPS, STEPS) if known[STEPS] >= 0 else (0, STEPS)
    while high - low > 1:
        step = (low + high) // 2
        if len(known) < 4 and untouched > 0:
            step = int(_crossing({step: untouched - each for step, each in known.items()}, low, high, untouched))
        step = min(max(step, low + 1), high - 1)
        known[step] = margin(step / STEPS)
        low, high = (step, high) if known[step] >= 0 else (low, step)
    return low / STEPS, {step / STEPS: each for step, each in sorted(known.items())}


def _crossing(lost: Mapping[int, float], low: int, high: int, allowed: float) -> float:
    """The step at which lost(high) · (step / high)^p is `allowed`; p from a second strength, or else TYPICAL_POWER."""
    second = low or min((step for step in lost if step > high), default=0)
    power = TYPICAL_POWER
    if second and lost[second] > 0 and (found := log(lost[high] / lost[second]) / log(high / second)) > 0:
        power = found
    return high * (allowed / lost[high]) ** (1 / power)
