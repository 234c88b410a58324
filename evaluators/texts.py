"""Texts for metrics: prompts and references of the rows, and what candidates generate after the prompts."""

from __future__ import annotations

import ast
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from autopeft.evaluators.data.splits import Splits
from autopeft.evaluators.errors import DataError, MissingPackageError
from autopeft.evaluators.tasks import Example, Prompted, Task
from autopeft.search_space.metrics import Columns, MetricError, OfTexts, Quality
from autopeft.search_space.metrics.programs import PassAt1, program_of
from autopeft.search_space.metrics.texts import CONTINUATIONS, GENERATED, PROMPTS, REFERENCES, STARTS, TESTS

if TYPE_CHECKING:
    from autopeft.evaluators.attachment.attachment import Attachment

#: The splits whose texts metrics read.
SCORED = ("validation", "test")
#: Rows without a prompt that are named in one message.
MOST_NAMED = 3
#: Rows of a split whose tests are tried before a study.
MOST_TRIED = 16
#: How a study consents to running generated programs.
CONSENT = (
    "read about it in docs/llm.md, and consent with generation: {run_code: true}, best in a container without secrets"
    " and without a network"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    """How candidates generate texts.

    `max_new_tokens`: None for as many as the longest reference of the validation rows has. `at_rungs`: at every rung,
    and not only where candidates are compared, and at the end. `run_code`: whether metrics may run generated programs.
    """

    max_new_tokens: int | None = None
    at_rungs: bool = False
    run_code: bool = False


class Texts:
    """The texts of a study's rows.

    Raises DataError for validation or test rows without a prompt or the tests of their programs, and for texts that the
    model has no positions for, MissingPackageError for the metrics, and MetricError for those that run programs without
    consent.
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
        running = next((metric.name for metric in metrics if metric.runs_code), None)
        if running and not generation.run_code:
            raise MetricError(f"the metric {running} runs generated programs on this machine: {CONSENT}")
        self.model = model
        self.task = task
        self.rows = prompts_of(task, splits, examples)
        self.programs = programs_of(splits) if running else None
        self.max_new_tokens = longest_text(self.rows, generation, task.limit(model))

    def columns(
        self, attachment: Attachment, split: str, examples: Sequence[int] | None, batch_size: int
    ) -> list[Columns]:
        """Return the columns of texts of every slot over these examples of a split (None: all), in their order.

        They are greedy texts. `batch_size`: prompts of a slot at a time, at most.
        """
        from autopeft.evaluators.generation import ends_of

        chosen = range(len(self.rows[split])) if examples is None else examples
        rows = [self.rows[split][i] for i in chosen]
        ends = ends_of(self.model, self.task.processor, [row.reference for row in self.rows["validation"]])
        attachment.eval()
        found = self._greedy(attachment, rows, ends, self.max_new_tokens, batch_size)
        attachment.train()
        given = {PROMPTS: self._read([row.prompt for row in rows])}
        given[REFERENCES] = self._read([row.reference for row in rows])
        if self.programs is None:
            return [{**given, GENERATED: self._read(texts)} for texts in found]
        given[STARTS], given[TESTS] = map(list, zip(*(self.programs[split][i] for i in chosen), strict=True))
        return [
            {**given, GENERATED: self._read(texts), CONTINUATIONS: self.continuations(rows, texts)} for texts in found
        ]

    def seconds(self, attachment: Attachment, batch_size: int, within_s: float) -> float:
        """Return the seconds of a text of `max_new_tokens` after a prompt of median length; see `text_seconds`.

        Texts may end before.
        """
        from autopeft.evaluators.costs.timing import now, text_seconds

        rows = sorted(self.rows["validation"], key=lambda row: len(row.prompt))
        size = min(batch_size, len(rows))
        rows = rows[(len(rows) - size) // 2 :][:size]

        def generate(count: int, tokens: int) -> None:
            self._greedy(attachment, rows[(size - count) // 2 :][:count], (), tokens, batch_size)

        attachment.eval()
        found = text_seconds(generate, size, self.max_new_tokens, within_s, lambda: now(self.model.device))
        attachment.train()
        return found

    def _greedy(
        self,
        attachment: Attachment,
        rows: Sequence[Prompted],
        ends: Collection[int],
        max_new_tokens: int,
        batch_size: int,
    ) -> list[list[list[int]]]:
        """Return the tokens that every slot generates after the prompts of rows; see `greedy_of_slots`."""
        from autopeft.evaluators.generation import greedy_of_slots

        return greedy_of_slots(
            self.model,
            [row.prompt for row in rows],
            attachment=attachment,
            ends=ends,
            padding=self.task.processor.pad_token_id,
            max_new_tokens=max_new_tokens,
            domains=[row.domain for row in rows] if self.task.domains else None,
            batch_size=batch_size,
        )

    def continuations(self, rows: Sequence[Prompted], texts: Sequence[Sequence[int]]) -> list[str]:
        """Return the texts as they continue their prompts: some tokenizers drop white space where a text begins."""
        wholes = self._read([[*row.prompt, *text] for row, text in zip(rows, texts, strict=True)])
        prompts = self._read([row.prompt for row in rows])
        return [whole[len(prompt) :] for whole, prompt in zip(wholes, prompts, strict=True)]

    def _read(self, texts: Sequence[Sequence[int]]) -> list[str]:
        return [self.task.processor.decode(text, skip_special_tokens=True) for text in texts]


def check_packages(metrics: Sequence[Quality]) -> None:
    """Raise MissingPackageError for a metric whose package is not installed."""
    for metric in metrics:
        if (what := metric.whole.lacking()) is not None:
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


def programs_of(splits: Splits) -> dict[str, list[tuple[str, str]]]:
    """Return for the scored rows what precedes the text in its program, and the tests of the program.

    A text continues the prompt where prompt and completion together are a program. Elsewhere, as in chats and after
    instructions, it is a program of its own. Raises DataError for rows without tests, and for tests that are no Python.
    """
    found: dict[str, list[tuple[str, str]]] = {}
    problems = []
    for split in SCORED:
        rows: list[Any] = getattr(splits, split)
        wrong = [(splits.place(split, i), what) for i, row in enumerate(rows) if (what := _wrong_tests(row))]
        found[split] = [(_start(row), row.get("tests", "")) for row in rows]
        if wrong:
            place, what = wrong[0]
            problems.append(f"{place}: {what}; {len(wrong):,} of {len(rows):,} {split} rows have no tests that can run")
    if problems:
        raise DataError(problems)
    return found


def tests_problems(splits: Splits, programs: Mapping[str, Sequence[tuple[str, str]]]) -> Iterator[str]:
    """Yield the problems of some rows' tests: those that no reference passes, and those that an empty text passes.

    `programs`: of `programs_of`. It runs code of the rows.
    """
    for split, found in programs.items():
        tried = range(len(found))[:: max(1, len(found) // MOST_TRIED)][:MOST_TRIED]
        starts, tests = map(list, zip(*(found[i] for i in tried), strict=True))
        references = [answer_of(getattr(splits, split)[i]) for i in tried]
        failed = PassAt1.problems(starts, references, tests)
        if all(failed):
            place = splits.place(split, tried[0])
            yield f"{place}: no reference passes its tests, of {len(tried)} {split} rows that were tried: {failed[0]}"
            continue
        empty = PassAt1.problems(starts, [""] * len(tried), tests)
        passed = [splits.place(split, i) for i, problem in zip(tried, empty, strict=True) if not problem]
        if passed:
            yield f"{passed[0]}: the tests test nothing: a text without a character passes ({len(passed)} {split} rows)"


def answer_of(row: Mapping[str, Any]) -> str:
    """Return the text of a row that is generated: its completion, or a chat's last answer."""
    if "messages" not in row:
        return str(row["completion"])
    return next(str(each.get("content") or "") for each in reversed(row["messages"]) if each["role"] == "assistant")


def _start(row: Mapping[str, Any]) -> str:
    prompt = row.get("prompt", "")
    return prompt if prompt and _syntax_error(program_of(prompt, row["completion"])) is None else ""


def _wrong_tests(row: Mapping[str, Any]) -> str | None:
    if "tests" not in row:
        return "the column of data.tests is missing or empty"
    error = _syntax_error(row["tests"])
    return error and f"its tests are no Python: {error}"


def _syntax_error(source: str) -> str | None:
    try:
        ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        return str(error)
    return None


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
