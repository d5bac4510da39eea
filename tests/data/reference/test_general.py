"""The sentences that ship with the package, and the program that wrote them."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

import pytest
from open_clip import get_tokenizer
from requirements import lacking

from pipeline.data.reference.general import sentences

WORDNET = Path("/usr/share/wordnet")


@pytest.fixture(scope="module")
def shipped() -> list[str]:
    return resources.files("pipeline.data.reference").joinpath("general.txt").read_text(encoding="utf-8").splitlines()


def test_there_are_thousands_of_different_sentences(shipped: list[str]) -> None:
    assert 2000 <= len(shipped) <= 4000
    assert len(set(shipped)) == len(shipped)
    assert all(text and text == text.strip() and text.isascii() for text in shipped)


def test_every_sentence_fits_into_a_short_context(shipped: list[str]) -> None:
    """The demo's CLIP reads 16 tokens; at most one sentence in twenty may lose its end there."""
    tokens = get_tokenizer("ViT-B-16")(shipped)
    lengths = (tokens != 0).sum(1)
    assert int(lengths.max()) <= 32
    assert float((lengths > 18).float().mean()) < 0.05


def test_the_file_is_what_the_program_writes(shipped: list[str]) -> None:
    if not (WORDNET / "cntlist.rev").exists():
        lacking("wordnet", "not installed (Debian: wordnet-base)")
    assert sentences(WORDNET) == shipped
