"""Files of vectors: parquet with the columns key and vector, or npy with a JSON file of the keys next to it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pipeline.config import ConfigError
from pipeline.files import replacing

SUFFIXES = (".parquet", ".npy")
_META = b"selora"


@dataclass(frozen=True)
class Vectors:
    """Unit vectors with their keys.

    Attributes:
        keys: N names of images, or the texts themselves.
        vectors: (N, D) fp32.
        model: the user's name of the model.
        digest: digest of the model's weights.
        kind: "images" or "texts".
    """

    keys: Sequence[str]
    vectors: Tensor
    model: str
    digest: str
    kind: str

    @property
    def facts(self) -> dict[str, str]:
        return {"model": self.model, "digest": self.digest, "kind": self.kind}


def check_suffix(file: Path) -> None:
    """Raise ConfigError for a file name of another format."""
    if file.suffix not in SUFFIXES:
        raise ConfigError(f"{file}: should end with {' or '.join(SUFFIXES)}")


def write_vectors(file: Path, found: Vectors) -> None:
    """Write the file, completely or not at all; the same vectors give the same bytes."""
    check_suffix(file)
    file.parent.mkdir(parents=True, exist_ok=True)
    values = found.vectors.contiguous().numpy()
    if file.suffix == ".npy":
        with replacing(_keys_file(file)) as partial:
            content = json.dumps({**found.facts, "keys": list(found.keys)}, ensure_ascii=False, indent=0)
            partial.write_text(content + "\n", encoding="utf-8", errors="backslashreplace")
        with replacing(file) as partial, partial.open("wb") as out:
            np.save(out, values)
        return
    import pyarrow as pa
    import pyarrow.parquet as pq

    column = pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), values.shape[1])
    table = pa.table({"key": pa.array(list(found.keys), pa.string()), "vector": column})
    with replacing(file) as partial:
        pq.write_table(table.replace_schema_metadata({_META: json.dumps(found.facts).encode()}), partial)


def read_vectors(file: Path) -> Vectors:
    """Read a file written by `write_vectors`. Raises ConfigError for any other."""
    check_suffix(file)
    try:
        keys, values, facts = _read_npy(file) if file.suffix == ".npy" else _read_parquet(file)
    except FileNotFoundError as error:
        raise ConfigError(f"{error.filename or file}: there is no such file; `selora embed` writes it") from error
    except (ValueError, KeyError, OSError, TypeError) as error:
        raise ConfigError(f"{file}: is not a file of vectors from `selora embed` ({error})") from error
    return Vectors(keys, torch.from_numpy(values), facts["model"], facts["digest"], facts["kind"])


def _read_npy(file: Path) -> tuple[list[str], np.ndarray, dict[str, str]]:
    facts = json.loads(_keys_file(file).read_text(encoding="utf-8"))
    values = np.load(file, allow_pickle=False)
    if len(facts["keys"]) != len(values):
        raise ValueError(f"{len(values)} vectors, {len(facts['keys'])} keys")
    return facts["keys"], values, facts


def _read_parquet(file: Path) -> tuple[list[str], np.ndarray, dict[str, str]]:
    import pyarrow.parquet as pq

    table = pq.read_table(file)
    vectors = table["vector"].combine_chunks()
    values = vectors.values.to_numpy(zero_copy_only=False).reshape(len(table), -1)
    return table["key"].to_pylist(), values.copy(), json.loads((table.schema.metadata or {})[_META])


def _keys_file(file: Path) -> Path:
    return file.with_suffix(".json")
