"""The format of the JSON files of runs and sweeps: each holds the name and the version of its format."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.config import ConfigError
from pipeline.files import read_json, replace_json


@dataclass(frozen=True)
class Format:
    """A JSON object that begins with its `format` and `version`; a file without them has the first version."""

    name: str
    version: int
    keys: tuple[str, ...]  # that each such file holds

    def stamped(self, content: Mapping[str, Any]) -> dict[str, Any]:
        """The content, preceded by format and version."""
        return {"format": self.name, "version": self.version} | dict(content)

    def write(self, path: Path, content: Mapping[str, Any]) -> None:
        """Replace a file in one step."""
        replace_json(path, self.stamped(content))

    def read(self, path: Path) -> dict[str, Any]:
        """The checked content of a file.

        Raises:
            FileNotFoundError: there is none.
            ConfigError: it is damaged, has another format or a later version.
        """
        try:
            content = read_json(path)
        except FileNotFoundError:
            raise
        except (OSError, ValueError) as error:
            raise ConfigError(str(error) if isinstance(error, ValueError) else f"{path}: {error.strerror}") from None
        return self._checked(content, str(path))

    def parse(self, text: str, where: str) -> dict[str, Any]:
        """Like `read`, for the text of a file that was obtained elsewhere."""
        try:
            content = json.loads(text)
        except ValueError as error:
            raise ConfigError(f"{where}: cannot be read: {error}") from None
        return self._checked(content, where)

    def _checked(self, content: Any, where: str) -> dict[str, Any]:
        if not isinstance(content, dict) or content.get("format", self.name) != self.name:
            raise ConfigError(f"{where}: is not a {self.name} file")
        version = content.get("version", 1)
        if not isinstance(version, int) or version > self.version:
            raise ConfigError(
                f"{where}: was written by a later selora ({self.name} version {version}, this one reads up to "
                f"{self.version}); read it with that one, or upgrade this"
            )
        if missing := [key for key in self.keys if key not in content]:
            raise ConfigError(f"{where}: is not a {self.name} file, it has no {', '.join(missing)}")
        return content
