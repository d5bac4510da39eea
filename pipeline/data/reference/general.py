"""Writes general.txt: short captions over everyday nouns of WordNet, most frequent first.

    python -m pipeline.data.reference.general /usr/share/wordnet > pipeline/data/reference/general.txt

The nouns are chosen only by WordNet's sense counts, so no class name of an evaluated dataset is in the list
intentionally. Every draw follows from the noun itself, so the same WordNet gives the same file.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from pipeline.data.order import stable_hash

# WordNet's lexicographer files, and the number of most frequent nouns taken from each.
_CATEGORIES = {"animal": (5, 130), "thing": (6, 560), "food": (13, 130), "place": (17, 90), "plant": (20, 80)}
_PEOPLE = (
    "man woman boy girl child baby family couple crowd friend student teacher doctor nurse farmer worker cook waiter "
    "soldier artist singer dancer musician painter writer driver pilot sailor fisherman police_officer firefighter "
    "player runner swimmer cyclist tourist neighbor grandmother grandfather shopkeeper engineer scientist"
).split()
_SCENES = (
    "in a kitchen|in a garden|on a street|on a beach|in a forest|in front of a house|on a table|by a river|in a park|"
    "in a shop|at a market|in a field|under a tree|near a window|on a wooden floor|in a city|at night|in the rain|"
    "in the snow|on a sunny day|at sunset|in a museum|at a station|on a bridge|in a small room|against a white wall"
).split("|")
_LOOKS = (
    "red blue green yellow white black brown grey orange small large old new broken wooden wet dusty shiny empty round "
    "tall colorful plain striped bright dark"
).split()
_PLAIN = (
    "a photo of {a}.|a picture of {a} {scene}.|a {look} {n} {scene}.|a close-up of {a}.|a drawing of {a}.|"
    "{people} looking at {a}.|{a} and {b} {scene}.|a painting of {a} {scene}.|a black and white photo of {a}.|"
    "a blurry photo of a {look} {n}.|{people} with {a} {scene}.|a sketch of a {look} {n}.|{a} next to {b}.|"
    "two pictures of {a}.|a {look} {n} and a {look2} {m}.|a photo of the {n} {scene}.|a toy {n}.|a sign with {a} on it."
).split("|")
_FOOD = (
    "a photo of {n}.|{n} on a plate.|{people} eating {n} {scene}.|{n} for sale at a market.|a bowl with {n}.|"
    "{n} and {m} on a table.|a drawing of {n}.|a recipe with {n}.|a close-up of {n}."
).split("|")
# Frequent in WordNet's corpus of the 1960s, but rarely seen in photos.
_LEFT_OUT = frozenset(
    "female male young human_being bitch cocotte anode anion cation thermocouple micelle electron ion fragment agent "
    "cell drug andrena universe buckskin product device facility surface cannabis brothel whorehouse noose gallows "
    "concentration_camp gas_chamber unit_cell agglomerate folio condom".split()
)
SENTENCES_PER_NOUN = 3
_LONGEST_WORDS = 14


def sentences(wordnet: Path) -> list[str]:
    """All sentences, each once, from WordNet's dictionary directory (with cntlist.rev and data.noun)."""
    nouns = {kind: _frequent(wordnet, file, most) for kind, (file, most) in _CATEGORIES.items()}
    common = [noun for kind in ("animal", "thing", "place", "plant") for noun in nouns[kind]]
    found: dict[str, None] = {}
    for kind, words in nouns.items():
        others, patterns = (words, _FOOD) if kind == "food" else (common, _PLAIN)
        for noun in words:
            found.update(dict.fromkeys(_about(noun, others, patterns)))
    for person in _PEOPLE:
        found.update(dict.fromkeys(_about(person, common, _PLAIN)))
    return [text for text in found if len(text.split()) <= _LONGEST_WORDS]


def _frequent(wordnet: Path, file: int, most: int) -> list[str]:
    """Nouns whose first and main sense is in lexicographer file `file`, most frequent first."""
    counts: dict[str, dict[int, tuple[int, int]]] = {}
    for line in (wordnet / "cntlist.rev").read_text(encoding="ascii").splitlines():
        key, number, count = line.split()
        lemma, _, sense = key.partition("%")
        kind, lexicographer = sense.split(":")[:2]
        if kind == "1":
            counts.setdefault(lemma, {})[int(number)] = (int(lexicographer), int(count))
    common = _common_nouns(wordnet)
    chosen = [
        (senses[1][1], lemma)
        for lemma, senses in counts.items()
        if lemma in common
        and 1 in senses
        and senses[1][0] == file
        and 2 * senses[1][1] >= sum(c for _, c in senses.values())
    ]
    return [lemma.replace("_", " ") for _, lemma in sorted(chosen, key=lambda pair: (-pair[0], pair[1]))[:most]]


def _common_nouns(wordnet: Path) -> set[str]:
    """Lemmas in lower case, which excludes names of persons, peoples and places. One or two words."""
    found = set()
    for line in (wordnet / "data.noun").read_text(encoding="ascii").splitlines():
        if not line.startswith(" "):
            fields = line.split()
            found.update(fields[4 : 4 + 2 * int(fields[3], 16) : 2])
    return {lemma for lemma in found if re.fullmatch(r"[a-z]{3,}(_[a-z]{3,})?", lemma)}


def _about(noun: str, others: Sequence[str], patterns: Sequence[str]) -> Iterator[str]:
    noun = noun.replace("_", " ")
    start = stable_hash("pattern", noun)
    for turn in range(SENTENCES_PER_NOUN):
        other = _draw(others, "other", noun, turn)
        pattern = patterns[(start + turn * 7) % len(patterns)]
        text = pattern.format(
            n=noun,
            m=other,
            a=_with_article(noun),
            b=_with_article(other),
            people=_with_article(_draw(_PEOPLE, "people", noun, turn).replace("_", " ")),
            scene=_draw(_SCENES, "scene", noun, turn),
            look=_draw(_LOOKS, "look", noun, turn),
            look2=_draw(_LOOKS, "look2", noun, turn),
        )
        yield re.sub(r"\ba (?=[aeio])", "an ", text)


def _draw(choices: Sequence[str], *what: str | int) -> str:
    return choices[stable_hash(*what) % len(choices)]


def _with_article(noun: str) -> str:
    plural = noun.endswith("s") and not noun.endswith(("ss", "us", "is"))
    return f"some {noun}" if plural else f"a {noun}"


if __name__ == "__main__":
    sys.stdout.write("\n".join(sentences(Path(sys.argv[1]))) + "\n")
