"""The evaluations of a study that no searcher proposes: baselines ahead of the search, finalists and what mixtures are
compared with behind it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from autopeft.search_space.architecture import Candidate
from autopeft.search_space.controls import CONTROLS
from autopeft.search_space.presets import BASELINES
from autopeft.search_space.space import SearchSpace
from autopeft.studies.study_file import StudyFile

#: Roles of trials; a name follows that of a baseline and of a control.
BASELINE, FINALIST, CONTROL = "baseline:", "finalist", "control:"


@dataclass(frozen=True, slots=True)
class Planned:
    """An evaluation that is still to be made."""

    role: str
    candidate: Candidate
    seed: int
    of: int | None = None


def baselines(settings: StudyFile, space: SearchSpace) -> Iterator[Planned]:
    """Every baseline at every learning rate; other training fields as in the study, searched ones at their middle."""
    middle = space.middle.training
    for name in settings.baselines.names:
        architecture = BASELINES[name](space.backbone)
        if not architecture and not (name == "head" and space.backbone.head_modules):
            continue  # a model without a head, or without what the baseline trains (biases): nothing to compare with
        own = settings.baselines.full_learning_rates if name == "full" else settings.baselines.learning_rates
        for rate in own:
            candidate = Candidate(architecture=architecture, training={**middle, "learning_rate": rate})
            yield Planned(BASELINE + name, candidate, settings.seed)


def num_finals(settings: StudyFile) -> int:
    """Evaluations of the final front at most: contenders, what mixtures among them are compared with, and tuned
    baselines, each with every fresh seed.
    """
    mixed = any("experts" in adapter.fields for adapter in settings.space.adapters.values())
    each = 1 + len(CONTROLS) * (mixed and settings.finalists.controls)
    return (settings.finalists.most * each + len(settings.baselines.names)) * settings.finalists.seeds


def num_evaluations(settings: StudyFile, space: SearchSpace) -> int:
    """Evaluations of the whole study at most."""
    return len(list(baselines(settings, space))) + settings.search.trials + num_finals(settings)
