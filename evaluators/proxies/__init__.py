"""Proxies. Command line, schema and tables derive from the registry `PROXIES`; its first is the reference to beat.

Each entry is constructed as `cls(evaluator, seed)`.
"""

from __future__ import annotations

from autopeft.evaluators.proxies.base import Proxy
from autopeft.evaluators.proxies.damping import Damping
from autopeft.evaluators.proxies.gates import Gates
from autopeft.evaluators.proxies.saliency import Fisher, GradNorm, Snip
from autopeft.evaluators.proxies.similarity import Similarity
from autopeft.evaluators.proxies.size import NumParams
from autopeft.evaluators.proxies.supernet import Supernet
from autopeft.evaluators.proxies.zero_cost import ZeroCost

PROXIES: dict[str, type[ZeroCost]] = {
    proxy.name: proxy for proxy in (NumParams, Snip, GradNorm, Fisher, Damping, Similarity)
}
#: Names of the scores that need a training of shared weights; the others are in `PROXIES`.
TRAINED = (Supernet.name, Gates.name)

__all__ = ["PROXIES", "TRAINED", "Proxy", "ZeroCost"]
