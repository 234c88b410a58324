"""`memory`: how many candidates fit into a GPU's memory, by arithmetic."""

from __future__ import annotations

from typing import Annotated

import typer

from autopeft.benchmarks.cli.shared import print_result
from autopeft.studies.cli.options import JsonOption


def memory(
    rows: Annotated[int, typer.Option("--rows", min=1, help="Rows of a minibatch.")] = 8,
    tokens: Annotated[int, typer.Option("--tokens", min=2, help="Tokens of a row.")] = 1024,
    rank: Annotated[int, typer.Option("--rank", min=1, help="Rank of the LoRAs at all linears.")] = 16,
    dropout: Annotated[float, typer.Option("--dropout", min=0.0, max=0.9, help="Their dropout.")] = 0.0,
    as_json: JsonOption = False,
) -> None:
    """Count how many candidates fit for models of 1B, 3B and 8B on 24 and 80 GB, with and without checkpointing."""
    from autopeft.benchmarks import memory_table
    from autopeft.search_space.adapters import Lora

    found = list(memory_table.fits(rows=rows, tokens=tokens, spec=Lora(rank=rank, dropout=dropout)))
    print_result(as_json, lambda: memory_table.to_dict(found), lambda: memory_table.to_markdown(found))
