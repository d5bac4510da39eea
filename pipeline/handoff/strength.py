"""A run's model at a strength, evaluated according to its config."""

from __future__ import annotations

from pathlib import Path

from pipeline.config import Config, ConfigError, Promote
from pipeline.evaluation.auto_strength import ChosenStrength, choose_strength
from pipeline.evaluation.command import EvalRequest, at_strength, places, progress
from pipeline.evaluation.measures.ranks import launched_ranks
from pipeline.evaluation.run import Outcome
from pipeline.evaluation.strength import AUTO, Strength
from pipeline.selection.floor import Floor


def run_at_strength(
    run_dir: Path, strength: Strength, rule: Promote, config: Config
) -> tuple[ChosenStrength | None, Outcome | None]:
    """The results of a run at a strength, as from `selora evaluate RUN --strength`; existing results are reused."""
    if strength == AUTO:
        Floor.of(rule)  # a rule without a floor is an error before anything is loaded
    options = EvalRequest()
    with launched_ranks():
        return at_strength(run_dir, strength, rule, config, options.table(config), options)


def strength_of_export(run_dir: Path, strength: Strength, rule: Promote, config: Config) -> tuple[float, list[str]]:
    """The strength of an export, and notes for the user; ConfigError if none above 0 keeps the floor."""
    if not isinstance(strength, str):
        if not 0 < strength <= 1:
            raise ConfigError(f"strength: {strength:g} should be above 0 (untouched), and 1 (fine-tuned) at most")
        return strength, []
    floor, options = Floor.of(rule), EvalRequest()
    out, baselines = places(run_dir, options)
    with launched_ranks():
        table, settings = options.table(config), options.settings(config)
        chosen = choose_strength(run_dir, table, out, settings, floor, baselines=baselines, say=progress)
    if chosen.alpha == 0:
        raise ConfigError(f"{chosen}; nothing is exported")
    return chosen.alpha, [str(chosen)]
