"""Result files that grow by a line of JSON each; a line that a killed process left incomplete is ignored."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from autopeft.evaluators.atomic import disk_errors


def read(path: Path) -> list[dict[str, Any]]:
    """Return the entries of the file; none if there is no file."""
    if not path.exists():
        return []
    found = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return found


def append(path: Path, entry: Mapping[str, Any]) -> None:
    """Add an entry on a line of its own, even after an incomplete line. Raises OSError."""
    with disk_errors(path), path.open("a+b") as file:
        if file.tell():
            file.seek(-1, 2)
            if file.read(1) != b"\n":
                file.write(b"\n")
        file.write(json.dumps(entry).encode() + b"\n")
