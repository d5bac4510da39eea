"""The command line as a user meets it: exit codes, messages on the right stream, nothing heavy imported early."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pipeline.cli import build_parser, main

CONFIG = "configs/own_data.yaml"
COMMANDS = ("inspect", "pack", "index", "verify", "train", "evaluate", "track", "config", "demo")


def selora(*arguments: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "pipeline", *arguments],
        cwd=cwd,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )


def test_config_mistake_ends_in_2_without_traceback(repository):
    """Mistake in a config ends in 2 with a message and no traceback."""
    done = selora("train", CONFIG, "adapter.rnak=4", "train.lr=abc", cwd=repository)
    assert done.returncode == 2
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    assert done.stderr.startswith("selora train: ")
    assert "adapter.rnak: unknown option, did you mean adapter.rank? (command line)" in done.stderr
    assert "train.lr: should be a valid number, got 'abc' (command line)" in done.stderr


def test_missing_shards_end_in_2_and_are_named(repository, tmp_path):
    done = selora("train", CONFIG, f"data.train={tmp_path}/nowhere", f"out={tmp_path}", cwd=repository)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert f"{tmp_path}/nowhere" in done.stderr


@pytest.mark.parametrize(
    "arguments",
    [[], ["trian"], ["train"], ["pack", "only_source"], ["pack", "a", "b", "--samples-per-shard", "0"], ["--vers"]],
)
def test_wrong_usage_ends_in_2(arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert "usage: selora" in capsys.readouterr().err


def test_unknown_or_abbreviated_option_is_refused(capsys):
    """Unknown option of a command is refused even if abbreviated."""
    with pytest.raises(SystemExit):
        main(["pack", "a", "b", "--forc"])
    assert "--forc" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (
            ["config", CONFIG, "--adapter.rank", "64"],
            "options of the config are written without dashes, as in adapter.rank=64",
        ),
        (
            ["config", CONFIG, "--adapter.rank=64"],
            "options of the config are written without dashes, as in adapter.rank=64",
        ),
        (
            ["config", CONFIG, "--adapter.rank"],
            "options of the config are written without dashes, as in adapter.rank=VALUE",
        ),
        (["config", CONFIG, "--rank", "64"], "unrecognized arguments: --rank 64, did you mean adapter.rank?"),
        (["inspect", "photos", "--foramt", "csv"], "unrecognized arguments: --foramt csv, did you mean --format?"),
        (["evaluate", "runs/a", "--adapter.rank", "64"], "unrecognized arguments: --adapter.rank 64"),
        (["pack", "a", "b", "--eval", "--templates", "photo"], "invalid choice: 'photo' (choose from "),
    ],
)
def test_an_unknown_option_gets_the_usage_of_its_command(arguments, told, capsys):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    printed = capsys.readouterr().err
    assert printed.startswith(f"usage: selora {arguments[0]} ")
    assert told in printed.splitlines()[-1]


def test_only_what_is_missing_is_asked_for(capsys):
    with pytest.raises(SystemExit):
        main(["config"])
    assert capsys.readouterr().err.endswith("the following arguments are required: CONFIG\n")


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["pack", "a", "b", "--encoding", "foo"], "--encoding: should be an encoding of text, as in cp1252, got 'foo'"),
        (["sweep", "a", "b", "--seconds-per-step", "-5"], "should be a number of seconds above 0, got '-5'"),
    ],
)
def test_a_wrong_value_of_a_flag_ends_with_usage(arguments, told, capsys):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert told in capsys.readouterr().err


def test_all_datasets_are_listed_without_naming_files(capsys):
    from pipeline.data.originals.table import ORIGINALS

    with pytest.raises(SystemExit) as caught:
        main(["pack", "--dataset", "list"])
    assert caught.value.code == 0
    assert capsys.readouterr().out.split() == [*ORIGINALS, "imagenet-train"]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["evaluate", "runs/nix", "--benchmark", "quick"], "runs/nix: no such run; a plain model is named"),
        (["cost", "runs/nix"], "runs/nix: no such run; a plain model is named"),
        (["predict", "models:/m/1", "."], ". is a folder: name the images in it"),
        (["pack", "a", "b", "--dataset", "imagnet"], "'imagnet' is not known; there are imagenet,"),
    ],
)
def test_a_wrong_name_is_reported_with_the_way_out(arguments, told, capsys):
    assert main(arguments) == 2
    assert told in capsys.readouterr().err


def test_negative_workers_are_refused_first(capsys):
    """A negative number of workers is refused before anything is looked up."""
    with pytest.raises(SystemExit):
        main(["evaluate", "runs/nix", "--workers", "-1"])
    assert "--workers: should be a whole number, 0 or more, got '-1'" in capsys.readouterr().err


def test_doctor_says_once_how_shards_are_made(capsys, tmp_path):
    assert main(["doctor", CONFIG, f"data.train={tmp_path}/nowhere", f"out={tmp_path}"]) == 1
    assert capsys.readouterr().out.count("selora pack") == 1


def test_other_ranks_say_who_they_are(repository):
    done = selora("train", CONFIG, "sede=1", cwd=repository, RANK="3", LOCAL_RANK="3", WORLD_SIZE="4")
    assert done.returncode == 2
    assert done.stderr.startswith("[rank 3] selora train: sede: unknown option, did you mean seed?")


def test_config_command_prints_origins_and_loads_again(repository, tmp_path):
    """Config command prints values with origins and can be loaded again."""
    done = selora("config", CONFIG, "train.lr=3e-5", "adapter.targets=[image.*.q_proj]", cwd=repository)
    assert done.returncode == 0
    lines = {line.split(":")[0].strip(): line for line in done.stdout.splitlines()}
    assert lines["targets"].split("  # ")[1] == "command line"
    assert lines["reduction"].split("  # ")[1].startswith("configs/base.yaml:")
    assert lines["zero_stage"].split("  # ")[1] == "default"
    printed = [line for line in done.stdout.splitlines() if "  # " in line]
    assert len({line.index("  # ") for line in printed}) == 1  # aligned
    (tmp_path / "again.yaml").write_text(done.stdout)
    again = selora("config", str(tmp_path / "again.yaml"), cwd=repository)
    assert [line.split("  # ")[0] for line in again.stdout.splitlines()] == [
        line.split("  # ")[0] for line in done.stdout.splitlines()
    ]


def test_no_overrides_are_needed_and_local_rank_is_ignored(capsys, repository):
    """Overrides may come without any and local rank is ignored."""
    path = str(repository / CONFIG)
    assert main(["--local_rank=1", "config", path]) == 0
    first = capsys.readouterr().out
    assert main(["config", "--local-rank=0", path]) == 0
    assert capsys.readouterr().out == first


def test_closed_pipe_is_quiet(repository):
    done = subprocess.run(
        f"{sys.executable} -m pipeline config {CONFIG} | head -1",
        shell=True,
        cwd=repository,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.stdout.startswith("name: own_data")
    assert done.stderr == ""


def test_interrupt_ends_in_130_without_a_traceback(repository, tmp_path):
    fifo = tmp_path / "never.yaml"
    os.mkfifo(fifo)  # reading it waits for a writer, so the command is surely busy when the signal comes
    process = subprocess.Popen(
        [sys.executable, "-m", "pipeline", "train", str(fifo)],
        cwd=repository,
        stderr=subprocess.PIPE,
        text=True,
        # A shell that starts the tests in the background has them ignore Ctrl-C.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    writer = os.open(fifo, os.O_WRONLY)  # returns when the command has opened the other end
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    os.close(writer)
    assert process.returncode == 130
    assert stderr.strip() == "interrupted"


def test_an_interrupt_while_options_are_read_is_one_line(monkeypatch, capsys):
    def interrupted():
        raise KeyboardInterrupt

    monkeypatch.setattr(sys.modules["pipeline.cli.main"], "build_parser", interrupted)
    assert main(["config", "x.yaml"]) == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_an_interrupt_while_modules_load_is_one_line(repository):
    """Ctrl-C comes when the command line asks for its first module, which takes most of a second."""
    script = (
        "import os, signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler);"
        "Now = type('Now', (), {'find_spec': lambda *name: 'pipeline.config' in name and "
        "os.kill(os.getpid(), signal.SIGINT) or None});"
        "sys.meta_path.insert(0, Now());"
        "from pipeline.__main__ import main; code = main();"
        "print(code, signal.getsignal(signal.SIGINT) is signal.SIG_DFL)"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=repository, capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.stderr) == ("130 True\n", "interrupted\n")


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_every_command_has_an_example(command, capsys):
    with pytest.raises(SystemExit) as caught:
        main([command, "--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    assert f"selora {command}" in text.split("example:")[1]


def test_settings_may_stand_behind_an_option(capsys):
    assert main(["sweep", CONFIG, "no_grid.yaml", "--plan", "adapter.rank=0", "gate.lam=-1"]) == 2
    told = capsys.readouterr().err
    assert "adapter.rank" in told
    assert "gate.lam" in told
    with pytest.raises(SystemExit):
        main(["evaluate", "some_run", "--limit", "3", "adapter.rank=8"])
    assert "unrecognized arguments: adapter.rank=8" in capsys.readouterr().err


def test_help_and_config_import_no_stage_and_nothing_heavy(repository):
    script = (
        "import sys; from pipeline.cli import main, build_parser; build_parser().format_help();"
        f"main(['config', '{CONFIG}']);"
        "heavy = {'torch', 'numpy', 'ray', 'mlflow', 'deepspeed', 'webdataset', 'open_clip', 'matplotlib', 'rich'};"
        "rooms = [name.split('.') for name in sys.modules if name.startswith('pipeline.')];"
        "stages = {'.'.join(room) for room in rooms if len(room) > 2 and room[1] not in ('cli', 'config')};"
        "print(sorted(heavy & set(sys.modules)), sorted(stages), file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=repository, capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stderr.strip() == "[] []"


def test_inspect_loads_no_engine_and_prints_any_name_in_ascii(repository, tmp_path):
    """A folder of photos is looked at before anything is trained: what takes seconds to import is not imported."""
    for name in ("thé", "茶"):
        (tmp_path / "photos" / name).mkdir(parents=True)
        (tmp_path / "photos" / name / "1.jpg").write_bytes(b"no image")
    script = (
        f"import sys; from pipeline.cli import main; sys.argv = ['selora', 'inspect', {str(tmp_path / 'photos')!r}];"
        "code = main();"
        "heavy = {'torch', 'numpy', 'ray', 'mlflow', 'deepspeed', 'webdataset', 'open_clip', 'matplotlib', 'pandas'};"
        "print(code, sorted(heavy & set(sys.modules)), file=sys.stderr)"
    )
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=repository, capture_output=True, text=True, timeout=60, env=environment
    )
    assert done.stderr.strip() == "0 []"
    assert r"class 0 'th\xe9'" in done.stdout and r"1: \u8336 \u2192 \u8336" in done.stdout


def test_no_option_is_a_prefix_of_one_of_torchruns():
    """torchrun reads abbreviations over the whole line, so `--log` of ours would be its --log-dir."""
    from torch.distributed.run import get_args_parser

    theirs = [text for action in get_args_parser()._actions for text in action.option_strings]
    parser = build_parser()
    commands: Any = next(action for action in parser._actions if action.dest == "command")
    for name in ("train", "evaluate"):
        ours = [text for action in commands.choices[name]._actions for text in action.option_strings]
        for text in set(ours) - {"-h", "--help"}:
            assert text.startswith("--"), f"{name} {text}"
            assert not [other for other in theirs if other.startswith(text)], f"{name} {text}"


def test_torchrun_starts_the_same_entry(repository):
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            *f"--nproc-per-node 1 -m pipeline config {CONFIG} gate.lam=0.25".split(),
        ],
        cwd=repository,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "lam: 0.25" in done.stdout
