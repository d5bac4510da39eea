"""What all JSON files of runs and sweeps have in common: the name of their format and its version."""

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
    """A JSON object with its own `format` and `version` in front; a file without them is of the first version."""

    name: str
    version: int
    keys: tuple[str, ...]  # that each such file has

    def stamped(self, content: Mapping[str, Any]) -> dict[str, Any]:
        """The content with format and version in front."""
        return {"format": self.name, "version": self.version} | dict(content)

    def write(self, path: Path, content: Mapping[str, Any]) -> None:
        """Replace a file in one step."""
        replace_json(path, self.stamped(content))

    def read(self, path: Path) -> dict[str, Any]:
        """What a file holds, checked.

        Raises:
            FileNotFoundError: there is none.
            ConfigError: it is damaged, of another format or of a later version.
        """
        try:
            content = read_json(path)
        except FileNotFoundError:
            raise
        except (OSError, ValueError) as error:
            raise ConfigError(str(error) if isinstance(error, ValueError) else f"{path}: {error.strerror}") from None
        return self._checked(content, str(path))

    def parse(self, text: str, where: str) -> dict[str, Any]:
        """Like `read`, from the text of a file that came from elsewhere."""
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
