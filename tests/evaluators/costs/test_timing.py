"""The time of generated texts, by a clock that counts instead of passing."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autopeft.evaluators.costs.timing import text_seconds


class Machine:
    """Texts that take `prompt_s` for each prompt, and for each new token `token_s` with `row_s` for each text."""

    def __init__(self, prompt_s: float, token_s: float, row_s: float) -> None:
        self.prompt_s, self.token_s, self.row_s = prompt_s, token_s, row_s
        self.now_s = 0.0
        self.most = 0

    def generate(self, rows: int, tokens: int) -> None:
        self.most = max(self.most, rows)
        self.now_s += self.seconds(rows, tokens)

    def seconds(self, rows: int, tokens: int) -> float:
        return rows * self.prompt_s + tokens * (self.token_s + rows * self.row_s)


SECONDS = st.floats(1e-3, 10)


@given(SECONDS, SECONDS, SECONDS, st.integers(1, 64), st.integers(1, 500), st.floats(0.1, 20))
def test_the_time_is_that_of_the_texts_that_were_measured(
    prompt_s: float, token_s: float, row_s: float, rows: int, tokens: int, within_s: float
) -> None:
    machine = Machine(prompt_s, token_s, row_s)
    found = text_seconds(machine.generate, rows, tokens, within_s, lambda: machine.now_s)
    measured = machine.most
    assert 1 <= measured <= rows
    assert found == pytest.approx(machine.seconds(measured, tokens) / measured)
    # The measurement ends in time, or after the few tokens after one prompt that it needs.
    assert machine.now_s <= max(1.5 * within_s, 0.0) + 5 * machine.seconds(1, 1)


def test_all_rows_are_measured_where_there_is_time() -> None:
    machine = Machine(0.001, 0.01, 0.0)
    found = text_seconds(machine.generate, 24, 32, 5.0, lambda: machine.now_s)
    assert machine.most == 24
    assert found == pytest.approx(0.001 + 32 * 0.01 / 24)
    assert machine.now_s < 5.0
