"""What is lost of rows on their way to a model: tokens that are cut off, and parts that nothing reads."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Self

from autopeft.evaluators.tasks import Example, Task


@dataclass(frozen=True, slots=True)
class Unread:
    """A part of the rows that nothing reads: what to do about it, and the number of rows by split that have it."""

    advice: str
    rows: Counter[str] = field(default_factory=Counter)

    @classmethod
    def counted(cls, found: Mapping[str, Iterable[Mapping[str, str]]]) -> dict[str, Self]:
        """Return these parts by name, from the parts and the advice of each row by split."""
        counted: dict[str, Self] = {}
        for split, rows in found.items():
            for row in rows:
                for name, advice in row.items():
                    counted.setdefault(name, cls(advice)).rows[split] += 1
        return counted


@dataclass(frozen=True, slots=True, kw_only=True)
class Truncation:
    """What `data.max_length` cuts off the rows; numbers of rows are by split.

    `rows`: that lose tokens, `tokens`: how many in all, `learnt`: those of them with a loss. `prompts`: that lose the
    beginning of their prompt, `no_prompt`: that lose all of it. `ends`: that lose the end of the text or completion,
    and with it the end-of-text token. `enough`: the `data.max_length` that keeps 99 % of all rows whole, as far as the
    model takes it.
    """

    max_length: int
    enough: int
    tokens: int
    learnt: int = 0
    rows: Counter[str]
    prompts: Counter[str]
    no_prompt: Counter[str]
    ends: Counter[str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Encoded:
    """Examples by split, the task that encoded them, and what was lost."""

    task: Task
    examples: dict[str, list[Example]]
    truncation: Truncation
    unread: Mapping[str, Unread] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return the losses as data: `truncation` and `unread_fields`."""
        cut = self.truncation
        return {
            "truncation": {
                "max_length": cut.max_length,
                "max_length_for_99_percent": cut.enough,
                "tokens": cut.tokens,
                "learnt_tokens": cut.learnt,
                **{
                    name: self._by_split(rows)
                    for name, rows in (
                        ("rows", cut.rows),
                        ("rows_with_cut_prompt", cut.prompts),
                        ("rows_without_prompt", cut.no_prompt),
                        ("rows_with_cut_end", cut.ends),
                    )
                },
            },
            "unread_fields": {
                name: {"rows": self._by_split(lost.rows), "advice": lost.advice} for name, lost in self.unread.items()
            },
        }

    def warnings(self) -> Iterator[str]:
        """Yield the losses as texts."""
        cut = self.truncation
        if cut.tokens:
            details = [
                f"{rows.total():,} lose {what}"
                for rows, what in (
                    (cut.prompts - cut.no_prompt, "the beginning of their prompt"),
                    (cut.no_prompt, "their whole prompt"),
                    (cut.ends, "their end"),
                )
                if rows
            ]
            enough = f"; {cut.enough} would keep 99 % of the rows whole" if cut.enough > cut.max_length else ""
            learnt = f", {cut.learnt:,} of them learnt" if cut.learnt else ""
            yield (
                f"data.max_length: {cut.max_length} cuts {self._shares(cut.rows)}, {cut.tokens:,} tokens in all"
                f"{learnt}: {', '.join(details)}{enough}"
            )
        for name, lost in self.unread.items():
            yield f"{name} is not read, in {self._shares(lost.rows)}: {lost.advice}"

    def _by_split(self, rows: Counter[str]) -> dict[str, int]:
        return {split: rows[split] for split in self.examples}

    def _shares(self, rows: Counter[str]) -> str:
        shares = [f"{rows[split]:,} of {len(all_):,} {split}" for split, all_ in self.examples.items() if rows[split]]
        return f"{' and '.join([', '.join(shares[:-1]), shares[-1]] if shares[1:] else shares)} rows"
