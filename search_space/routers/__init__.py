"""Routers of mixtures, one file each. `Mixture` and the checks of a space derive from the registry `ROUTERS`."""

from __future__ import annotations

from autopeft.search_space.registry import Registry
from autopeft.search_space.routers.arrow import Arrow
from autopeft.search_space.routers.base import Router
from autopeft.search_space.routers.follow import Follow
from autopeft.search_space.routers.poly import Poly
from autopeft.search_space.routers.sequence import Sequence
from autopeft.search_space.routers.sigmoid import Sigmoid
from autopeft.search_space.routers.soft import Soft
from autopeft.search_space.routers.task import Task
from autopeft.search_space.routers.token import Token
from autopeft.search_space.routers.uniform import Uniform
from autopeft.search_space.routers.xlora import XLora

ROUTERS: Registry[Router] = Registry(
    "autopeft.routers",
    Router,
    "name",
    (Token(), Sigmoid(), Sequence(), Task(), Poly(), Soft(), Arrow(), XLora(), Uniform(), Follow()),
    instances=True,
)

__all__ = [
    "ROUTERS",
    "Arrow",
    "Follow",
    "Poly",
    "Router",
    "Sequence",
    "Sigmoid",
    "Soft",
    "Task",
    "Token",
    "Uniform",
    "XLora",
]
