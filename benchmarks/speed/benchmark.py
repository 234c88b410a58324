"""The benchmark of a study: candidates of its space by every arm, and how early they can be ranked.

Candidates are trained without dropout: ours and peft's use different random streams, so that equal work could not be
verified.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from random import Random
from statistics import median
from typing import TYPE_CHECKING, Any

from autopeft.benchmarks.speed.arms import ARMS, Bench, EqualWork, Watch, compare
from autopeft.benchmarks.speed.kernels import measure_kernels
from autopeft.benchmarks.speed.loop import LoopRun
from autopeft.benchmarks.speed.overhead import RANK, SLOTS, attention_lora, measure_overhead
from autopeft.benchmarks.speed.ranking import (
    KEEP,
    SHARES,
    Agreement,
    Budget,
    Correlation,
    Course,
    Ending,
    LoopCosts,
    agreement,
    hyperband,
    matched,
    ranking,
    rungs,
    spent_share,
    top_half,
)
from autopeft.benchmarks.speed.report import EarlyRanking, HourRow, SpeedResult, conditions
from autopeft.evaluators.base import Request
from autopeft.evaluators.costs.timing import Spread
from autopeft.evaluators.training.base import steps_at
from autopeft.search_space.architecture import Architecture, Candidate
from autopeft.search_space.problem import Fidelity, Measurement
from autopeft.studies.config.problem import problem_for
from autopeft.studies.config.study_file import StudyFile
from autopeft.studies.errors import ConfigurationError

if TYPE_CHECKING:
    from autopeft.evaluators.data.splits import Splits

#: Most draws from the space per requested candidate.
TRIES = 200
PLACED_RANK = 8
#: Least steps of a training that can be ranked early: in shorter ones, neighbouring shares would be the same step.
LEAST_STEPS = 20
#: Every share at which a loss may be needed.
RECORDED = tuple(sorted({share for first in SHARES for share in rungs(first)}))


def run_bench(
    settings: StudyFile, splits: Splits, *, candidates: int, rounds: int, ranked: int, watch: Watch
) -> SpeedResult:
    """Run the benchmark. Raises ParityError, without any figures, where the arms do not do the same work."""
    bench = Bench.of(settings, splits, candidates, watch)
    before = conditions(bench, candidates=candidates, rounds=rounds)
    drawn = list(_draw(bench, max(candidates, ranked)))
    if ranked and min(map(bench.single.num_steps, drawn)) < LEAST_STEPS:
        raise ConfigurationError(f"--ranking {ranked}: needs trainings of at least {LEAST_STEPS} steps (0: no ranking)")
    placed = list(_placed(bench, drawn[0].candidate, candidates))

    def steps(requests: Sequence[Request]) -> int:
        return sum(map(bench.single.num_steps, requests))

    equal = steps(drawn[:candidates]) + sum(steps(requests) for _, requests in placed)
    controls = rounds * steps(drawn[:1]) if ranked else 0
    watch.plan(len(ARMS) * rounds * equal + (3 + rounds) * steps(drawn[:ranked]) + controls)
    first, runs = compare(bench, "candidates of the space", drawn[:candidates], rounds)
    tables = [first, *(compare(bench, title, requests, rounds)[0] for title, requests in placed)]
    watch.stage(f"overhead of {SLOTS} x rank {RANK}")
    training = bench.single.training(drawn[0].candidate)
    overhead = measure_overhead(bench.packed(share_lower_layers=False), training, settings.seed)
    loops = [run for found in runs["loop"] for run in found if isinstance(run, LoopRun)]
    return SpeedResult(
        conditions=before,
        equal_work=tuple(tables),
        overhead=overhead,
        kernels=measure_kernels(bench.device),
        ranking=_ranking(bench, drawn[:ranked], rounds, first, loops) if ranked else None,
    )


# Candidates


def _draw(bench: Bench, count: int) -> Iterator[Request]:
    """Yield the first `count` candidates of a seeded stream that peft can represent."""
    settings = bench.settings
    space, rng = problem_for(settings, bench.single.backbone).space, Random(f"bench/{settings.seed}")
    for _ in range(TRIES * count):
        if not count:
            return
        candidate = _without_dropout(space.decode(space.sample(rng)))
        if candidate.architecture and bench.loop.holds(candidate):
            count -= 1
            yield Request(candidate=candidate, seed=settings.seed)
    if count:
        raise ConfigurationError("space: peft supports too few of its candidates for a comparison")


def _without_dropout(candidate: Candidate) -> Candidate:
    def dry(spec: Any) -> Any:
        return replace(spec, dropout=0.0) if hasattr(spec, "dropout") else spec

    adapters = {site: [dry(spec) for spec in specs] for site, specs in candidate.architecture.adapters}
    return replace(candidate, architecture=Architecture.of(adapters))


def _placed(bench: Bench, like: Candidate, count: int) -> Iterator[tuple[str, list[Request]]]:
    """Yield candidates that differ in the learning rate, with adapters in the upper half or in the last layer."""
    backbone, training = bench.single.backbone, bench.single.training(like)
    for lowest in sorted({backbone.num_layers // 2, backbone.num_layers - 1}):
        architecture = attention_lora(backbone, PLACED_RANK, lowest)
        rates = [training.learning_rate * 0.5 ** (i / count) for i in range(count)]
        candidates = [
            Candidate(architecture=architecture, training={**like.training, "learning_rate": rate}) for rate in rates
        ]
        requests = [Request(candidate=candidate, seed=bench.settings.seed) for candidate in candidates]
        yield f"LoRA of rank {PLACED_RANK} from layer {lowest} of {backbone.num_layers} on", requests


# Ranking


def _ranking(
    bench: Bench, requests: Sequence[Request], rounds: int, table: EqualWork, loops: Sequence[LoopRun]
) -> EarlyRanking:
    # The true order has seeds of its own, so that it does not share its noise with the rankings compared with it.
    truths = []
    for offset in (1, 2):
        bench.watch.stage(f"true order, seed {offset} of 2")
        seeded = [replace(request, seed=request.seed + offset) for request in requests]
        truths.append([m.values["accuracy"] for m in _measured(bench, seeded)])
    quality = [(a + b) / 2 for a, b in zip(*truths, strict=True)]
    top = top_half(quality)
    ceiling = Agreement(
        all=Correlation.of(*truths),
        top_half=Correlation.of(*([truth[i] for i in top] for truth in truths)),
    )
    bench.watch.stage("losses on the way")
    courses = [
        Course(
            loss={**{share: values["loss"] for share, values in m.rungs}, 1.0: m.values["loss"]},
            accuracy=m.values["accuracy"],
        )
        for m in _measured(bench, [replace(r, fidelity=Fidelity(rungs=RECORDED)) for r in requests])
    ]
    budgets = tuple(
        Budget(share=share, agreement=agreement([-course.loss[share] for course in courses], quality))
        for share in SHARES
    )
    share, reached = matched(budgets)
    costs = _loop_costs(bench, loops)
    full_steps = [bench.single.num_steps(request) for request in requests]
    pruned = hyperband(courses, share)
    spent = spent_share(pruned, full_steps, costs, share)
    halved, halving_s = _halving(bench, requests, rounds, share, loops)
    loop_s = next(row.seconds for row in table.rows if row.arm == "loop") * len(requests)
    whole = [Ending(share=1.0, loss=course.loss[1.0], accuracy=course.accuracy) for course in courses]

    def row(arm: str, over_loop: Spread, endings: Sequence[Ending]) -> HourRow:
        steps = [steps_at(ending.share, full) for ending, full in zip(endings, full_steps, strict=True)]
        return HourRow(
            arm=arm,
            over_loop=over_loop,
            over_pruned_loop=over_loop.times(spent),
            steps_share=sum(steps) / sum(full_steps),
            agreement=agreement(ranking(endings), quality),
        )

    by_arm = {found.arm: found.speedup for found in table.rows}
    return EarlyRanking(
        candidates=len(requests),
        ceiling=ceiling,
        budgets=budgets,
        matched_share=share,
        reached=reached,
        rows=(
            row("loop", by_arm["loop"], whole),
            row("loop, Hyperband", Spread.of([1 / spent]), pruned),
            *(row(arm, by_arm[arm], whole) for arm in by_arm if arm != "loop"),
            row("packed+prefix, halving", Spread.of([loop_s / seconds for seconds in halving_s]), halved),
        ),
    )


def _measured(bench: Bench, requests: Sequence[Request], select: Any = None) -> list[Measurement]:
    outcomes, _ = bench.timed(bench.packed(share_lower_layers=True), requests, select)
    return [outcome.measurement for outcome in outcomes if outcome.measurement is not None]


def _loop_costs(bench: Bench, loops: Sequence[LoopRun]) -> LoopCosts:
    validation_s = median(run.validation_s for run in loops)
    # Our evaluators score a part of the validation split at a rung; so would the loop.
    part = len(bench.single.rung_examples) / len(bench.single.examples["validation"])
    return LoopCosts(
        setup_s=median(run.seconds - run.validation_s - run.step_s * len(run.losses) for run in loops),
        step_s=median(run.step_s for run in loops),
        rung_s=part * validation_s,
        validation_s=validation_s,
    )


def _halving(
    bench: Bench, requests: Sequence[Request], rounds: int, first: float, loops: Sequence[LoopRun]
) -> tuple[list[Ending], list[float]]:
    """Return where successive halving stops each candidate, and its seconds in each round.

    Halving is by the loss alone, like the loop's pruner. The seconds are scaled to the machine's speed during the first
    table, by a training of the loop before each round.
    """
    from autopeft.searchers.halving import survivors

    def select(rung: float, found: Sequence[tuple[int, Mapping[str, float]]]) -> list[int]:
        return [found[place][0] for place in survivors([[values["loss"]] for _, values in found], KEEP)]

    halving = [replace(request, fidelity=Fidelity(rungs=rungs(first))) for request in requests]
    # The control is also the loop's first candidate in each round of the first table.
    usual = median(run.seconds for run in loops[:: len(loops) // rounds])
    seconds = []
    for number in range(rounds):
        bench.watch.stage(f"halving, round {number + 1} of {rounds}")
        (control,) = bench.loop.prepare(requests[:1])
        bench.watch.advance(len(control.losses))
        outcomes, taken = bench.timed(bench.packed(share_lower_layers=True), halving, select)
        seconds.append(taken * usual / control.seconds)
    found = [outcome.measurement for outcome in outcomes if outcome.measurement is not None]
    return [Ending(share=m.share, loss=m.values["loss"], accuracy=m.values["accuracy"]) for m in found], seconds
