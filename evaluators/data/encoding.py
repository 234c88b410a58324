"""Rows as a model reads them: encoded once, with every problem at its line and a count of what is lost on the way."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from autopeft.evaluators.data.losses import Encoded, Truncation, Unread
from autopeft.evaluators.data.reading import MOST_PROBLEMS_PER_FILE
from autopeft.evaluators.data.splits import Splits
from autopeft.evaluators.errors import DataError
from autopeft.evaluators.rows import Row
from autopeft.evaluators.tasks import Cut, Example, Task

#: Rows that are encoded at a time: tokenizers are faster with many, and progress is shown in between.
CHUNK = 1000
#: The check of a split stops after this many rows with problems, each of which is encoded alone.
MOST_BAD_ROWS = 1000
#: Share of the rows that the suggested `data.max_length` keeps whole.
WHOLE = 0.99
#: Most rows that are named after the first one with the same problem.
MOST_NAMED = 2

#: Pairs of a row's position in its split and its problem.
Problems = list[tuple[int, str]]


def encode_splits(
    task: Task, splits: Splits, model: Any, progress: Callable[[int, int], None] | None = None
) -> Encoded:
    """Encode the rows of all splits, and check that the model can read them.

    `model`: with or without weights (on torch's meta device). `progress`: called with the number of encoded rows and of
    all rows. What an equal task has encoded before is returned at once. Raises DataError with every problem at the
    place of its row, up to five per split.
    """
    if splits.encoded is not None and _equal(splits.encoded.task, task):
        return splits.encoded
    examples: dict[str, list[Example]] = {}
    problems: list[str] = []
    total, done = sum(len(getattr(splits, split)) for split in splits.names), 0
    for split in splits.names:
        rows: Sequence[Row] = getattr(splits, split)
        examples[split], wrong = [], []
        for start in range(0, len(rows), CHUNK):
            found, bad = _encode(task, rows[start : start + CHUNK])
            examples[split] += found
            wrong += [(start + position, what) for position, what in bad]
            done += len(rows[start : start + CHUNK])
            if progress is not None:
                progress(done, total)
            if len(wrong) >= MOST_BAD_ROWS:
                break
        if not wrong:
            for position, what in task.misfits(model, examples[split]):
                if position is None:
                    problems += [what] if what not in problems else []
                else:
                    wrong.append((position, what))
        problems += _placed(splits, split, wrong)
    if problems:
        raise DataError(problems)
    truncation = _truncation(task, examples, task.limit(model))
    problems += _without_prompts(truncation, splits)
    if problems:
        raise DataError(problems)
    left_out = Unread.counted(
        {split: (example.get("unread", {}) for example in found) for split, found in examples.items()}
    )
    return Encoded(task=task, examples=examples, truncation=truncation, unread={**splits.unread, **left_out})


def _equal(one: Task, other: Task) -> bool:
    def settings(task: Task) -> Any:
        template = getattr(task.processor, "chat_template", None)
        return type(task), task.max_length, task.labels, task.domains, repr(task.processor), template

    return bool(settings(one) == settings(other))


def _encode(task: Task, rows: Sequence[Row]) -> tuple[list[Example], Problems]:
    try:
        return task.encode(rows), []
    except Exception:  # of one of the rows, by a tokenizer or a template, which have exceptions of their own
        pass
    examples: list[Example] = []
    wrong: Problems = []
    for position, row in enumerate(rows):
        try:
            examples += task.encode([row])
        except DataError as error:
            wrong += [(position, what) for what in error.problems]
        except Exception as error:  # as above
            reason = (str(error).strip() or "no reason given").splitlines()[0]
            wrong.append((position, f"cannot be encoded: {type(error).__name__}: {reason}"))
    return examples, wrong


def _placed(splits: Splits, split: str, wrong: Problems) -> Iterator[str]:
    """Yield the distinct problems of a split with the places of the first rows that have them."""
    rows: dict[str, list[int]] = {}
    for position, what in sorted(wrong):
        rows.setdefault(what, []).append(position)
    for what, (first, *others) in list(rows.items())[:MOST_PROBLEMS_PER_FILE]:
        named = [splits.place(split, position) for position in others[:MOST_NAMED]]
        more = [f"{len(others) - MOST_NAMED:,} more rows"] if len(others) > MOST_NAMED else []
        also = f" (also {', '.join([*named, *more])})" if others else ""
        yield f"{splits.place(split, first)}: {what}{also}"
    if len(rows) > MOST_PROBLEMS_PER_FILE:
        yield f"{split}: {len(rows) - MOST_PROBLEMS_PER_FILE:,} more problems of rows"
    if len({position for position, _ in wrong}) >= MOST_BAD_ROWS:
        yield f"{split}: the check stopped after {MOST_BAD_ROWS:,} rows with problems"


def _truncation(task: Task, examples: Mapping[str, Sequence[Example]], limit: int) -> Truncation:
    def rows(has: Callable[[Cut], object]) -> Counter[str]:
        counts = {split: sum(bool(has(cut)) for cut in _cuts(found)) for split, found in examples.items()}
        return +Counter(counts)

    everything = [example for found in examples.values() for example in found]
    lengths = sorted(task.length(example) + _lost(example) for example in everything)
    return Truncation(
        max_length=task.max_length,
        enough=min(lengths[math.ceil(WHOLE * len(lengths)) - 1], limit),
        tokens=sum(map(_lost, everything)),
        learnt=sum(cut.learnt for cut in _cuts(everything)),
        rows=rows(lambda cut: True),
        prompts=rows(lambda cut: cut.prompt),
        no_prompt=rows(lambda cut: cut.no_prompt),
        ends=rows(lambda cut: cut.text),
    )


def _cuts(examples: Iterable[Example]) -> Iterator[Cut]:
    return (example["cut"] for example in examples if "cut" in example)


def _lost(example: Example) -> int:
    return example["cut"].prompt + example["cut"].text if "cut" in example else 0


def _without_prompts(cut: Truncation, splits: Splits) -> Iterator[str]:
    """Yield a problem if most rows lose their whole prompt: nothing is left that a completion could depend on."""
    for split in splits.names:
        lost, total = cut.no_prompt[split], len(getattr(splits, split))
        if 2 * lost > total:
            yield (
                f"data.max_length: {cut.max_length} leaves nothing of the prompt of {lost:,} of {total:,} {split} rows;"
                f" {cut.enough} would keep 99 % of the rows whole"
            )
