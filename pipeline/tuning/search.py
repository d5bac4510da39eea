"""A search over ranges: a sampler of Optuna proposes one configuration after the other.

Earlier configurations are read from the trials' directories each time, so nothing else has to survive the death of the
driver, and a proposal is a function of the finished trials and the seed of the sweep.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any, Literal, NamedTuple

from pydantic import Field

from pipeline.config import Config, ConfigError, Section, override
from pipeline.runs.results import EVAL, read_floors
from pipeline.runs.sweep import OVER, read_state, trial_dir
from pipeline.selection.frontier import floors_of

KINDS = ("linear", "log", "integers", "choices")
_DIGITS = 3  # significant digits of a proposed number, so that names and tables show it unrounded
ATTEMPTS = 50  # attempts to propose a configuration that is new and valid


class Search(Section):
    """The number of configurations and the sampler."""

    trials: int = Field(ge=1, description="configurations in all, those of the grid included, baselines not")
    sampler: Literal["tpe", "random"] = Field(default="tpe", description="Optuna's sampler")


@dataclass(frozen=True)
class Range:
    """The range of an option: between two numbers on a linear or log scale, or one of several values.

    Attributes:
        whole: whether the option takes whole numbers only.
    """

    kind: str
    values: tuple[Any, ...]
    whole: bool = False

    def __str__(self) -> str:
        kind = f"{self.kind} of whole numbers" if self._in_steps and self.kind != "integers" else self.kind
        return f"{kind} {list(self.values)}"

    @property
    def _in_steps(self) -> bool:
        """Whether it consists of whole numbers between two ends."""
        return self.kind == "integers" or (self.whole and self.kind != "choices")

    def fault(self) -> str | None:
        """The fault of the range, if any."""
        if self.kind not in KINDS:
            return f"should be {{log: [low, high]}}, with one of {', '.join(KINDS)}; got {self.kind}"
        if self.kind == "choices":
            texts = [repr(value) for value in self.values]
            return None if len(texts) > 1 and len(set(texts)) == len(texts) else "choices: needs two different values"
        kinds = int if self._in_steps else (int, float)
        numbers = [each for each in self.values if isinstance(each, kinds) and not isinstance(each, bool)]
        if len(self.values) != 2 or len(numbers) != 2:
            what = "whole numbers" if self._in_steps else "numbers"
            return f"{self.kind}: needs two {what}, [low, high], got {list(self.values)}"
        if not numbers[0] < numbers[1]:
            return f"{self.kind}: is empty, {numbers[0]} is not below {numbers[1]}"
        return "log: needs a low end above 0" if self.kind == "log" and numbers[0] <= 0 else None

    def holds(self, value: Any) -> bool:
        """Whether a value is in the range."""
        if self.kind == "choices":
            return value in self.values
        if not isinstance(value, int | float) or not self.values[0] <= value <= self.values[1]:
            return False
        return value == int(value) or not self._in_steps

    @property
    def ends(self) -> tuple[Any, ...]:
        """Values that are valid only if all values in the range are."""
        return self.values

    def distribution(self) -> Any:
        """The range for Optuna; a choice is represented by its position, because values may be lists."""
        from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

        if self.kind == "choices":
            return CategoricalDistribution(tuple(range(len(self.values))))
        if self._in_steps:
            return IntDistribution(*self.values, log=self.kind == "log")
        return FloatDistribution(float(self.values[0]), float(self.values[1]), log=self.kind == "log")

    def encode(self, value: Any) -> Any:
        """A value in Optuna's form."""
        if self.kind == "choices":
            return self.values.index(value)
        return int(value) if self._in_steps else value

    def decode(self, drawn: Any) -> Any:
        """A value for the config, with few digits."""
        if self.kind == "choices":
            return self.values[drawn]
        if self._in_steps:
            return int(drawn)
        low, high = self.values
        return min(max(float(f"{drawn:.{_DIGITS}g}"), float(low)), float(high))


class Tried(NamedTuple):
    """A proposed configuration: {option: value}, its result (None: none), and whether it is over."""

    point: Mapping[str, Any]
    value: float | None
    over: bool


def propose(ranges: Mapping[str, Range], tried: Sequence[Tried], search: Search, seed: int) -> dict[str, Any]:
    """The next configuration, {option: value}.

    A failed configuration counts as neither good nor bad, and a running one as bad, so that parallel trials differ.
    """
    import warnings

    import optuna
    from optuna.trial import TrialState, create_trial

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    distributions = {key: each.distribution() for key, each in ranges.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        if search.sampler == "random":
            sampler = optuna.samplers.RandomSampler(seed=seed)
        else:
            first = max(3, search.trials // 4)  # at random until there are results to learn from
            sampler = optuna.samplers.TPESampler(
                seed=seed, n_startup_trials=first, multivariate=True, constant_liar=True
            )
        study = optuna.create_study(direction="maximize", sampler=sampler)
        for one in tried:
            state = TrialState.RUNNING if not one.over else TrialState.COMPLETE
            state = TrialState.FAIL if one.over and one.value is None else state
            study.add_trial(
                create_trial(
                    state=state,
                    value=one.value if state is TrialState.COMPLETE else None,
                    params={key: each.encode(one.point[key]) for key, each in ranges.items()},
                    distributions=distributions,
                )
            )
        drawn = study.ask(distributions).params
    return {key: each.decode(drawn[key]) for key, each in ranges.items()}


def option(config: Config, key: str) -> Any:
    """The value of an option by its dotted key; a tuple as a list."""
    value: Any = config
    for part in key.split("."):
        value = getattr(value, part)
    return list(value) if isinstance(value, tuple) else value


def configs_at_ends(config: Config, ranges: Mapping[str, Range]) -> list[Config]:
    """The config at both ends of each range; ConfigError if one is not a valid value of its option."""
    found, faults = [], []
    for key, each in ranges.items():
        for value in each.ends:
            try:
                found.append(override(config, {key: value}))
            except ConfigError as error:
                faults += [f"ranges.{key}: {line}" for line in str(error).splitlines()]
    if faults:
        raise ConfigError("\n".join(dict.fromkeys(faults)))
    return found


def check_draws(config: Config, ranges: Mapping[str, Range]) -> None:
    """Raise ConfigError if no draw from the ranges is valid: options that exclude each other, each valid alone."""
    fault = ""
    for seed in range(ATTEMPTS):
        changes = propose(ranges, (), Search(trials=1, sampler="random"), seed)
        try:
            override(config, changes)
            return
        except ConfigError as error:
            fault = str(error).splitlines()[0]
    raise ConfigError(f"ranges: none of {ATTEMPTS} draws is valid; the last: {fault}")


def value_of(sweep_dir: Path, names: Sequence[str], floor: float) -> tuple[float | None, bool]:
    """(mean id at the floor over the trials with results, whether all of these trials are over)."""
    found, over = [], True
    for name in names:
        run_dir = trial_dir(sweep_dir, name)
        over &= read_state(run_dir).status in OVER
        at = floors_of(read_floors(run_dir / EVAL)).get(floor)
        if at is not None and math.isfinite(at.id):
            found.append(at.id)
    return (mean(found) if found else None), over
