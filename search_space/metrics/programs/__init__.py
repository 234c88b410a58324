"""pass@1 of generated programs: the share of rows whose one greedy text passes the tests of its row."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from typing_extensions import override

from autopeft.search_space.metrics.programs.sandbox import verdicts
from autopeft.search_space.metrics.texts import CONTINUATIONS, STARTS, TESTS, ShareOfTexts

#: A block of code in Markdown, also one that is not closed.
_FENCE = re.compile(r"^[ \t]*```[ \t]*(?:python3?|py)?[ \t]*\n(.*?)(?:^[ \t]*```|\Z)", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True, slots=True, kw_only=True)
class PassAt1(ShareOfTexts):
    """1 where the program of the generated text passes the tests of its row, else 0 (Chen et al. 2021, HumanEval).

    One greedy text per row, which is pass@1 at temperature zero. It runs generated code, which needs the study's
    consent; the evaluator checks it.
    """

    reads: ClassVar[tuple[str, str, str]] = (STARTS, CONTINUATIONS, TESTS)
    runs_code: ClassVar[bool] = True

    name: str = "pass-at-1"
    summary: str = "generated texts of the validation rows that are programs which pass the tests of their rows"

    @override
    def of(self, prompts: Sequence[str], generated: Sequence[str], references: Sequence[str]) -> Sequence[float]:
        """Return a number per row. `prompts`: what precedes the texts in their programs. `references`: the tests."""
        return [float(not problem) for problem in self.problems(prompts, generated, references)]

    @staticmethod
    def problems(starts: Sequence[str], texts: Sequence[str], tests: Sequence[str]) -> list[str]:
        """Return for each text why its program does not pass, in one line; "" if it passes."""
        return verdicts([program_of(*pair) for pair in zip(starts, texts, strict=True)], tests)

    @override
    def lacking(self) -> str | None:
        return None if os.name == "posix" else f"the metric {self.name} runs programs under POSIX systems only"


def program_of(start: str, text: str) -> str:
    """Return the program of a text: the code in the first fence that ends in the text, or `start` with the text.

    `start`: the prompt, where the text continues a program; "" in a chat. A fence may be open at the end of the prompt.
    """
    whole = start + text
    fenced = next((found for found in _FENCE.finditer(whole) if found.end() > len(start)), None)
    return whole if fenced is None else fenced[1]
