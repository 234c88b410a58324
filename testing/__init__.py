"""Checks for plug-ins of adapters, metrics, tasks, searchers and exporters, which autopeft's own tests use too.

    from autopeft.testing import check_adapter

    def test_my_adapter():
        check_adapter(MyAdapter(rank=2), MyAdapter(rank=5))

Each check raises AssertionError with a message about the claim that fails.
"""

from __future__ import annotations

from autopeft.testing.adapters import check_adapter
from autopeft.testing.exporters import check_exporter
from autopeft.testing.metrics import check_metric
from autopeft.testing.searchers import check_searcher
from autopeft.testing.tasks import check_task

__all__ = ["check_adapter", "check_exporter", "check_metric", "check_searcher", "check_task"]
