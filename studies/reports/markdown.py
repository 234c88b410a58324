"""Tables in Markdown."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence


def table(rows: Iterable[Sequence[str]], right: Collection[int] = ()) -> str:
    """Format rows as a table; the first row is the head. `right`: indices of the right-aligned columns."""
    head, *body = rows
    rule = ["---:" if index in right else "---" for index in range(len(head))]
    return "\n".join([_line(head, " "), _line(rule, ""), *(_line(row, " ") for row in body)])


def _line(cells: Sequence[str], space: str) -> str:
    return f"|{space}{f'{space}|{space}'.join(cells)}{space}|"


def with_section(page: str, begin: str, end: str, text: str) -> str:
    """Return the page with `text` between the marks `begin` and `end`. Raises ValueError if a mark is missing."""
    before, first, rest = page.partition(begin)
    _, last, after = rest.partition(end)
    if not (first and last):
        raise ValueError(f"the page lacks the marks {begin} and {end}")
    return f"{before}{begin}\n\n{text}\n\n{end}{after}"
