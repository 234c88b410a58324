"""Texts for metrics: prompts and references of the rows, and what candidates generate after the prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from autopeft.evaluators.data.splits import Splits
from autopeft.evaluators.errors import DataError, MissingPackageError
from autopeft.evaluators.tasks import Example, Prompted, Task
from autopeft.search_space.metrics import Columns, OfTexts, Quality
from autopeft.search_space.metrics.texts import GENERATED, PROMPTS, REFERENCES

if TYPE_CHECKING:
    from autopeft.evaluators.attachment.attachment import Attachment

#: The splits whose texts metrics read.
SCORED = ("validation", "test")
#: Rows without a prompt that are named in one message.
MOST_NAMED = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    """How candidates generate texts.

    `max_new_tokens`: None for as many as the longest reference of the validation rows has. `at_rungs`: at every rung,
    and not only where candidates are compared, and at the end.
    """

    max_new_tokens: int | None = None
    at_rungs: bool = False


class Texts:
    """The texts of a study's rows.

    Raises DataError for validation or test rows without a prompt, and for texts that the model has no positions for,
    and MissingPackageError for the metrics.
    """

    def __init__(
        self,
        model: Any,
        task: Task,
        splits: Splits,
        examples: Mapping[str, Sequence[Example]],
        metrics: Sequence[OfTexts],
        generation: Generation,
    ) -> None:
        check_packages(metrics)
        self.model = model
        self.task = task
        self.rows = prompts_of(task, splits, examples)
        self.max_new_tokens = longest_text(self.rows, generation, task.limit(model))

    def columns(
        self, attachment: Attachment, split: str, examples: Sequence[int] | None, batch_size: int
    ) -> list[Columns]:
        """Return the columns of texts of every slot over these examples of a split (None: all), in their order.

        They are greedy texts. `batch_size`: prompts of a slot at a time, at most.
        """
        from autopeft.evaluators.generation import ends_of, greedy_of_slots

        rows = self.rows[split] if examples is None else [self.rows[split][i] for i in examples]
        tokenizer = self.task.processor
        attachment.eval()
        found = greedy_of_slots(
            self.model,
            [row.prompt for row in rows],
            attachment=attachment,
            ends=ends_of(self.model, tokenizer, [row.reference for row in self.rows["validation"]]),
            padding=tokenizer.pad_token_id,
            max_new_tokens=self.max_new_tokens,
            domains=[row.domain for row in rows] if self.task.domains else None,
            batch_size=batch_size,
        )
        attachment.train()
        given = {PROMPTS: self._read([row.prompt for row in rows])}
        given[REFERENCES] = self._read([row.reference for row in rows])
        return [{**given, GENERATED: self._read(texts)} for texts in found]

    def _read(self, texts: Sequence[Sequence[int]]) -> list[str]:
        return [self.task.processor.decode(text, skip_special_tokens=True) for text in texts]


def check_packages(metrics: Sequence[Quality]) -> None:
    """Raise MissingPackageError for a metric of texts whose package is not installed."""
    for metric in (metric.whole for metric in metrics):
        if isinstance(metric, OfTexts) and (what := metric.lacking()) is not None:
            raise MissingPackageError(what)


def prompts_of(task: Task, splits: Splits, examples: Mapping[str, Sequence[Example]]) -> dict[str, list[Prompted]]:
    """Return the prompts and references of the scored splits. Raises DataError for rows without a prompt."""
    found: dict[str, list[Prompted]] = {}
    problems = []
    for split in SCORED:
        rows = [task.prompted(example) for example in examples[split]]
        found[split] = [row for row in rows if row is not None]
        without = [splits.place(split, i) for i, row in enumerate(rows) if row is None]
        if without:
            more = f" (also {', '.join(without[1:MOST_NAMED])})" if without[1:] else ""
            problems.append(
                f"{without[0]}{more}: {len(without):,} of {len(rows):,} {split} rows have no prompt, after which a text"
                " could be generated: a row of text alone is no prompt and reference"
            )
    if problems:
        raise DataError(problems)
    return found


def longest_text(rows: Mapping[str, Sequence[Prompted]], generation: Generation, limit: int) -> int:
    """Return the number of tokens at which a text is cut off. `limit`: positions of the model.

    Raises DataError if the positions are too few for `generation.max_new_tokens` after the longest prompt.
    """
    longest = max(len(row.prompt) for split in SCORED for row in rows[split])
    wanted = generation.max_new_tokens
    if wanted is None:
        return max(1, min(max(len(row.reference) for row in rows["validation"]), limit - longest))
    if longest + wanted > limit:
        what = f"{wanted:,} tokens after the longest prompt of {longest:,} are more than the {limit:,} positions of the"
        raise DataError([f"generation.max_new_tokens: {what} model: {max(1, limit - longest):,} fit"])
    return wanted
