"""Training from a recipe without its study, with its own seed or with new seeds to verify its promises."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from autopeft.evaluators.base import Outcome, Request
from autopeft.search_space.metrics import ALWAYS, LmEval, OfTexts
from autopeft.search_space.problem import METRICS
from autopeft.studies.engine.session import inputs_checked
from autopeft.studies.errors import ConfigurationError, UserError
from autopeft.studies.recipes.parts import Measured, RecipeGeneration
from autopeft.studies.recipes.recipe import Recipe

#: Tolerance of promises: studies store scores per example with four decimals. If the seed makes no difference, as with
#: pretrained LoRAs, the promised interval has no other width.
ROUNDING = 1e-4


@dataclass(frozen=True, slots=True, kw_only=True)
class Retrained:
    """A training run from a recipe. `test`: scores on the test split."""

    seed: int
    test: dict[str, float]
    outcome: Outcome


def retrain(
    recipe: Recipe,
    seeds: Sequence[int],
    device: str = "cpu",
    progress: Callable[[int, int], None] | None = None,
    *,
    trust_code: bool = False,
) -> list[Retrained]:
    """Train a recipe with each of these seeds and score it on the test split.

    `trust_code`: permit the code of the recipe's own metrics, and generated programs. Raises ConfigurationError for a
    model or data that differs from the recipe and for code without permission, and UserError if a run fails.
    """
    from autopeft.evaluators.backbones import load_backbone
    from autopeft.evaluators.data.retained import with_retained
    from autopeft.evaluators.data.splits import load_splits
    from autopeft.evaluators.harness.documents import with_documents
    from autopeft.evaluators.texts import Generation
    from autopeft.evaluators.training.train import TrainEvaluator

    measured = METRICS.qualities(recipe.measured)
    running = [found.name for found in measured if isinstance(found.whole, OfTexts) and found.whole.runs_code]
    if running and not trust_code:
        raise ConfigurationError(
            f"the recipe's metric {running[0]} runs generated programs on this machine: read about it in docs/llm.md,"
            " and permit it with --trust-code, best in a container without secrets and without a network"
        )
    if recipe.metrics and not trust_code:
        named = ", ".join(f"{name} ({own.place})" for name, own in recipe.metrics.items())
        raise ConfigurationError(
            f"the recipe has user-defined metrics, {named}, whose code is in {recipe.data.folder} or an installed "
            "package. Read the code, then permit it with --trust-code"
        )
    with inputs_checked():
        of_texts, greedy = recipe.task_class.generates, recipe.generation or RecipeGeneration()
        declared = [metric.declared(name, of_texts) for name, metric in recipe.metrics.items()]
        own = {metric.name: metric.loaded(Path(recipe.data.folder)) for metric in declared}
        known = METRICS.with_own(own, greedy.pattern)
        metrics = tuple(dict.fromkeys((*ALWAYS, *known.qualities(recipe.measured), *own.values())))
        splits = load_splits(recipe.data.for_loading(), recipe.task)
        if recipe.forgetting is not None:
            retained = recipe.forgetting.for_loading()
            splits = with_retained(splits, retained, recipe.data.for_loading(), recipe.task)
        tasks = [metric for metric in own.values() if isinstance(metric, LmEval)]
        splits = with_documents(splits, tasks, Path(recipe.data.folder))
        for what in ("labels", "domains"):  # outputs and routers identify them by their positions
            wanted, found = getattr(recipe, what), getattr(splits, what)
            if wanted is not None and found != wanted:
                raise ConfigurationError(
                    f"the data does not fit the recipe: it has the {what} {found}, the recipe has {wanted}"
                )
        loaded = load_backbone(
            recipe.backbone.id,
            task=recipe.task,
            labels=recipe.labels,
            revision=recipe.backbone.revision,
            dtype=recipe.backbone.dtype,
            device=device,
            backbone=recipe.host,
            quantization=recipe.backbone.quantization,
        )
        generation = Generation(max_new_tokens=greedy.max_new_tokens, run_code=trust_code)
        length = recipe.data.max_length
        evaluator = TrainEvaluator(loaded, recipe.task, splits, length, metrics, generation=generation)
    if recipe.contents is not None and (changed := recipe.contents.changes(splits, loaded.weights())):
        raise ConfigurationError(
            "data or model differ from those of the recipe's study, so its promises are not about them:\n  "
            + "\n  ".join(changed)
            + "\nrestore them, or remove `contents` from the recipe to train it all the same"
        )
    requests = [Request(candidate=recipe.candidate, seed=seed, test=True, keep_weights=True) for seed in seeds]
    runs, failed = [], []
    for seed, outcome in zip(seeds, evaluator.evaluate(requests, progress), strict=True):
        if outcome.measurement is None:
            failed.append(f"training with seed {seed} {outcome.failure}: {outcome.reason}")
        else:
            runs.append(Retrained(seed=seed, test=dict(outcome.measurement.test), outcome=outcome))
    if failed:
        ended = [
            f"seed {run.seed}: " + ", ".join(f"test {name} {value:.4f}" for name, value in run.test.items())
            for run in runs
        ]
        raise UserError("\n".join((*failed, *ended)))
    return runs


def promises(recipe: Recipe) -> dict[str, Measured]:
    """Return the metrics for which the recipe promises an interval on the test split."""
    return {name: m for name, m in recipe.measured.items() if m.split == "test" and m.low is not None}


def promises_met(recipe: Recipe, runs: Sequence[Retrained]) -> dict[str, bool]:
    """Return for each promised metric whether the mean score of the runs lies in the interval or on its better side.

    The interval covers a single run, and the mean of several runs varies less. So a verification fails by chance with a
    probability of at most 5 %, whatever the number of seeds.
    """
    verdicts = {}
    for name, promised in promises(recipe).items():
        assert promised.low is not None
        assert promised.high is not None
        mean = sum(run.test[name] for run in runs) / len(runs)
        low, high = promised.low - ROUNDING, promised.high + ROUNDING
        verdicts[name] = mean >= low if recipe.maximises(name) else mean <= high
    return verdicts


def fresh_seeds(recipe: Recipe, count: int) -> list[int]:
    """Return `count` seeds that the study has not used."""
    used = {seed for m in recipe.measured.values() for seed in m.seeds} | {recipe.seed}
    start = max(used) + 1
    return list(range(start, start + count))
