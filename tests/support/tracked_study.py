"""A made-up study for the tests of its report (a baseline, four trials of a search, a failure), and a server for it."""

from __future__ import annotations

import random
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from autopeft.search_space.adapters import Lora, Prefix
from autopeft.search_space.architecture import Architecture, Candidate
from autopeft.search_space.backbones.backbone import Backbone, Site
from autopeft.search_space.problem import SEARCH, Measurement, Objective, Role, Trial
from autopeft.studies.analysis.snapshot import Snapshot

OBJECTIVES = (Objective.of("accuracy"), Objective.of("num_params"))
NUM_EXAMPLES, NUM_STEPS = 50, 20
SETTINGS = "study: topics\nsearch:\n  trials: 5\n"


def site(layer: int, role: str) -> Site:
    path = f"encoder.layer.{layer}.{role}"
    return Site(
        name=f"layers.{layer}.{role}",
        layer=layer,
        role=role,
        module=path,
        input_module=path,
        in_features=16,
        out_features=16,
        bias=True,
        num_key_value_heads=2,
        head_dim=8,
    )


BACKBONE = Backbone(
    id="tiny",
    revision=None,
    family="bert",
    sites=tuple(site(layer, role) for layer in range(2) for role in ("attn.q", "attn.v", "attn")),
    hidden_size=16,
    num_layers=2,
    num_params=10_000,
    head_modules=("classifier",),
    num_head_params=64,
    causal=False,
)


def candidate(rank: int, rate: float = 2e-3) -> Candidate:
    """LoRA of that rank on every query and value, and a prefix from rank 16 on; nothing at all for rank 0."""
    adapters: dict[str, list[Any]] = {}
    if rank:
        roles = ("attn.q", "attn.v")
        adapters = {site.name: [Lora(rank=rank)] for site in BACKBONE.sites if site.role in roles}
    if rank >= 16:
        adapters["layers.0.attn"] = [Prefix(length=4)]
    return Candidate(
        architecture=Architecture.of(adapters), training={"learning_rate": rate, "epochs": 2.0, "batch_size": 32}
    )


def trial(number: int, accuracy: float, rank: int, **changes: Any) -> Trial:
    """A complete trial; `accuracy` is the share of the examples that it gets right, the same ones first."""
    right = round(accuracy * NUM_EXAMPLES)
    per_example = tuple(float(i < right) for i in range(NUM_EXAMPLES))
    noise = random.Random(number)
    losses = tuple(2.7 - accuracy * 2 * step / NUM_STEPS + noise.uniform(0, 0.1) for step in range(NUM_STEPS))
    made = candidate(rank)
    measurement = Measurement(
        values={
            "accuracy": right / NUM_EXAMPLES,
            "num_params": float(made.architecture.num_params(BACKBONE)),
            "latency_s": 0.004 + 1e-5 * rank,
        },
        std_err={"accuracy": 0.06},
        seed=number,
        wall_s=6.5,
        train_s=5.0,
        losses=losses,
        rungs=((0.5, {"accuracy": accuracy / 2}),),
        per_example={"accuracy": per_example},
        spread={"latency_s": 1e-4},
    )
    genes = {"lora.on": True, "lora.rank": rank, "training.learning_rate": 2e-3}
    fields: dict[str, Any] = {"role": SEARCH, "genes": genes, "state": "complete", "measurement": measurement}
    return Trial(number=number, candidate=made, **{**fields, **changes})


#: Accuracy 0.5, 0.7, 0.6, 0.8 at ranks 1, 4, 8, 16: trial 3 is dominated by trial 2, and the baseline by trial 1.
TRIALS = (
    trial(0, 0.4, 2, role=Role("baseline", "lora-r2"), genes={}),
    trial(1, 0.5, 1),
    trial(2, 0.7, 4),
    trial(3, 0.6, 8),
    trial(4, 0.8, 16),
    trial(5, 0.0, 32, state="failed", measurement=None, error="RuntimeError: out of memory\n  in step 3"),
)
FRONT = (1, 2, 4)


def snapshot(trials: Sequence[Trial] = TRIALS, **changes: Any) -> Snapshot:
    made = Snapshot(
        study="topics",
        study_id="5d2f",
        settings=SETTINGS,
        objectives=OBJECTIVES,
        backbone=BACKBONE,
        trials=tuple(trials),
    )
    return replace(made, **changes)


@contextmanager
def mlflow_server(store: str, folder: Path) -> Iterator[str]:
    """A server of MLflow on this machine over the database `store`; artifacts of its own go to `folder`."""
    uri = f"http://127.0.0.1:{free_port()}"
    command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", store, "--workers", "1"]
    command += ["--artifacts-destination", str(folder), "--port", uri.rpartition(":")[2]]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as server:
        try:
            wait_for(f"{uri}/health")
            yield uri
        finally:
            server.terminate()


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def wait_for(url: str) -> None:
    for _ in range(300):
        try:
            urllib.request.urlopen(url, timeout=1).close()
            return
        except OSError:
            time.sleep(0.2)
    raise TimeoutError(url)
