"""The datasets of a benchmark as one table: a row says where a dataset lies, how it is scored and what it counts for.

    name: demo
    root: shards                  # optional; paths below are relative to it, itself relative to this file
    datasets:
      - {key: clothing, group: id, path: wds_clothing}
      - {key: imagenet-a, group: shift, path: wds_imagenet-a, classnames: names-1000.txt, subset: [6, 11, 13]}
      - {key: stl10, group: zero-shot, path: wds_stl10, in_mean: false}
      - {key: flickr30k, group: retrieval, path: wds_flickr30k}

Adding a dataset is adding a row; no code names one. `base: other.yaml` inherits, as in every other file of the product.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictInt, ValidationError, model_validator

from pipeline.config import ConfigError
from pipeline.config_file import read_chain
from pipeline.prompts import resolve_templates

Group = Literal["id", "shift", "zero-shot", "retrieval"]
GROUPS: tuple[Group, ...] = ("id", "shift", "zero-shot", "retrieval")
Metric = Literal["acc1", "mean_recall"]


class Row(BaseModel):
    """One dataset. `classnames` and `templates` replace those that lie in the directory."""

    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True)

    # The key names the result file, so it must be a plain file name.
    key: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    group: Group
    path: Path
    # A list, or a text file with one name a line (relative to the yaml file).
    classnames: tuple[str, ...] | None = None
    # A list of sentences with {c}, or the name of a set in pipeline/prompts.py.
    templates: tuple[str, ...] | None = None
    # Score among these classes of `classnames` only; label j of the dataset is the j-th of them.
    subset: tuple[Annotated[StrictInt, Field(ge=0)], ...] | None = None
    in_mean: StrictBool = True

    @property
    def is_retrieval(self) -> bool:
        return self.group == "retrieval"

    @property
    def metric(self) -> Metric:
        """The one number shown for the dataset and averaged in its group."""
        return "mean_recall" if self.is_retrieval else "acc1"

    @model_validator(mode="after")
    def _check(self) -> Row:
        if self.is_retrieval and (self.classnames or self.templates or self.subset):
            raise ValueError("a retrieval dataset has captions: classnames, templates and subset do not apply")
        if self.subset is not None:
            if not self.subset or len(set(self.subset)) < len(self.subset):
                raise ValueError("subset must hold different class ids, at least one")
            if self.classnames is not None and max(self.subset) >= len(self.classnames):
                raise ValueError(f"subset names class {max(self.subset)} of {len(self.classnames)} classnames")
        return self


@dataclass(frozen=True)
class Benchmark:
    """The rows, in the order of the file."""

    name: str
    rows: tuple[Row, ...]

    def choose(self, keys: Sequence[str] | None) -> Benchmark:
        """Only the named datasets; an unknown name is a ConfigError that shows near ones."""
        if keys is None:
            return self
        known = [row.key for row in self.rows]
        faults = [_unknown(key, known) for key in keys if key not in known]
        if faults:
            raise ConfigError("\n".join(faults))
        return Benchmark(self.name, tuple(row for row in self.rows if row.key in keys))

    def check_paths(self) -> None:
        """Raise one ConfigError that lists every dataset whose directory is not there."""
        missing = [f"{row.key}: no directory {row.path}" for row in self.rows if not row.path.is_dir()]
        if missing:
            raise ConfigError(_listed(f"benchmark {self.name}: {len(missing)} datasets are missing", missing))


def _unknown(key: str, known: Sequence[str]) -> str:
    near = get_close_matches(key, known, n=3) or known
    return f"datasets: {key!r} is not in the benchmark; did you mean {', '.join(near)}?"


def load_benchmark(path: str | Path) -> Benchmark:
    """Read a benchmark file. All its faults come in one ConfigError."""
    path = Path(path)
    content = {key: raw.value for key, raw in read_chain(path).items()}
    folder = path.absolute().parent
    faults = [f"unknown key {key!r}" for key in sorted(set(content) - {"name", "root", "datasets"})]
    entries = content.get("datasets")
    if not isinstance(entries, list) or not entries:
        raise ConfigError(_listed(f"{path}: faults", [*faults, "`datasets` must be a list with at least one row"]))
    root = folder / Path(os.path.expandvars(str(content.get("root", ".")))).expanduser()
    rows = []
    for number, entry in enumerate(entries, start=1):
        row, problems = _read_row(entry, folder, root)
        label = entry["key"] if isinstance(entry, dict) and "key" in entry else f"number {number}"
        faults += [f"row {label}: {problem}" for problem in problems]
        rows += [row] if row is not None else []
    repeats = Counter(row.key.lower() for row in rows)
    faults += [f"key {key!r} stands in {count} rows" for key, count in repeats.items() if count > 1]
    if faults:
        raise ConfigError(_listed(f"{path}: {len(faults)} faults", faults))
    return Benchmark(str(content.get("name", path.stem)), tuple(rows))


def _read_row(entry: Any, folder: Path, root: Path) -> tuple[Row | None, list[str]]:
    """One row of the file, or what is wrong with it."""
    if not isinstance(entry, dict):
        return None, [f"expected key, group, path, .. and got {entry!r}"]
    values = dict(entry)
    problems = []
    try:
        if isinstance(values.get("path"), str):
            values["path"] = root / Path(os.path.expandvars(values["path"])).expanduser()
        if isinstance(values.get("classnames"), str):
            values["classnames"] = _lines(folder / values["classnames"])
        if values.get("templates") is not None:
            values["templates"] = resolve_templates(values["templates"])
    except ConfigError as error:
        problems.append(str(error))
    try:
        return Row.model_validate(values), problems
    except ValidationError as error:
        return None, problems + [_readable(fault) for fault in error.errors()]


def _lines(file: Path) -> list[str]:
    if not file.is_file():
        raise ConfigError(f"classnames: no file {file}")
    return [line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]


def _readable(fault: Any) -> str:
    where = ".".join(str(part) for part in fault["loc"])
    if fault["type"] == "extra_forbidden":
        near = get_close_matches(where, list(Row.model_fields), n=1)
        return f"unknown key {where!r}" + (f"; did you mean {near[0]!r}?" if near else "")
    message = fault["msg"].removeprefix("Value error, ")
    return f"{where}: {message}, got {fault['input']!r}" if where else message


def _listed(title: str, faults: Sequence[str]) -> str:
    return title + "".join(f"\n  - {fault}" for fault in faults)
