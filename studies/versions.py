"""Versions: of installed packages, as results and recipes record them, and of files that a newer autopeft wrote."""

from __future__ import annotations

from collections.abc import Iterable
from importlib import metadata


def version_of(package: str) -> str | None:
    """Return the version of an installed distribution; None if it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def versions_of(packages: Iterable[str]) -> dict[str, str | None]:
    """Return the version of each package, see `version_of`."""
    return {package: version_of(package) for package in packages}


def newer(what: str) -> str:
    """Return the message about a file that this version cannot read. `what`: how that shows."""
    return f"made by a newer version of autopeft: upgrade autopeft ({what})"
