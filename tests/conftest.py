"""Settings for every test. The libraries read them when they are imported, so they come before any of these."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

from .support.fresh import FreshProcess

# Several workers share the machine: one thread each is faster than a fight over the cores, and the order of
# summation does not depend on the machine.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MKL_NUM_THREADS", "1")
# No test may reach for a hub; a missing file fails at once in place of after the retries.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# MLflow otherwise reports its use, looks for git and logs every migration of a new database.
os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")
os.environ.setdefault("GIT_PYTHON_REFRESH", "quiet")

# Studies commit often, and on a disk each commit of SQLite waits for it: up to a hundred times as long as in memory. A
# killed process leaves its files in memory as on a disk.
MEMORY, NEEDED_BYTES = Path("/dev/shm"), 4 * 10**9
if MEMORY.is_dir() and os.access(MEMORY, os.W_OK) and shutil.disk_usage(MEMORY).free > NEEDED_BYTES:
    os.environ.setdefault("TMPDIR", str(MEMORY))
    tempfile.tempdir = None  # pytest has asked for it

# After the settings. The GPU kit runs tests where these are not installed.
if find_spec("jaxtyping") and find_spec("beartype"):
    from .support.shapes import install

    install()


@pytest.fixture(scope="session")
def fresh() -> Iterator[FreshProcess]:
    """A process without autopeft that reads exports."""
    with FreshProcess() as process:
        yield process


@pytest.fixture(scope="session")
def fresh_own() -> Iterator[FreshProcess]:
    """A process that reads exports in our own format."""
    with FreshProcess() as process:
        yield process
