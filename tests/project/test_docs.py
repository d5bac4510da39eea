"""README and docs/: every command parses, every named file and option exists, generated pages are current."""

from __future__ import annotations

import argparse
import errno
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.cli import build_parser
from pipeline.config import describe
from pipeline.config.reference import render
from pipeline.config.yaml_file import parse_value
from pipeline.tuning.grid import OVERRIDABLE

ROOT = Path(__file__).parents[2]
# The changelog names what there was at the time.
PAGES = sorted({*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")} - {ROOT / "CHANGELOG.md"})
_FENCE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```", flags=re.DOTALL | re.MULTILINE)
_SHELL = {"", "sh", "bash", "shell", "console"}
# Words in place of a value, as in `CONFIG [key=value ...]`.
_PLACES = {"CONFIG": "configs/own_data.yaml", "GRID": "configs/grids/own_data.yaml"}


def fenced(page: Path) -> list[str]:
    """The lines of all shell blocks of a page; a backslash at the end joins two lines."""
    text = "".join(block for language, block in _FENCE.findall(page.read_text(encoding="utf-8")) if language in _SHELL)
    return [str(line) for line in text.replace("\\\n", " ").splitlines()]


def inline(page: Path) -> list[str]:
    """Commands between single backticks in the running text."""
    text = _FENCE.sub("", page.read_text(encoding="utf-8"))
    return re.findall(r"`(selora [a-z]+[^`]*)`", text)


def selora_words(line: str) -> list[str] | None:
    """The arguments of selora in a line of shell, whichever launcher starts it; None for another command."""
    try:
        words = shlex.split(line, comments=True)
    except ValueError:
        return None
    for start, word in enumerate(words):
        if word == "selora" or words[start : start + 3][:2] == ["-m", "pipeline"] or word.endswith("/selora"):
            begin = start + (2 if word == "-m" else 1)
            end = next((i for i, each in enumerate(words) if i >= begin and each in ("&&", "|", ";", "&")), len(words))
            return words[begin:end]
        if word in ("docker", "make", "kubectl", "git", "ray", "sbatch", "cp", "mlflow", "pip", "uv"):
            return None
    return None


COMMANDS = [
    pytest.param(page, line, id=f"{page.relative_to(ROOT)}: {line.strip()[:50]}")
    for page in PAGES
    for line in fenced(page)
    if selora_words(line) and "…" not in line and "..." not in line
]


def options_of(command: str) -> set[str] | None:
    """The options of a command, None if there is no such command."""
    [commands] = [each for each in build_parser()._actions if isinstance(each, argparse._SubParsersAction)]
    parser = commands.choices.get(command)
    return None if parser is None else {option for action in parser._actions for option in action.option_strings}


@pytest.mark.parametrize(("page", "line"), COMMANDS)
def test_commands_are_ones_that_selora_takes(page: Path, line: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = selora_words(line)
    assert words is not None
    words = [_PLACES.get(word, word) for word in words]
    if words[-1] in ("--help", "--version") or words[:3] == ["pack", "--dataset", "list"]:
        with pytest.raises(SystemExit) as left:
            build_parser().parse_args(words)
        assert left.value.code == 0, capsys.readouterr().err
        return
    late = [word for word in words if re.match(r"[a-z][a-z_.]*=", word) and "--rule" not in words]
    try:
        arguments = build_parser().parse_args([word for word in words if word not in late])
    except SystemExit:
        pytest.fail(f"{page.name}: {line}\n{capsys.readouterr().err}")
    known = describe().keys() | (set(OVERRIDABLE) if words[0] == "sweep" else set())
    unknown = {word.partition("=")[0] for word in late} - known
    assert not unknown, f"{page.name}: {line}: no option {', '.join(unknown)}"
    assert not late or hasattr(arguments, "overrides"), f"{page.name}: {line}: the command takes no key=value"
    for word in late:
        parse_value(word.partition("=")[2])
    for name in ("config", "grid"):
        file = getattr(arguments, name, None)
        if file is not None and str(file).startswith("configs/"):
            assert (ROOT / file).is_file(), f"{page.name}: {line}: no file {file}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_in_the_text_have_their_options(page: Path) -> None:
    """`selora evaluate --strength` in a sentence names a command and options, without all of its arguments."""
    for text in inline(page):
        _, command, *rest = text.split()
        known = options_of(command)
        assert known is not None, f"{page.name}: no command {command}"
        assert {word for word in rest if word.startswith("--")} <= known, f"{page.name}: {text}"


def test_enough_commands_were_found() -> None:
    """A change of the fences would silence the test above."""
    assert len(COMMANDS) > 40
    pages = [param.values[0] for param in COMMANDS]
    assert {"README.md", "quick-start.md", "paper.md", "mlflow.md"} <= {
        page.name for page in pages if isinstance(page, Path)
    }


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_files_and_options_that_a_page_names_exist(page: Path) -> None:
    """`configs/x.yaml`, `pipeline/x.py`, `launch/x` and `section.option=value` in code."""
    text = page.read_text(encoding="utf-8")
    files = re.findall(
        r"(?<![\w/.-])((?:configs|launch|docker|pipeline|tests|docs)/[\w./-]+\.(?:yaml|py|md|sh|sbatch))", text
    )
    base = {ROOT / file for file in files}
    assert not sorted(str(path.relative_to(ROOT)) for path in base if not path.exists() and path.name != "secrets.yaml")
    sections = {key.partition(".")[0] for key in describe() if "." in key}
    named = re.findall(rf"`((?:{'|'.join(sections)})\.(?!yaml)[a-z_]+)(?:[=`])", text)
    assert not set(named) - describe().keys()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_make_targets_that_a_page_names_exist(page: Path) -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"(?:^|`)make ([a-z][a-z-]*)", page.read_text(encoding="utf-8"), flags=re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), f"{page.name}: make {target}"


def test_options_page_is_what_the_sections_say() -> None:
    """If this fails: `python -m pipeline.config.reference > docs/options.md`."""
    assert (ROOT / "docs" / "options.md").read_text(encoding="utf-8") == render()


def test_readme_fits_a_screen_and_a_reader() -> None:
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 150
    assert max(len(line) for line in lines) <= 120
    first = "\n".join(lines[:45])
    assert "make demo" in first
    assert "make test" in first
    assert "![" in first


def test_troubleshooting_lists_real_messages() -> None:
    """Each heading quotes a part of a message; the words around `…` must be in the source, or be the system's own."""
    page = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    source = " ".join(path.read_text(encoding="utf-8") for path in (ROOT / "pipeline").rglob("*.py"))
    source = re.sub(r'"\s*\n\s*f?"', "", source) + " ".join(os.strerror(number) for number in errno.errorcode)
    missing = [
        part
        for heading in re.findall(r"^### (`.*)$", page, flags=re.MULTILINE)
        for quoted in re.findall(r"`([^`]+)`", heading.partition(" for ")[0])
        for part in re.split(r"…", quoted)
        if len(part.strip(" ;:,")) > 3 and part.strip(" ;:,") not in source
    ]
    assert not missing


def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")],
        cwd=ROOT,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "site" / "options" / "index.html").is_file()
