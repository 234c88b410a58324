"""The stop of a study whose trainings fail with the same error again and again.

Without it, a study goes on with the candidates that are left: its front is biased, and nothing says so.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import replace

from autopeft.search_space.backbones.backbone import Backbone
from autopeft.search_space.metrics import MetricError
from autopeft.search_space.problem import COPY, Trial
from autopeft.studies.errors import RepeatedError

#: Trainings that fail with the same error before the study stops.
MOST_FAILURES = 3


class Failures:
    """The trials of one run of a study that failed by an exception, and not by a diverged loss or a lack of memory.

    `held`: those of them that are not in the ledger yet, as they were before; the ledger has them as running. So
    `resume` trains them again if the study stops, or is interrupted, before the end of its current phase.
    """

    def __init__(self, backbone: Backbone) -> None:
        self.held: dict[int, Trial] = {}
        self._backbone = backbone
        self._failed: list[tuple[Trial, Exception]] = []

    def add(self, trial: Trial, failed: Trial, error: Exception) -> None:
        """Add a running trial, as it was and as it ended."""
        self.held[trial.number] = trial
        self._failed.append((failed, error))

    def holds(self, trial: Trial) -> bool:
        """Return whether an ended trial is held, as a copy of a trial that is held must be."""
        if trial.role == COPY and trial.of in self.held:
            self.held[trial.number] = replace(trial, state="running", error=None, violation=0.0)
        return trial.number in self.held

    def release(self) -> list[int]:
        """Hold no trial any longer, and begin to count anew; return the numbers of those that were held.

        What the ledger has as failed is not trained again, so it cannot count towards a stop that promises that.
        """
        numbers = list(self.held)
        self.held.clear()
        self._failed.clear()
        return numbers

    def check(self, trials: Iterable[Trial]) -> None:
        """Raise RepeatedError if trainings keep failing with the same error, up to numbers in its text.

        A metric may be undefined for the predictions of some candidates. So its error counts only if no training of the
        study, of which `trials` are all, has succeeded.
        """
        worked = [trial for trial in trials if trial.state in ("complete", "pruned")]
        alike: dict[str, list[Trial]] = {}
        for trial, error in self._failed:
            if not (worked and isinstance(error, MetricError)):
                alike.setdefault(re.sub(r"\d+", "#", trial.error or ""), []).append(trial)
        for failed in alike.values():
            if len(failed) >= MOST_FAILURES:
                raise RepeatedError(self._message(failed, worked))

    def _message(self, failed: Sequence[Trial], worked: Sequence[Trial]) -> str:
        """Return the error with what its trials have in common, and no trial that worked has."""
        traits = [self._traits(trial) for trial in failed]
        common = [trait for trait in traits[0] if all(trait in others for others in traits)]
        suspects = [trait for trait in common if not any(trait in self._traits(trial) for trial in worked)]
        lines = [f"{len(failed)} trainings failed with the same error: {failed[-1].error}"]
        if not worked:
            lines.append("no training has succeeded, so the cause is hardly a single adapter")
        elif suspects:
            # A kind comes before the same kind at a role.
            lines.append(f"all of them have {suspects[0]}, and no training that succeeded has it: leave it out,"
                         " in a new study, or repair the cause")  # fmt: skip
        lines.append("`autopeft resume` trains them again once the cause is repaired; other trials are kept")
        return "\n  ".join(lines)

    def _traits(self, trial: Trial) -> list[str]:
        """Return the kinds of a candidate's adapters, and then the kinds with the roles of their sites."""
        placed = list(trial.candidate.architecture.placed(self._backbone))
        kinds = dict.fromkeys(spec.kind for _, spec in placed)
        return [*kinds, *dict.fromkeys(f"{spec.kind} at {site.role}" for site, spec in placed)]
