"""Run the arms: sweeps by hand, and studies in the same time; then verify what each recommends with fresh seeds.

Time is processor time of one thread, so it does not depend on other work of the machine.
"""

from __future__ import annotations

import sysconfig
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from statistics import fmean
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import torch

from autopeft.benchmarks.contest import UNLIMITED, SilentWatcher
from autopeft.benchmarks.handmade import returns
from autopeft.evaluators.base import Request
from autopeft.evaluators.data.topics.build import TopicRow, write
from autopeft.search_space.architecture import digest
from autopeft.search_space.problem import Trial
from autopeft.studies.analysis.summary import summary
from autopeft.studies.config.loading import load_study
from autopeft.studies.config.problem import problem_for
from autopeft.studies.config.study_file import StudyFile
from autopeft.studies.engine.check import check
from autopeft.studies.engine.plan import plan_of
from autopeft.studies.engine.scheduled_trials import baselines
from autopeft.studies.engine.session import evaluator_for, open_study
from autopeft.studies.errors import UserError

if TYPE_CHECKING:
    from autopeft.evaluators.data.splits import Splits

#: The demo's space has the rules in it.
STUDY = Path(str(files("autopeft.studies.examples"))) / "demo.yaml"
#: In bfloat16, a training takes 70 % of the time.
COMMON = (
    "model.dtype=bfloat16",
    "baselines.names=[lora-all-linear, lora-r8-qv]",
    "finalists.most=4",
    "tracking.enabled=false",
)
#: Data sets, as overrides of the study; `returns` is written to a folder first.
SETS: Mapping[str, tuple[str, ...]] = {
    "topics": ("data.source=embedded",),
    "domains": ("data.source=embedded-domains",),
    "returns": (
        "data.source=files",
        "data.train=train.jsonl",
        "data.validation=validation.jsonl",
        "data.test=test.jsonl",
    ),
}
NO_RUNGS = ("search.rungs=[]", "search.keep=1.0")
NO_START = "search.start=[]"
#: The searches, as overrides of the study. "now" without one lever each: the levers' own shares.
SEARCHES: Mapping[str, tuple[str, ...]] = {
    "tpe": ("search.searcher=tpe", *NO_RUNGS, NO_START),
    "before": ("search.goal=front", "search.keep=0.5", NO_START),
    "now": (),
    "shrink": ("search.searcher=shrink", "proxy.subnets=500"),
    "now-goal": ("search.goal=front",),
    "now-rungs": NO_RUNGS,
    "now-start": (NO_START,),
}
SWEEP = "sweep"
ARMS = (SWEEP, *SEARCHES)
#: Share of an arm's time for its search; the other part is for the finalists.
SEARCH_SHARE = 0.6
#: Seeds of the verification; no study reaches them. The test scores of one seed spread by a point or two.
FRESH = tuple(range(9001, 9007))


@dataclass(frozen=True, slots=True, kw_only=True)
class Verified:
    """What one arm recommends, and its test score with fresh seeds. `took_s`: processor seconds without them.

    `rows`, `key`: digests of the training rows and of the candidate; equal ones are verified once. The arm "sweep" has
    a result for each of its rules; `arm` is then "sweep: NAME".
    """

    data: str
    rows: str
    seed: int
    arm: str
    minutes: float
    took_s: float
    trainings: int
    candidate: str
    key: str
    num_params: float
    test: tuple[float, ...]

    @property
    def mean(self) -> float:
        """The mean test score."""
        return fmean(self.test)


def settings_of(data: str, seed: int, arm: str, folder: Path) -> StudyFile:
    """Return the study of an arm on a data set, with its output in `folder`."""
    overrides = [*COMMON, *SETS[data], *SEARCHES.get(arm, ()), f"seed={seed}", f"output={folder / 'study'}"]
    if data == "returns":
        write(folder, _returns())
        overrides = [entry.replace("=", f"={folder}/") if ".jsonl" in entry else entry for entry in overrides]
    return load_study(STUDY, overrides)


@cache
def _returns() -> dict[str, list[TopicRow]]:
    """Return the rows of `returns`; reading the sources of all packages takes long."""
    return returns.build(Path(sysconfig.get_path("purelib")))


def run(data: str, seed: int, arm: str, minutes: float, known: Sequence[Verified] = ()) -> list[Verified]:
    """Run one arm on one data set with one search seed, and verify what it recommends, unless it is `known`."""
    torch.set_num_threads(1)
    with TemporaryDirectory() as name:
        settings = settings_of(data, seed, arm, Path(name))
        splits, _, _ = check(settings)
        begun = time.process_time()
        found = _swept(settings, splits) if arm == SWEEP else [(arm, *_searched(settings, splits, 60 * minutes))]
        took_s = time.process_time() - begun
        rows, evaluator = digest(splits.train), evaluator_for(settings, splits)
        tests = {one.key: one.test for one in known if one.rows == rows and len(one.test) == len(FRESH)}
        new = {c.key: c for _, trial, _ in found if (c := trial.candidate).key not in tests}
        outcomes = evaluator.evaluate([Request(candidate=c, seed=s, test=True) for c in new.values() for s in FRESH])
    for i, key in enumerate(new):
        own = outcomes[len(FRESH) * i : len(FRESH) * (i + 1)]
        tests[key] = tuple(outcome.measurement.test["accuracy"] for outcome in own if outcome.measurement is not None)
        if len(tests[key]) < len(FRESH):
            raise UserError(f"{arm} on {data}, seed {seed}: {new[key].key}: a verification failed")
    return [
        Verified(
            data=data,
            rows=rows,
            seed=seed,
            arm=label,
            minutes=minutes,
            took_s=took_s,
            trainings=trainings,
            candidate=summary(chosen, evaluator.backbone),
            key=chosen.candidate.key,
            num_params=chosen.candidate.architecture.num_params(evaluator.backbone),
            test=tests[chosen.candidate.key],
        )
        for label, chosen, trainings in found
    ]


def _swept(settings: StudyFile, splits: Splits) -> list[tuple[str, Trial, int]]:
    """Train the rules at three learning rates each; return the best of each rule, as one would choose by hand."""
    evaluator = evaluator_for(settings, splits)
    planned = list(baselines(plan_of(settings), problem_for(settings, evaluator.backbone).space))
    outcomes = evaluator.evaluate([Request(candidate=one.candidate, seed=one.seed) for one in planned])
    best: dict[str, tuple[float, Trial]] = {}
    for one, outcome in zip(planned, outcomes, strict=True):
        if outcome.measurement is not None:
            score = outcome.measurement.values["accuracy"]
            if score > best.get(one.role.name, (-1.0,))[0]:
                best[one.role.name] = score, Trial(number=0, role=one.role, candidate=one.candidate)
    return [(f"{SWEEP}: {name}", trial, len(planned)) for name, (_, trial) in best.items()]


def _searched(settings: StudyFile, splits: Splits, allowed_s: float) -> tuple[Trial, int]:
    """Run a study whose search takes its share of `allowed_s`; return what it recommends."""
    search = settings.search.model_copy(update={"timeout_s": SEARCH_SHARE * allowed_s, "trials": UNLIMITED})
    own = settings.model_copy(
        update={"search": search, "baselines": settings.baselines.model_copy(update={"names": ()})}
    )
    with open_study(own, splits, resume=False) as study:
        study.time.clock = time.process_time
        snapshot = study.run(SilentWatcher())
    found = snapshot.front().recommendation
    assert found is not None
    return snapshot.entry(found.recommended).trial, len(snapshot.evaluated)
