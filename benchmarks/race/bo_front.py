"""`bo` with the goal "front", for races whose goal is another: what the goal itself is worth."""

from __future__ import annotations

from dataclasses import replace

from autopeft.search_space.problem import Problem
from autopeft.searchers.bo.bayesian import Bayesian


class BoFront(Bayesian):
    """`bo`, whatever the goal of the problem."""

    name = "bo-front"
    summary = "bo that looks for the whole front"

    def __init__(self, problem: Problem, seed: int) -> None:
        super().__init__(replace(problem, goal="front"), seed)
