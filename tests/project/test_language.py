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
    r"\b(is|are) told\b(?! apart)": "gets, is reported, is recorded",
    r"\bbeside\b": "next to, with, alongside, in addition to",
    r"(?<!there )\bis no (?!longer\b|better\b)[a-z]": "is not a",
    r"\blies?\b(?! ahead)": "is",
    r"\bwhosesoever\b|\bso-manieth\b": "whose, the n-th",
    r"\bsomebody\b|\beverybody\b": "the process, each rank",
    r", too(?=[.,;:)\"]|$)": "also",
    r"^\W*That of\b|^\W*Those of\b": "start with the subject",
    r"\bnotes? \d+\.\d": "cite the paper",
}
WORDS = re.compile("|".join(f"(?:{pattern})" for pattern in FORBIDDEN), re.IGNORECASE | re.MULTILINE)
# Variables of code that are called like a forbidden word, and texts by others.
CODE = re.compile(
    r"\b(beside|everybody)\b(?=[\[ ]*(=|\.|\(|:|\)|,|\[|else|if|$))|in everybody\b|join\(beside\)|and beside\b"
)
NOT_OURS = ("pipeline/data/reference", "pipeline/demo/LICENCES.md")


def texts(repository: Path) -> Iterator[tuple[Path, str]]:
    for place in ("pipeline", "docs", "launch", "docker", "configs", "README.md", "CONTRIBUTING.md", "SECURITY.md"):
        top = repository / place
        for path in [top] if top.is_file() else sorted(top.rglob("*")):
            name = str(path.relative_to(repository))
            if path.suffix in (".py", ".md", ".sh", ".slurm", ".yaml") and not name.startswith(NOT_OURS):
                yield path.relative_to(repository), path.read_text(encoding="utf-8")


def test_no_text_has_a_phrase_to_decode(repository: Path) -> None:
    found = []
    for path, text in texts(repository):
        for number, line in enumerate(text.splitlines(), 1):
            hits = [hit[0] for hit in WORDS.finditer(CODE.sub("", line))]
            found += [f"{path}:{number}: {hit!r}" for hit in hits]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    "line", ["The file that shall be read", "it is told to stop", "a run is no model", "the tar lies there", "it, too."]
)
def test_such_phrases_are_found(line: str) -> None:
    assert WORDS.search(line)


def test_idioms_are_not_refused() -> None:
    assert not WORDS.search("it is no longer there, no better than guessing; runs told apart, two lines")
