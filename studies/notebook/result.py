"""The results of a study as Python objects."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from autopeft.studies.errors import UserError
from autopeft.studies.notebook.arguments import in_argument_terms

if TYPE_CHECKING:
    from pandas import DataFrame

    from autopeft.search_space.architecture import Architecture
    from autopeft.search_space.problem import Trial
    from autopeft.studies.analysis.gains import Gain
    from autopeft.studies.analysis.recommendation import Standing
    from autopeft.studies.analysis.snapshot import Snapshot
    from autopeft.studies.analysis.statistics import Estimate
    from autopeft.studies.config.study_file import StudyFile
    from autopeft.studies.reports.pictures import Picture


@contextmanager
def errors_in_argument_terms() -> Iterator[None]:
    """Rewrite errors that name command-line options in terms of arguments."""
    try:
        yield
    except UserError as error:
        error.args = (in_argument_terms(str(error)),)
        raise


@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    """An evaluated candidate with the results of all its evaluations.

    `values` and `std_err`: means and standard errors by metric. `standing`, `difference`, `test`: see `FrontRow`.
    """

    trial: int
    label: str
    summary: str
    architecture: Architecture
    training: Mapping[str, Any]
    genes: Mapping[str, Any]
    values: Mapping[str, float]
    std_err: Mapping[str, float]
    on_front: bool
    recommended: bool
    standing: Standing | None
    difference: Estimate | None
    test: Estimate | None
    _result: Result = field(repr=False, compare=False)

    def export(
        self,
        to: str = "native",
        folder: str | Path | None = None,
        *,
        allow_lossy: bool = False,
        force: bool = False,
    ) -> Path:
        """Write the candidate in the format of another tool, with its weights and its recipe; return the folder.

        `to`: a name of `EXPORTERS`, such as native, peft or merged. Raises UserError if the format does not support
        the candidate, or loses something without `allow_lossy`; if there are no weights (only finalists have saved
        weights); or if the folder exists without `force`, which replaces an earlier export.
        """
        from autopeft.studies.engine.exporting import export_trial
        from autopeft.studies.engine.session import open_ledger

        result = self._result
        with errors_in_argument_terms():
            written, fit = export_trial(
                result.settings,
                open_ledger(result.settings),
                result.snapshot,
                self.trial,
                to,
                None if folder is None else Path(folder).expanduser(),
                allow_lossy=allow_lossy,
                force=force,
            )
        for line in fit.lost:
            warnings.warn(f"{to}: lost: {line}", stacklevel=2)
        return written


class Result:
    """The state of a study at one moment. `snapshot`: its trials in the form that reports use."""

    def __init__(self, settings: StudyFile, snapshot: Snapshot) -> None:
        self.settings = settings
        self.snapshot = snapshot

    @cached_property
    def candidates(self) -> tuple[Member, ...]:
        """All complete candidates, and each baseline with its best learning rate; the best quality comes first."""
        snapshot = self.snapshot
        trials: dict[int, Trial] = {trial.number: trial for trial in snapshot.trials}
        return tuple(
            Member(
                trial=row.trial,
                label=row.label,
                summary=row.summary,
                architecture=trials[row.trial].candidate.architecture,
                training=dict(trials[row.trial].candidate.training),
                genes=dict(trials[row.trial].genes),
                values=dict(row.values),
                std_err=dict(row.std_err),
                on_front=row.on_front,
                recommended=row.recommended,
                standing=row.standing,
                difference=row.difference,
                test=row.test,
                _result=self,
            )
            for row in snapshot.best_first(snapshot.front().rows)
        )

    @property
    def front(self) -> tuple[Member, ...]:
        """The candidates that no other dominates, best quality first."""
        return tuple(member for member in self.candidates if member.on_front)

    @property
    def recommended(self) -> Member:
        """The cheapest member of the front whose quality is shown to be within a margin of the best; see `reason`.

        Raises UserError if there is no front yet.
        """
        return self.pick("recommended")

    @property
    def reason(self) -> str | None:
        """Why the recommended member is recommended, in one or two sentences; None without a front."""
        return self.snapshot.front().reason

    @property
    def gains(self) -> tuple[Gain, ...]:
        """The recommended member against the baselines by rule that the study has, each with a `sentence`."""
        from autopeft.studies.analysis.gains import gains

        return tuple(gains(self.snapshot, self.snapshot.front()))

    def pick(self, choice: str) -> Member:
        """Return a candidate by `choice`: recommended, best, trial:N, or a condition such as num_params<=50000.

        A condition selects the best member of the front that meets it. Raises UserError.
        """
        from autopeft.studies.recipes.pick import pick

        with errors_in_argument_terms():
            number = pick(self.snapshot, choice)
        for member in self.candidates:
            if member.trial == number:
                return member
        raise UserError(
            f"{choice}: `candidates` has only the trial with the best learning rate of this baseline; choose that one"
        )

    def to_pandas(self) -> DataFrame:
        """Return a data frame with a row per trial: status, values with standard errors, genes."""
        import pandas

        from autopeft.studies.reports.table import trial_rows

        table = pandas.DataFrame(trial_rows(self.snapshot)).set_index("trial")
        return table.astype({"of": "Int64"})  # whole numbers with missing values

    def plot(self) -> Picture:
        """Draw the front as a matplotlib figure."""
        from autopeft.studies.reports.pictures import front_figure

        snapshot = self.snapshot
        return front_figure(
            snapshot.rows(), snapshot.objectives, study=snapshot.study, num_evaluations=len(snapshot.evaluated)
        )

    def _table(self) -> list[list[str]]:
        names = list(dict.fromkeys([*(measure.name for measure in self.snapshot.measures), "num_params"]))
        lines = [["", "candidate", *names, "what"]]
        for member in self.front:
            figures = [f"{member.values[name]:,.5g}" for name in names]
            lines.append(["*" if member.recommended else "", member.label, *figures, member.summary])
        return lines

    def __repr__(self) -> str:
        front, evaluated = self.front, len(self.snapshot.evaluated)
        lines = self._table() if front else []
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        rows = ["  ".join(map(str.ljust, line, widths)).rstrip() for line in lines]
        return "\n".join([f"{self.snapshot.study}: front of {len(front)} from {evaluated} evaluations", *rows])

    def _repr_html_(self) -> str:
        rows = ["".join(f"<td>{escape(cell)}</td>" for cell in line) for line in self._table()]
        caption = f"{self.snapshot.study}: front of {len(self.front)} from {len(self.snapshot.evaluated)} evaluations"
        return f"<table><caption>{escape(caption)}</caption>{''.join(f'<tr>{row}</tr>' for row in rows)}</table>"
