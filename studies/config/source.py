"""The sources of a study's settings (YAML, environment, `--set`) and the position of each setting."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ruamel.yaml.scalarbool import ScalarBoolean

from autopeft.studies.config.yaml_text import MOST_BYTES, MOST_VALUES, UnreadableError, load
from autopeft.studies.errors import ConfigurationError

ENVIRONMENT_PREFIX = "AUTOPEFT__"
#: The path of a setting.
Keys = tuple[str | int, ...]
#: The path of a setting and a message.
PlacedProblem = tuple[Keys, str]


class StudyFileError(ConfigurationError):
    """All problems of a study file, one line each: `file:line key: message`."""

    def __init__(self, problems: Iterable[str]) -> None:
        self.problems = tuple(problems)
        super().__init__("\n".join(self.problems))


class Source:
    """The settings as plain data, and the position of each: a line of the file, a variable or an option.

    `data`: the settings of file, environment and `--set` together; later ones win. `problems`: problems of reading.
    """

    def __init__(self, name: str, document: Any) -> None:
        self.name = name
        self.data: dict[str, Any] = {}
        self.problems: list[str] = []
        self._document = document
        self._overrides: dict[Keys, str] = {}
        if isinstance(document, Mapping):
            self.data = _plain(document)
        elif document is not None:
            self.problems.append(f"{name}:1 the file must be a mapping of keys to values")

    def override(self, key: str, text: str, origin: str) -> None:
        """Set the value at a dotted `key`; `text` is YAML. Case and hyphens of names are ignored."""
        try:
            value = _plain(load(text, "safe"))
        except UnreadableError as error:
            self.problems.append(f"{origin}: {error}")
            return
        *parents, last = key.split(".")
        node: Any = self.data
        path: list[str | int] = []
        for word in parents:
            step = _step(node, word)
            path.append(step)
            if isinstance(node, dict) and node.get(step) is None:
                node[step] = {}
            try:
                node = node[step]
            except (IndexError, TypeError):
                node = None
            if not isinstance(node, (dict, list)):
                self.problems.append(
                    f"{origin}: {'.'.join(map(str, path))} is a single value, not a section with settings"
                )
                return
        step = _step(node, last)
        try:
            node[step] = value
        except (IndexError, TypeError):
            self.problems.append(
                f"{origin}: the list has no entry {last!r}: its {len(node)} entries are numbered from 0"
            )
            return
        self._overrides[(*path, step)] = origin

    def render(self, path: Keys, what: str) -> str:
        """Return the problem `what` at `path` as one line."""
        key = ".".join(map(str, path))
        for length in range(len(path), 0, -1):
            origin = self._overrides.get(path[:length])
            if origin is not None:
                return f"{origin}: {what}" if length == len(path) else f"{origin}: {key}: {what}"
        line, found = self._find(path)
        if not found:  # an override of a deeper key may have created the entry
            for made, origin in self._overrides.items():
                if made[: len(path)] == path:
                    return f"{origin}: {key}: {what}"
        where = self.name if line is None else f"{self.name}:{line}"
        return f"{where} {key}: {what}".lstrip()

    def line(self, path: Keys) -> int:
        """Return the line of the last key of `path` that the file has, 0 without a file."""
        return self._find(path)[0] or 0

    def _find(self, path: Keys) -> tuple[int | None, bool]:
        """Return the line of the last key of `path` that the file has, and whether the file has the whole path."""
        node: Any = self._document
        line = 1 if hasattr(node, "lc") else None
        for key in path:
            try:
                # Keys of the data are text, whatever their type in YAML.
                in_list = isinstance(node, list)
                here = key if in_list else next(k for k in node if str(k) == str(key))
                line = (node.lc.item if in_list else node.lc.key)(here)[0] + 1
                node = node[here]
            # absent, below a scalar, or from a merge key, which has no line
            except (KeyError, IndexError, StopIteration, TypeError, AttributeError):
                return line, False
        return line, True


def read(
    path: Path, overrides: Iterable[str], environment: Mapping[str, str], most_values: int = MOST_VALUES
) -> Source:
    """Read the file and apply the environment and the overrides ("a.b=3"). Raises StudyFileError.

    `most_values`: the most keys and values of the file, and 25 bytes of text for each.
    """
    try:
        document = load(_text(path, most_values * MOST_BYTES // MOST_VALUES), most_values=most_values)
    except UnreadableError as error:
        where = f"{path}" if error.line is None else f"{path}:{error.line}"
        raise StudyFileError([f"{where} {error}"]) from None
    source = Source(str(path), document)
    for name in sorted(environment):
        if name.startswith(ENVIRONMENT_PREFIX):
            key = name.removeprefix(ENVIRONMENT_PREFIX).lower().replace("__", ".")
            source.override(key, environment[name], name)
    for override in overrides:
        key, equals, text = override.partition("=")
        if equals and key:
            source.override(key.strip(), text, f"--set {key.strip()}")
        else:
            source.problems.append(f"--set {override}: expected key=value, such as search.trials=5")
    return source


def _step(node: Any, word: str) -> str | int:
    if isinstance(node, list):
        return int(word) if word.isdecimal() else word
    # Names of environment variables have no lower case and no hyphens.
    alike = (key for key in node if key.lower().replace("-", "_") == word.lower().replace("-", "_"))
    return word if word in node else next(alike, word)


def _text(path: Path, most_bytes: int) -> str:
    """Return the text of a file. Raises StudyFileError, also for what is no regular file: a pipe may never end."""
    try:
        if os.path.exists(path) and not path.is_file():
            raise StudyFileError([f"{path}: is not a file; give a study file, or a folder with one called study.yaml"])
        with path.open("rb") as file:
            content = file.read(most_bytes + 1)
    except FileNotFoundError:
        raise StudyFileError([f"{path}: no such file; `autopeft init NAME` writes one"]) from None
    except (OSError, ValueError) as error:
        raise StudyFileError([f"{path}: {getattr(error, 'strerror', None) or error}"]) from None
    if len(content) > most_bytes:
        raise StudyFileError([f"{path}: is larger than {most_bytes:,} bytes, so it is no study file"])
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise StudyFileError([f"{path}:{line} not UTF-8 text: save the file as UTF-8"]) from None


def _plain(node: Any) -> Any:
    """Return dicts, lists and scalars without the comments and formats of ruamel.yaml."""
    if isinstance(node, Mapping):
        return {str(key): _plain(value) for key, value in node.items()}
    if isinstance(node, (list, tuple)):
        return [_plain(value) for value in node]
    if isinstance(node, ScalarBoolean):  # a boolean with an anchor, a subclass of int
        return bool(node)
    if node is None or isinstance(node, bool):
        return node
    for plain in (int, float):
        if isinstance(node, plain):
            return plain(node)
    return str(node)  # dates and tagged values become text
