"""Plain English in code, help and documentation: phrases that readers must decode are refused."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

# A pattern and what to write instead.
FORBIDDEN = {
    r"\bshall\b": "must, is to, or the plain verb",
    r"\bhas not got\b|\bhave not got\b": "does not have",
    r"\bstands? in for\b": "replaces",
    r"\bstands beside\b|\bstands alone\b|\bas (it|they) stands?\b": "is, is alone, unchanged",
    r"\bspeaks\b|\bspoken\b": "a verb that says what is done",
    r"\bbeside\b": "next to, with, alongside, in addition to",
    r"(?<!there )\bis no (?!longer\b|better\b)[a-z]": "is not a",
    r"\blies?\b(?! ahead)": "is",
    r"\bwhosesoever\b|\bso-manieth\b": "whose, the n-th",
    r"\bsomebody\b|\beverybody\b": "the process, each rank",
    r", too(?=[.,;:)\"]|$)": "also",
    r"^\W*That of\b|^\W*Those of\b": "start with the subject",
    r"\bnotes? \d+\.\d": "cite the paper",
    r"\b(told|asked|said)\b(?! apart)": "reported, requested; a plain noun for a variable",
    r"\b(None|empty|ConfigError|nothing) where\b": "if",
    r", for (it|they|there|no|none|that)\b": "because",
    r"\ba (line|caption|sentence|path|name|text|thread|value) a [a-z]+": "one per line",
    r"\bhand(s|ed)? (on|out)\b|\bdealt out\b": "pass, export, distribute",
    r"\bgoes on\b|\bwent on\b": "continues",
    r"\bbroke(n)? off\b": "interrupted",
    r"\blook(s|ed)? over\b": "review, check",
    r"\bso many\b": "this many",
    r"\banew\b": "again",
    r"\bnobody\b|\banybody\b": "no process, anyone",
    r"\brule of promotion\b": "promotion rule",
}
WORDS = re.compile("|".join(f"(?:{pattern})" for pattern in FORBIDDEN), re.IGNORECASE | re.MULTILINE)
PAGES = ("README", "CHANGELOG", "CONTRIBUTING", "SECURITY")
# Variables of code that are called like a forbidden word, and texts by others.
CODE = re.compile(
    r"\b(beside|everybody)\b(?=[\[ ]*(=|\.|\(|:|\)|,|\[|else|if|$))|in everybody\b|join\(beside\)|and beside\b"
)
PLACES = ("pipeline", "docs", "launch", "docker", "configs", *(f"{page}.md" for page in PAGES))
NOT_OURS = ("pipeline/data/reference", "pipeline/demo/LICENCES.md")


def texts(repository: Path) -> Iterator[tuple[Path, str]]:
    for place in PLACES:
        top = repository / place
        for path in [top] if top.is_file() else sorted(top.rglob("*")):
            name = str(path.relative_to(repository))
            if path.suffix in (".py", ".md", ".sh", ".sbatch", ".yaml") and not name.startswith(NOT_OURS):
                yield path.relative_to(repository), path.read_text(encoding="utf-8")


def test_no_text_has_a_phrase_to_decode(repository: Path) -> None:
    found = []
    for path, text in texts(repository):
        for number, line in enumerate(text.splitlines(), 1):
            hits = [hit[0] for hit in WORDS.finditer(CODE.sub("", line))]
            found += [f"{path}:{number}: {hit!r}" for hit in hits]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    "line",
    [
        "The file that shall be read",
        "it is told to stop",
        "a run is no model",
        "the tar lies there",
        "it, too.",
        "None where there is no file",
        "one step more, for it is known",
        "a caption a line",
        "the run goes on",
        "a download that broke off",
    ],
)
def test_such_phrases_are_found(line: str) -> None:
    assert WORDS.search(line)


def test_idioms_are_not_refused() -> None:
    assert not WORDS.search("it is no longer there, no better than guessing; runs told apart, two lines")
