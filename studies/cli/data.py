"""`data`: the rows of a study as the model reads them, what of them is learnt, and what is cut."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from autopeft.studies.cli.options import JsonOption, SetOption, StudyArgument, print_json
from autopeft.studies.cli.streams import echo, on_stdout, printable
from autopeft.studies.errors import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from rich.console import Console
    from rich.text import Text

    from autopeft.evaluators.data.preview import Lengths, ShownRow

#: Characters of a longer text at its start and at its end that are shown.
_SHOWN = (400, 200)
#: What stands around learnt text where there are no colours.
_OPEN, _CLOSE = "[[", "]]"

SplitOption = Annotated[
    str, typer.Option("--split", help="Split of the shown rows: train, validation, test, retained or retained_test.")
]
RowsOption = Annotated[int, typer.Option("--rows", min=0, help="Number of rows that are shown.")]
TokensOption = Annotated[bool, typer.Option("--tokens", help="Show the tokens of these rows, one per line.")]
FullOption = Annotated[bool, typer.Option("--full", help="Show long texts whole.")]


def data(
    study: StudyArgument,
    rows: RowsOption = 3,
    split: SplitOption = "train",
    tokens: TokensOption = False,
    full: FullOption = False,
    set_: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show rows as the model reads them, with what is learnt marked; their lengths in tokens, and what is cut."""
    from rich.console import Console

    from autopeft.evaluators.data.preview import lengths_of, shown_rows
    from autopeft.evaluators.data.splits import RETAINED, SPLITS
    from autopeft.search_space.spelling import did_you_mean
    from autopeft.studies.cli.files import checked, losses
    from autopeft.studies.config.loading import load_study

    settings = load_study(study, set_ or ())
    names = SPLITS if settings.forgetting is None else (*SPLITS, *RETAINED.values())
    if split not in names:
        raise ConfigurationError(f"--split {split}: unknown split{did_you_mean(split, names)}")
    splits, _, _ = checked(settings)
    assert splits.encoded is not None
    lengths, shown = lengths_of(splits.encoded), shown_rows(splits, splits.encoded, split, rows)
    if as_json:
        print_json(
            {
                "lengths": {name: found.to_dict() for name, found in lengths.items()},
                "rows": [row.to_dict() for row in shown],
                **losses(splits),
            }
        )
        return
    for line in _table(lengths):
        echo(line)
    console = Console(highlight=False, soft_wrap=True)
    for row in shown:
        echo()
        _print_row(console, row, tokens=tokens, full=full)


def _table(lengths: Mapping[str, Lengths]) -> Iterator[str]:
    """Yield the lines of the table of lengths, at most 80 columns wide."""
    from autopeft.evaluators.data.preview import PERCENTILES

    heads = [*(f"{share} %" for share in PERCENTILES), "longest"]
    yield f"{'tokens per row':<14}{'rows':>9}" + "".join(f"{head:>8}" for head in heads) + f"{'learnt':>8}"
    for split, found in lengths.items():
        numbers = [*found.percentiles.values(), found.longest]
        learnt = "-" if found.learnt is None else f"{found.learnt / max(found.tokens - found.cut_tokens, 1):.0%}"
        yield f"{split:<14}{found.rows:>9,}" + "".join(f"{number:>8,}" for number in numbers) + f"{learnt:>8}"
    for split, found in lengths.items():
        if found.cut_rows:
            rows, tokens = found.cut_rows / found.rows, found.cut_tokens / found.tokens
            learnt = f", {found.cut_learnt:,} of them learnt" if found.cut_learnt else ""
            counts = f"{found.cut_rows:,} rows ({rows:.1%}), {found.cut_tokens:,} tokens ({tokens:.1%})"
            yield f"cut off {split}: {counts}{learnt}"


def _print_row(console: Console, row: ShownRow, *, tokens: bool, full: bool) -> None:
    from rich.text import Text

    facts = [f"{len(row.tokens):,} tokens"]
    if row.labels is None:
        facts.append(f"{sum(learnt for *_, learnt in row.tokens):,} learnt")
    else:
        facts.append(f"label {', '.join(row.labels) or 'none'}")
    facts += [f"{row.cut:,} more are cut"] if row.cut else []
    console.print(Text(on_stdout(printable(f"{row.place}: {', '.join(facts)}")), "bold"))
    coloured = console.is_terminal and console.color_system is not None and not console.no_color
    if tokens:
        for token, name, learnt in row.tokens:
            console.print(_marked(f"{token:>8}  {printable(name)}", learnt, coloured))
        return
    text = Text()
    for run, learnt in row.runs:
        text.append(_marked(printable(run if full else _shortened(run)), learnt, coloured))
    console.print(text)


def _marked(text: str, learnt: bool, coloured: bool) -> Text:
    from rich.text import Text

    if coloured:
        return Text(on_stdout(text), "black on green" if learnt else "")
    return Text(on_stdout(f"{_OPEN}{text}{_CLOSE}" if learnt else text))


def _shortened(text: str) -> str:
    start, end = _SHOWN
    left_out = len(text) - start - end
    return text if left_out <= 0 else f"{text[:start]} ...({left_out:,} characters)... {text[-end:]}"
