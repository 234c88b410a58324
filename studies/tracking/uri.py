"""URIs of MLflow: a database file or a server."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

from autopeft.studies.urls import located, without_password

DATABASES = ("sqlite", "postgresql", "mysql", "mssql")


def absolute_uri(uri: str) -> str:
    """Return `uri` with an absolute path, so that it is the same store from every folder."""
    return located(uri, Path.cwd())


def ui_command(uri: str) -> str:
    """Return the command line that opens the report; a password is not shown."""
    uri = without_password(uri)
    if uri.startswith("http"):
        return f"python -m webbrowser {shlex.quote(uri)}"
    return f"mlflow ui --backend-store-uri {shlex.quote(absolute_uri(uri))} --port 5000"


def check_reachable(uri: str) -> None:
    """Raise at once if a database cannot be opened, which MLflow would try for almost two minutes."""
    if not uri.startswith(DATABASES):
        return
    import sqlalchemy

    url = sqlalchemy.make_url(uri)
    options: dict[str, Any] = {}
    if uri.startswith("sqlite"):
        Path(url.database or "").parent.mkdir(parents=True, exist_ok=True)
    elif uri.startswith(("postgresql", "mysql")):
        options["connect_args"] = {"connect_timeout": 2}
    sqlalchemy.create_engine(url, poolclass=sqlalchemy.NullPool, **options).connect().close()
