"""Declarations: domains, adapters, sites, spaces and architectures. Importing it does not import torch."""

from autopeft.search_space.adapters import ADAPTERS, AdapterSpec
from autopeft.search_space.architecture import Architecture, Candidate
from autopeft.search_space.backbones.backbone import Backbone, Site
from autopeft.search_space.declaration import AdapterChoice, OneOf, SpaceError
from autopeft.search_space.domains import Choice, Float, Int
from autopeft.search_space.problem import METRICS, Fidelity, Measurement, Objective, Problem, Trial
from autopeft.search_space.spaces.genes import Assignment
from autopeft.search_space.spaces.presets import BASELINES, PRESETS
from autopeft.search_space.spaces.space import SearchSpace
from autopeft.search_space.training import Training

__all__ = [
    "ADAPTERS", "BASELINES", "METRICS", "PRESETS",
    "AdapterChoice", "AdapterSpec", "Architecture", "Assignment", "Backbone", "Candidate", "Choice", "Fidelity",
    "Float", "Int", "Measurement", "Objective", "OneOf", "Problem", "SearchSpace", "Site", "SpaceError", "Training",
    "Trial",
]  # fmt: skip
