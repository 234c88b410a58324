"""Tables in Markdown."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence


def table(rows: Iterable[Sequence[str]], right: Collection[int] = ()) -> str:
    """The first row is the head. `right`: places of the columns that are aligned to the right."""
    head, *body = rows
    rule = ["---:" if place in right else "---" for place in range(len(head))]
    return "\n".join([_line(head, " "), _line(rule, ""), *(_line(row, " ") for row in body)])


def _line(cells: Sequence[str], space: str) -> str:
    return f"|{space}{f'{space}|{space}'.join(cells)}{space}|"
