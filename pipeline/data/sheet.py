"""A contact sheet: a few images of a source with their classes or captions, as the model will see them."""

from __future__ import annotations

import base64
import io
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from html import escape
from pathlib import Path

from torchvision.transforms.v2.functional import to_pil_image

from pipeline.config import ConfigError
from pipeline.data.images import BadImageError, decode, eval_resize
from pipeline.data.sources.sample import Sample, Source

# Images on a sheet per class, and in all if there are captions only; and their size in pixels.
MOST, OF_A_CLASS, CAPTIONED, SIZE = 400, 4, 60, 224
_STYLE = """
:root{color-scheme:light dark}
body{font:15px/1.45 system-ui,sans-serif;margin:2rem auto;max-width:75rem;padding:0 1rem}
h1,h2{overflow-wrap:anywhere}h1{font-size:1.35rem}h2{font-size:1rem;margin:1.6rem 0 .5rem}
.row{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(10rem,46%),1fr));gap:.8rem}
figure{margin:0;max-width:12rem}img,.bad{width:100%;aspect-ratio:1;border-radius:.3rem;display:block}
.bad{background:#b3261e22;padding:.6rem;box-sizing:border-box;overflow:auto}
figcaption{font-size:.8rem;overflow-wrap:anywhere}small{opacity:.65}
"""


def write_sheet(source: Source, file: Path) -> int:
    """Write a self-contained HTML page, and return the number of its images.

    Images are upright, resized and centre-cropped as in evaluation, to 224 x 224 pixels.

    Args:
        source: The source: up to 4 images of each class, or 60 with their captions.
        file: The page.

    Returns:
        The number of images on the page.

    Raises:
        ConfigError: When the file cannot be written.
    """
    groups = list(_groups(source))
    shown = sum(len(samples) for _, samples in groups)
    title = f"{source.path.name}: {shown} of {len(source.samples)} images"
    sections = [(each, [figure(sample) for sample in samples]) for each, samples in groups]
    write_page(file, title, "As the model sees them: upright, resized and centre-cropped.", sections)
    return shown


def write_page(file: Path, title: str, text: str, sections: Iterable[tuple[str, Sequence[str]]]) -> None:
    """Write a self-contained HTML page of figures below headings.

    Args:
        file: The page.
        title: Its title.
        text: A line below the title.
        sections: A heading, and figures made by `figure`.

    Raises:
        ConfigError: When the file cannot be written.
    """
    rows = (f'<h2>{escape(name)}</h2><div class="row">{"".join(figures)}</div>' for name, figures in sections)
    page = (
        f'<!doctype html><html lang="en"><meta charset="utf-8">'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><title>{escape(title)}</title>'
        f"<style>{_STYLE}</style><h1>{escape(title)}</h1><p>{escape(text)}</p>{''.join(rows)}</html>\n"
    )
    try:
        file.write_text(page, encoding="utf-8", errors="backslashreplace")
    except OSError as error:
        raise ConfigError(f"--sheet {file}: {error.strerror}; give a file in a folder that exists") from error


def _groups(source: Source) -> Iterator[tuple[str, list[Sample]]]:
    """A title, and the samples below it."""
    if source.classes is None:
        yield "captions", _spread(source.samples, CAPTIONED)
        return
    of_class: dict[int | None, list[Sample]] = defaultdict(list)
    for sample in source.samples:
        of_class[sample.cls].append(sample)
    each = max(1, min(OF_A_CLASS, MOST // len(source.classes)))
    for label in _spread(range(len(source.classes)), MOST):
        folder = source.folders[label] if source.folders else ""
        written = f" (folder {folder})" if folder and folder != source.classes[label] else ""
        title = f"{label}: {source.classes[label]}{written}, {len(of_class[label])} images"
        yield title, _spread(of_class[label], each)


def _spread(items: Sequence, count: int) -> list:
    """At most ``count`` of the items, evenly spread."""
    count = min(count, len(items))
    return [items[i * len(items) // count] for i in range(count)]


def figure(sample: Sample, note: str = "") -> str:
    """A sample as the model sees it, with a note or its captions, and its name."""
    try:
        pixels = eval_resize(decode(sample.image.read_bytes(), form="reference"), {"size": SIZE})
        out = io.BytesIO()
        to_pil_image(pixels).save(out, "JPEG", quality=85)
        image = f'<img alt="" src="data:image/jpeg;base64,{base64.b64encode(out.getvalue()).decode()}">'
    except (BadImageError, OSError) as error:
        image = f'<div class="bad">left out: {escape(str(error))}</div>'
    captions = escape(note) or "<br>".join(escape(caption) for caption in sample.captions[:5])
    return f"<figure>{image}<figcaption>{captions} <small>{escape(sample.name)}</small></figcaption></figure>"
