"""What a study found, as Python objects."""

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
from autopeft.studies.notebook.arguments import in_words_of_arguments

if TYPE_CHECKING:
    from pandas import DataFrame

    from autopeft.search_space.architecture import Architecture
    from autopeft.search_space.problem import Trial
    from autopeft.studies.analysis.snapshot import Snapshot
    from autopeft.studies.config.study_file import StudyFile
    from autopeft.studies.reports.pictures import Picture


@contextmanager
def own_words() -> Iterator[None]:
    """Errors that name options of commands name arguments in their place."""
    try:
        yield
    except UserError as error:
        error.args = (in_words_of_arguments(str(error)),)
        raise


@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    """A candidate that was evaluated: what it is, and what was measured over all its evaluations.

    `values` and `std_err` are by metric.
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
    _result: Result = field(repr=False, compare=False)

    def export(
        self,
        to: str = "native",
        folder: str | Path | None = None,
        *,
        allow_lossy: bool = False,
        force: bool = False,
    ) -> Path:
        """Write it in the format of another tool, with its trained weights and its recipe; returns the folder.

        `to`: a name of `EXPORTERS`, such as native, peft or merged. Raises UserError: the format cannot hold it, or loses
        something and `allow_lossy` is not set; there are no weights (only the finalists keep theirs); the folder is
        in use and `force`, which replaces an earlier export, is not set.
        """
        from autopeft.studies.engine.exporting import export_trial
        from autopeft.studies.engine.session import open_ledger

        result = self._result
        with own_words():
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
    """A study at one moment. `snapshot` has the trials as the reports see them."""

    def __init__(self, settings: StudyFile, snapshot: Snapshot) -> None:
        self.settings = settings
        self.snapshot = snapshot

    @cached_property
    def candidates(self) -> tuple[Member, ...]:
        """Every complete candidate, and of each baseline the one with the best learning rate; best quality first."""
        snapshot = self.snapshot
        trials: dict[int, Trial] = {trial.number: trial for trial in snapshot.trials}
        quality = snapshot.objectives_by_name.get(snapshot.quality)
        rows = snapshot.rows()
        if quality is not None:
            rows.sort(key=lambda row: quality.loss(row.values[quality.name]))
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
                _result=self,
            )
            for row in rows
        )

    @property
    def front(self) -> tuple[Member, ...]:
        """The candidates that no other dominates, best quality first."""
        return tuple(member for member in self.candidates if member.on_front)

    @property
    def recommended(self) -> Member:
        """The cheapest member of the front that the paired test cannot tell from the best.

        Raises UserError if there is no front yet.
        """
        return self.pick("recommended")

    def pick(self, wish: str) -> Member:
        """Return the candidate that `wish` names. Raises UserError.

        recommended, best, trial:N, or a condition as num_params<=50000 (the best of the front that meets it).
        """
        from autopeft.studies.recipes.pick import pick

        with own_words():
            number = pick(self.snapshot, wish)
        for member in self.candidates:
            if member.trial == number:
                return member
        raise UserError(f"{wish}: another learning rate of this baseline was better; that one is among `candidates`")

    def to_pandas(self) -> DataFrame:
        """One row for each trial: status, values with standard errors, genes."""
        import pandas

        from autopeft.studies.reports.table import trial_rows

        table = pandas.DataFrame(trial_rows(self.snapshot)).set_index("trial")
        return table.astype({"of": "Int64"})  # with gaps, and whole

    def plot(self) -> Picture:
        """Draw the front as a matplotlib figure."""
        from autopeft.studies.reports.pictures import front_figure

        snapshot = self.snapshot
        return front_figure(
            snapshot.rows(), snapshot.objectives, study=snapshot.study, num_evaluations=len(snapshot.ended)
        )

    def _table(self) -> list[list[str]]:
        names = list(dict.fromkeys([*self.snapshot.objectives_by_name, "num_params"]))
        lines = [["", "candidate", *names, "what"]]
        for member in self.front:
            figures = [f"{member.values[name]:,.5g}" for name in names]
            lines.append(["*" if member.recommended else "", member.label, *figures, member.summary])
        return lines

    def __repr__(self) -> str:
        front, ended = self.front, len(self.snapshot.ended)
        lines = self._table() if front else []
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        rows = ["  ".join(map(str.ljust, line, widths)).rstrip() for line in lines]
        return "\n".join([f"{self.snapshot.study}: front of {len(front)} from {ended} evaluations", *rows])

    def _repr_html_(self) -> str:
        rows = ["".join(f"<td>{escape(cell)}</td>" for cell in line) for line in self._table()]
        caption = f"{self.snapshot.study}: front of {len(self.front)} from {len(self.snapshot.ended)} evaluations"
        return f"<table><caption>{escape(caption)}</caption>{''.join(f'<tr>{row}</tr>' for row in rows)}</table>"
