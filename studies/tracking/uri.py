"""URIs of MLflow: a database file or a server."""

from __future__ import annotations

import shlex
from pathlib import Path

from autopeft.studies.urls import located, without_password


def absolute_uri(uri: str) -> str:
    """Return `uri` with an absolute path, so that it is the same store from every folder."""
    return located(uri, Path.cwd())


def ui_command(uri: str) -> str:
    """Return the command line that opens the report; a password is not shown."""
    uri = without_password(uri)
    if uri.startswith("http"):
        return f"python -m webbrowser {shlex.quote(uri)}"
    return f"mlflow ui --backend-store-uri {shlex.quote(absolute_uri(uri))} --port 5000"
