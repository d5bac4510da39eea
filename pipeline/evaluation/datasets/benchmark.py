"""The datasets of a benchmark as one table: a row gives a dataset's place, its scoring and its group.

    name: mine
    root: shards                  # optional, relative to this file; the paths below are relative to it
    include: paper                # optional; a shipped benchmark or a file, whose rows come first
    mode: paper                   # optional; wds: class names and templates as shipped, no scoring options of a row
    sample: 1000                  # optional; at most this many images of each dataset, drawn by `seed`
    images: {stl10: 800}          # optional; replaces the counts in the rows, for a deliberate part of a dataset
    datasets:
      - {key: clothing, group: id, path: wds_clothing}
      - {key: imagenet-a, group: shift, path: wds_imagenet-a, classnames: imagenet, subset: [6, 11, 13]}
      - {key: flickr30k, group: retrieval, path: wds_flickr30k}
      - {key: imagenet100, group: source, path: wds_imagenet100}    # K-NN with its split train as the bank
      - {key: cifar10, like: paper, group: id}    # the row of this key in another benchmark, with changes

To add a dataset, add a row; no code names a dataset. rows.py lists the fields of a row. `base: other.yaml` inherits, as
in every other YAML file. `configs/benchmark` holds the shipped benchmarks, which take their root from the caller.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, get_args

from pydantic import ValidationError

from pipeline.config import ConfigError
from pipeline.config.errors import Raw
from pipeline.config.text_file import lines_of, read_text
from pipeline.config.yaml_file import read_chain
from pipeline.data.storage.remote import is_remote
from pipeline.evaluation.datasets.rows import GROUPS, Mode, Part, Row
from pipeline.prompts import resolve_templates

__all__ = ["GROUPS", "Benchmark", "Row", "load_benchmark", "shipped_benchmarks"]

KEYS = ("name", "root", "include", "mode", "sample", "seed", "datasets")
COUNTS = "images."
_PUBLISHED = {"published", "published_wds", "published_of"}
_PACKAGE = Path(__file__).parents[2]


@dataclass(frozen=True)
class Benchmark:
    """The rows, in the order of the file."""

    name: str
    rows: tuple[Row, ...]

    def choose(self, keys: Sequence[str] | None) -> Benchmark:
        """Only the named datasets; ConfigError with near names for an unknown one."""
        if keys is None:
            return self
        known = [row.key for row in self.rows]
        faults = [_unknown("datasets", key, known) for key in keys if key not in known]
        if faults:
            raise ConfigError("\n".join(faults))
        return Benchmark(self.name, tuple(row for row in self.rows if row.key in keys))

    def part(self, part: Part) -> Benchmark:
        """The same datasets, restricted to a part of their images."""
        return Benchmark(self.name, tuple(row.model_copy(update={"part": part}) for row in self.rows))

    def without(self, keys: Collection[str]) -> Benchmark:
        """All but the named datasets."""
        return Benchmark(self.name, tuple(row for row in self.rows if row.key not in keys))

    def check_paths(self) -> None:
        """Raise one ConfigError that lists every dataset whose directory is not there."""
        missing = [f"{row.key}: no directory {row.path}" for row in self.rows if not is_there(row)]
        if missing:
            raise ConfigError(_listed(f"benchmark {self.name}: {len(missing)} datasets are missing", missing))


def is_there(row: Row) -> bool:
    """Whether a row's directory exists; a URL is checked when it is opened."""
    return not isinstance(row.path, Path) or row.path.is_dir()


def shipped_benchmarks() -> dict[str, Path]:
    """{name: file} of the benchmarks that can be named without a path."""
    files = {file.stem: file for file in sorted(_shipped_folder().glob("*.yaml"))}
    return files | {"demo": _PACKAGE / "demo" / "assets" / "benchmark.yaml"}


def _shipped_folder() -> Path:
    # In a wheel the configs are inside the package, in a checkout next to it.
    packaged = _PACKAGE / "configs"
    return (packaged if packaged.is_dir() else _PACKAGE.parent / "configs") / "benchmark"


def load_benchmark(name: str | Path, root: str | Path | None = None) -> Benchmark:
    """Read a shipped benchmark by name, or a file. `root`: place of the data, instead of the file's own root.

    All faults come in one ConfigError.
    """
    path = _find(name)
    content = read_chain(path)
    counts = {key.removeprefix(COUNTS): raw.value for key, raw in content.items() if key.startswith(COUNTS)}
    faults = [
        f"unknown key {key!r}" for key in sorted(content) if key not in KEYS and key.removeprefix(COUNTS) not in counts
    ]
    values = {key: raw.value for key, raw in content.items()}
    entries = values.get("datasets", [])
    if not isinstance(entries, list) or not (entries or values.get("include")):
        raise ConfigError(_listed(f"{path}: faults", [*faults, "`datasets` must be a list with at least one row"]))
    place = _root(path, content, root, needed=bool(entries))
    rows, problems = _read_rows(entries, path.absolute().parent, place)
    included = _included(values.get("include"), path, place)
    rows, changes = _changed([*included, *rows], values, counts)
    faults += [*problems, *changes, *_repeats(rows)]
    if faults:
        raise ConfigError(_listed(f"{path}: {len(faults)} faults", faults))
    return Benchmark(str(values.get("name", path.stem)), tuple(rows))


def needs_root(name: str | Path) -> bool:
    """Whether a benchmark's file leaves the place of its datasets to the caller."""
    path = _find(name)
    return path.resolve().parent == _shipped_folder().resolve() and "root" not in read_chain(path)


def _find(name: str | Path) -> Path:
    path, shipped = Path(name), shipped_benchmarks()
    if path.is_file() or str(name) not in shipped:
        if not path.is_file() and path.parent == Path() and not path.suffix:
            raise ConfigError(f"benchmark: {str(name)!r} is neither a file nor one of {', '.join(shipped)}")
        return path
    return shipped[str(name)]


def _root(path: Path, content: Mapping[str, Raw], root: str | Path | None, *, needed: bool) -> str | Path | None:
    """The folder that the rows' paths are relative to; None if the file names none and has no rows of its own."""
    if root is not None:
        return root if is_remote(root) else Path(root).expanduser().absolute()
    if "root" in content:
        written = os.path.expandvars(str(content["root"].value))
        return written if is_remote(written) else path.absolute().parent / Path(written).expanduser()
    if path.resolve().parent == _shipped_folder().resolve() and needed:
        raise ConfigError(f"benchmark {path.stem}: name the directory of its datasets: --root DIR on the command line")
    return path.absolute().parent if needed else None


def _included(include: Any, path: Path, root: str | Path | None) -> list[Row]:
    rows: list[Row] = []
    for name in [] if include is None else include if isinstance(include, list) else [include]:
        if not isinstance(name, str):
            raise ConfigError(f"{path}: include should name a benchmark or a file, got {name!r}")
        rows += _other(name, path.absolute().parent, root).rows
    return rows


def _other(name: str, folder: Path, root: str | Path | None) -> Benchmark:
    near = folder / name
    return load_benchmark(near if near.is_file() else name, root)


def _like(name: Any, changes: dict[str, Any], folder: Path, root: str | Path | None) -> dict[str, Any]:
    """The row with the same key in another benchmark, with `changes`. Published numbers belong to the unchanged row."""
    if not isinstance(name, str):
        raise ConfigError(f"like: should name a benchmark or a file, got {name!r}")
    rows = {row.key: row for row in _other(name, folder, root).rows}
    key = changes.get("key")
    if key not in rows:
        raise ConfigError(_unknown(f"like: {name}", str(key), list(rows)))
    return rows[key].model_dump(exclude_unset=True, exclude=_PUBLISHED) | changes


def _read_rows(entries: list[Any], folder: Path, root: str | Path | None) -> tuple[list[Row], list[str]]:
    rows, faults = [], []
    for number, entry in enumerate(entries, start=1):
        row, problems = _read_row(entry, folder, root)
        label = entry["key"] if isinstance(entry, dict) and "key" in entry else f"number {number}"
        faults += [f"row {label}: {problem}" for problem in problems]
        rows += [row] if row is not None else []
    return rows, faults


def _changed(rows: list[Row], values: Mapping[str, Any], counts: Mapping[str, Any]) -> tuple[list[Row], list[str]]:
    """The rows with the file's settings for all of them."""
    faults = []
    mode = values.get("mode", "paper")
    if mode not in get_args(Mode):
        faults.append(f"mode: {mode!r} is none of {', '.join(get_args(Mode))}")
    for key in ("sample", "seed"):
        value = values.get(key)
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < (key == "sample")):
            faults.append(f"{key}: {value!r} should be a whole number{' above 0' if key == 'sample' else ''}")
    known = [row.key for row in rows]
    faults += [_unknown("images", key, known) for key in counts if key not in known]
    faults += [f"images.{key}: {n!r} is not a count" for key, n in counts.items() if not isinstance(n, int) or n < 1]
    everywhere = {key: values[key] for key in ("sample", "seed") if values.get(key) is not None}
    changed = [
        row.model_copy(
            update=everywhere
            | ({"images": counts[row.key], "texts": None, "bank_images": None} if row.key in counts else {})
        )
        for row in rows
    ]
    return [row.as_shipped() if mode == "wds" else row for row in changed], faults


def _repeats(rows: Sequence[Row]) -> list[str]:
    repeats = Counter(row.key.lower() for row in rows)
    return [f"key {key!r} occurs in {count} rows" for key, count in repeats.items() if count > 1]


def _read_row(entry: Any, folder: Path, root: str | Path | None) -> tuple[Row | None, list[str]]:
    """One row of the file, or its faults."""
    if not isinstance(entry, dict):
        return None, [f"expected key, group, path, .. and got {entry!r}"]
    values = dict(entry)
    problems = []
    if "like" in values:
        try:
            values = _like(values.pop("like"), values, folder, root)
        except ConfigError as error:
            return None, [str(error)]  # the other row supplies the missing fields
    try:
        if isinstance(values.get("path"), str):
            values["path"] = _located(os.path.expandvars(values["path"]), root)
        for key in ("classnames", "spellings"):
            if isinstance(values.get(key), str):
                values[key] = _lines(folder, key, values[key])
        if isinstance(values.get("subset"), str):
            values["subset"] = [_ids(line) for line in _lines(folder, "subset", values["subset"])]
        if values.get("templates") is not None:
            values["templates"] = resolve_templates(values["templates"])
    except ConfigError as error:
        problems.append(str(error))
    try:
        return Row.model_validate(values), problems
    except ValidationError as error:
        return None, problems + [_readable(fault) for fault in error.errors()]


def _located(path: str, root: str | Path | None) -> str | Path:
    if is_remote(path):
        return path
    if isinstance(root, str):
        return f"{root.rstrip('/')}/{path}"
    return (root or Path()) / Path(path).expanduser()


def _lines(folder: Path, key: str, name: str) -> list[str]:
    """The lines of a file next to the yaml file, or of a shipped list; a line that begins with `# ` is a comment."""
    for file in (folder / name, _shipped_folder() / "names" / f"{name}.txt"):
        if file.is_file():
            lines = [line.strip() for line in lines_of(read_text(file))]
            return [line for line in lines if line and not line.startswith("# ")]
    lists = ", ".join(sorted(file.stem for file in (_shipped_folder() / "names").glob("*.txt")))
    raise ConfigError(f"{key}: no file {folder / name}, and no shipped list of that name ({lists})")


def _ids(line: str) -> list[int]:
    numbers = line.partition("#")[0].split()
    if not numbers or not all(number.isdecimal() for number in numbers):
        raise ConfigError(f"subset: line {line!r} should hold class ids")
    return [int(number) for number in numbers]


def _readable(fault: Any) -> str:
    where = ".".join(str(part) for part in fault["loc"])
    if fault["type"] == "extra_forbidden":
        near = get_close_matches(where, list(Row.model_fields), n=1)
        return f"unknown key {where!r}" + (f"; did you mean {near[0]!r}?" if near else "")
    message = fault["msg"].removeprefix("Value error, ")
    return f"{where}: {message}, got {fault['input']!r}" if where else message


def _unknown(what: str, key: str, known: Sequence[str]) -> str:
    near = get_close_matches(key, known, n=3) or known
    return f"{what}: {key!r} is not in the benchmark; did you mean {', '.join(near)}?"


def _listed(title: str, faults: Sequence[str]) -> str:
    return title + "".join(f"\n  - {fault}" for fault in faults)
