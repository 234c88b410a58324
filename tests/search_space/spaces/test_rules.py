"""Which of the usual rules a space leaves out."""

from __future__ import annotations

import pytest

from autopeft.search_space import AdapterChoice, Choice, SearchSpace
from autopeft.search_space.domains import Int
from autopeft.search_space.spaces.rules import left_out
from autopeft.testing.spaces import SMALL, encoder

LINEARS = tuple(role for role in SMALL.roles if role.startswith(("attn.", "mlp.")))


def space(at: tuple[str, ...], rank: object) -> SearchSpace:
    return SearchSpace(backbone=SMALL, adapters={"lora": AdapterChoice(kind="lora", at=at, fields={"rank": rank})})


def test_a_space_with_both_rules() -> None:
    assert left_out(space(LINEARS, Choice.of([0, 2, 8]))) == {}
    assert left_out(space(LINEARS, Int(low=1, high=16))) == {}
    assert left_out(space(LINEARS, 8)) == {}


def test_roles_without_lora() -> None:
    found = left_out(space(("attn.v",), Choice.of([0, 8])))
    assert found["lora-r8-qv"] == ("attn.q",)
    assert set(found["lora-all-linear"]) == set(LINEARS) - {"attn.v"}


@pytest.mark.parametrize("rank", [4, Choice.of([0, 1, 4])])
def test_ranks_that_are_too_small(rank: object) -> None:
    assert set(left_out(space(LINEARS, rank))) == {"lora-r8-qv", "lora-all-linear"}


def test_other_kinds_are_no_lora() -> None:
    bitfit = SearchSpace(backbone=encoder(), adapters={"bias": AdapterChoice(kind="bitfit")})
    assert set(left_out(bitfit)) == {"lora-r8-qv", "lora-all-linear"}
