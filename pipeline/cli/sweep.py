"""The command sweep: trials over a grid, on this machine or a Ray cluster."""

from __future__ import annotations

import argparse
from typing import Any

from pipeline.cli.options import FAILED, INTERRUPTED, OK, add_command, count, seconds


def add(commands: Any) -> None:
    """Declare the commands of this file."""
    parser = add_command(
        commands,
        "sweep",
        run_sweep,
        "train and evaluate every trial of a grid on Ray; the same command continues an interrupted sweep",
        "selora sweep configs/own_data.yaml configs/grids/own_data.yaml --plan",
        "selora sweep configs/own_data.yaml configs/grids/own_data.yaml name=first_sweep floor=0.97",
        "selora sweep configs/imagenet_vit_b16.yaml configs/grids/paper.yaml --address 10.0.0.1:6379",
    )
    parser.add_argument("config", metavar="CONFIG", help="YAML file with the options that all trials share")
    parser.add_argument(
        "grid", metavar="GRID", help="YAML file with the options that vary, the baselines and the resources"
    )
    parser.add_argument(
        "overrides",
        nargs="*",
        default=[],
        metavar="key=value",
        help="options that replace those of CONFIG, as in name=first; floor=0.97 replaces that of GRID",
    )
    parser.add_argument(
        "--plan", action="store_true", help="print trials, hours and disk space without starting anything"
    )
    parser.add_argument(
        "--samples",
        type=count,
        metavar="N",
        help="with --plan: number of training images, if there are no shards yet",
    )
    parser.add_argument(
        "--address",
        metavar="HOST:PORT",
        help="address of a Ray cluster (default: RAY_ADDRESS, or start Ray on this machine)",
    )
    parser.add_argument("--retry-failed", action="store_true", help="also rerun trials that failed")
    parser.add_argument(
        "--seconds-per-step",
        type=seconds,
        metavar="S",
        help="speed to assume for the hours of the plan (default: as measured on this machine)",
    )


def run_sweep(arguments: argparse.Namespace) -> int:
    from pipeline.config import ConfigError, load_config
    from pipeline.tuning.grid import OVERRIDABLE, load_grid
    from pipeline.tuning.trials import expand

    of_grid = [one for one in arguments.overrides if one.partition("=")[0] in OVERRIDABLE]
    config = load_config(arguments.config, [one for one in arguments.overrides if one not in of_grid])
    grid = load_grid(arguments.grid, of_grid)
    from pipeline.costs.planned import planned
    from pipeline.tuning.plan import describe_plan
    from pipeline.tuning.sweep import plan_sweep, sweep

    if arguments.samples is not None and not arguments.plan:
        raise ConfigError("--samples needs --plan: a sweep counts the images in the shards")
    if arguments.plan:
        print(
            describe_plan(
                plan_sweep(
                    config,
                    grid,
                    address=arguments.address,
                    seconds_per_step=arguments.seconds_per_step,
                    samples=arguments.samples,
                )
            )
        )
        if on_paper := planned(
            [trial.config for trial in expand(config, grid) if not trial.soup_of], grid.resources.workers
        ):
            print(on_paper)
        return OK
    outcome = sweep(
        config,
        grid,
        address=arguments.address,
        retry_failed=arguments.retry_failed,
        seconds_per_step=arguments.seconds_per_step,
    )
    print(f"{outcome.table}\n{outcome.directory}")
    if not outcome.complete:
        return INTERRUPTED
    if outcome.finished:
        from pipeline.report.run import report_sweep

        print(report_sweep(outcome.directory, config))
    return FAILED if outcome.failed else OK
