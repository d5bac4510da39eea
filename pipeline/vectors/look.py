"""`selora inspect --with MODEL`: embed the images of a labelled set, review them, and show the findings."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.config import ConfigError
from pipeline.data.sheet import figure, write_page
from pipeline.data.sources.sample import Sample, Source
from pipeline.vectors.embed import Say, embed
from pipeline.vectors.embedder import Embedder
from pipeline.vectors.items import Item
from pipeline.vectors.review import Review, review
from pipeline.vectors.store import read_vectors

# Groups and images on a page, and lines of each kind in the terminal.
ON_PAGE, IN_TERMINAL, OF_A_GROUP = 120, 10, 6


@dataclass(frozen=True)
class Look:
    """A review and its images."""

    found: Review
    samples: list[Sample]
    classes: list[str]
    left_out: dict[str, str]

    def __str__(self) -> str:
        found = self.found
        copies = sum(len(group) - 1 for group in found.duplicates)
        lines = [f"{len(found.duplicates)} groups of near-duplicates, {copies} redundant images"]
        lines += [f"  {', '.join(self.samples[i].name for i in group)}" for group in found.duplicates[:IN_TERMINAL]]
        if len(self.classes) > 1:
            lines.append(f"{len(found.suspects)} images whose neighbours have another label")
            lines += [
                f"  {self.samples[each.image].name}: {self.classes[each.label]}, its neighbours "
                f"{self.classes[each.other]} ({100 * each.other_share:.0f} %)"
                for each in found.suspects[:IN_TERMINAL]
            ]
            lines.append(f"{len(found.overlaps)} pairs of classes that overlap")
            lines += [
                f"  {self.classes[each.first]} and {self.classes[each.second]}: {100 * each.share:.0f} % of the images"
                for each in found.overlaps[:IN_TERMINAL]
            ]
        lines += [f"left out: {name}: {fault}" for name, fault in list(self.left_out.items())[:IN_TERMINAL]]
        return "\n".join(lines)

    def as_json(self) -> dict[str, object]:
        """All findings, by the names of images and classes."""
        return self.found.as_json([sample.name for sample in self.samples], self.classes)

    def write_page(self, file: Path, title: str) -> None:
        """Write a page of the findings with their images, at most 120 of each kind."""
        counts = f"{len(self.found.duplicates)} groups of near-duplicates, {len(self.found.suspects)} doubtful labels"
        text = f"{len(self.samples)} images: {counts}, {len(self.found.overlaps)} pairs of classes that overlap."
        write_page(file, title, text, self._sections())

    def _sections(self) -> Iterator[tuple[str, Sequence[str]]]:
        suspects = self.found.suspects[:ON_PAGE]
        doubtful = [self._doubtful(each.image, each.label, each.other) for each in suspects]
        yield f"Labels that the neighbours contradict: {len(suspects)} of {len(self.found.suspects)}", doubtful
        for each in self.found.overlaps[:ON_PAGE]:
            names = f"{self.classes[each.first]} and {self.classes[each.second]}"
            both = [i for i, sample in enumerate(self.samples) if sample.cls in (each.first, each.second)]
            shown = both[:: max(1, len(both) // OF_A_GROUP)][:OF_A_GROUP]
            yield f"{names} overlap: {100 * each.share:.0f} % of their images", [self._labelled(i) for i in shown]
        for number, group in enumerate(self.found.duplicates[:ON_PAGE], 1):
            yield f"Near-duplicates {number}: {len(group)} images", [self._labelled(i) for i in group[:OF_A_GROUP]]

    def _doubtful(self, image: int, label: int, other: int) -> str:
        return figure(self.samples[image], f"{self.classes[label]}? neighbours: {self.classes[other]}")

    def _labelled(self, image: int) -> str:
        sample = self.samples[image]
        return figure(sample, "" if sample.cls is None else self.classes[sample.cls])


def look_over(
    source: Source, embedder: Embedder, duplicate: float, *, batch_size: int = 64, say: Say | None = None
) -> Look:
    """Embed the images of a source and review them.

    Args:
        source: a source with labels; without labels it is searched only for near-duplicates.
        embedder: the model.
        duplicate: cosine from which two images are near-duplicates.
        batch_size: number of images per forward.
        say: called with lines of progress.

    Raises:
        ConfigError: there are fewer than two images, or none can be read.
    """
    if len(source.samples) < 2:
        raise ConfigError(f"{source.path}: has {len(source.samples)} images, but at least two are needed")
    items = [Item(str(number), sample.image) for number, sample in enumerate(source.samples)]
    with tempfile.TemporaryDirectory(prefix="selora-") as folder:
        file = Path(folder) / "images.npy"
        done = embed(embedder, items, "images", file, batch_size=batch_size, say=say)
        found = read_vectors(file)
    samples = [source.samples[int(key)] for key in found.keys]
    left_out = {source.samples[int(key)].name: fault for key, fault in done.left_out.items()}
    classes = list(source.classes or ())
    reviewed = review(found.vectors, [sample.cls for sample in samples], len(classes), duplicate)
    return Look(reviewed, samples, classes, left_out)
