"""How often the promises of recipes hold: the finalists of finished studies, trained once more with new seeds."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from autopeft.studies.config.study_file import StudyFile
from autopeft.studies.engine.retraining import fresh_seeds, promises, retrain
from autopeft.studies.engine.session import open_ledger, read_snapshot
from autopeft.studies.errors import ConfigurationError
from autopeft.studies.recipes.build import recipe_of
from autopeft.studies.recipes.recipe import Recipe
from autopeft.studies.reports.markdown import table


@dataclass(frozen=True, slots=True, kw_only=True)
class Kept:
    """One more training of a recipe. `found`: its test score; `low`, `high`: where it was promised to end."""

    study: str
    candidate: str
    metric: str
    seed: int
    promised: float
    low: float
    high: float
    found: float

    @property
    def inside(self) -> bool:
        """Whether the score lies in the promised interval."""
        return self.low <= self.found <= self.high


def recipes(settings: StudyFile) -> Iterator[tuple[str, Recipe]]:
    """Yield name and recipe of every finalist of a finished study that has a promise."""
    ledger = open_ledger(settings)
    snapshot = read_snapshot(settings, ledger)
    for row in snapshot.best_first(snapshot.rows()):
        if row.test is not None:
            yield row.label, recipe_of(settings, ledger, snapshot, row.trial)


def check(settings: StudyFile, seeds: int, trained: Callable[[], None]) -> list[Kept]:
    """Train every recipe of a study with `seeds` seeds that it has not used; `trained` is called after each recipe.

    Raises ConfigurationError for a study without a promise.
    """
    found = []
    wanted = list(recipes(settings))
    if not wanted:
        raise ConfigurationError(f"{settings.path}: no finalist of this study has a promise")
    for name, recipe in wanted:
        ((metric, promised),) = promises(recipe).items()
        assert promised.low is not None
        assert promised.high is not None
        found += [
            Kept(
                study=settings.study,
                candidate=name,
                metric=metric,
                seed=run.seed,
                promised=promised.value,
                low=promised.low,
                high=promised.high,
                found=run.test[metric],
            )
            for run in retrain(recipe, fresh_seeds(recipe, seeds), trust_code=True)
        ]
        trained()
    return found


def to_dict(found: Sequence[Kept]) -> list[dict[str, Any]]:
    """Return a row per training, as plain data for JSON."""
    return [asdict(one) | {"inside": one.inside} for one in found]


def to_markdown(found: Sequence[Kept]) -> str:
    """Return a row per study, and one for all of them, as Markdown."""
    rows = [("study", "metric", "recipes", "trainings", "inside", "mean width of the interval")]
    groups = {study: [one for one in found if one.study == study] for study in dict.fromkeys(o.study for o in found)}
    for study, group in (groups | {"**all**": list(found)}).items():
        metrics = ", ".join(dict.fromkeys(one.metric for one in group))
        width = f"{sum(one.high - one.low for one in group) / len(group):.3f}" if "," not in metrics else ""
        inside = sum(one.inside for one in group)
        count = len({(one.study, one.candidate) for one in group})
        rows.append((study, metrics, f"{count}", f"{len(group)}", f"{inside}", width))
    return table(rows, right=range(2, 6)) + "\n"
