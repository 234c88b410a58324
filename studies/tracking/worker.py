"""Calls to a server in a thread, so that one which is slow, or never answers, does not hold up a study."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from mlflow import MlflowClient

#: Seconds that a study waits for a sync while it runs; the sync then goes on beside it.
PATIENCE_S = 20.0
#: Seconds that it waits at its end: for one call to the server, and for all of them.
CALL_S, LAST_S = 30.0, 600.0


class Worker:
    """Does one piece of work at a time.

    The time limits of HTTP clients count from byte to byte, so a server that sends one now and then meets them.
    """

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._called_at = 0.0
        self._given_up = False

    def do(self, work: Callable[[], object], *, last: bool = False) -> None:
        """Do `work` and raise its exceptions. `last`: wait longer, and stop what is not done by then.

        Raises TimeoutError if it takes too long, or if the work before it is not done yet.
        """
        self._called_at = time.monotonic()
        self._wait(last)
        self._error = None

        def run() -> None:
            try:
                work()
            except BaseException as error:
                self._error = error

        self._thread = threading.Thread(target=run, name="mlflow", daemon=True)
        self._thread.start()
        self._wait(last)
        if self._error is not None:
            raise self._error

    def _wait(self, last: bool) -> None:
        thread, began = self._thread, time.monotonic()
        if thread is None:
            return
        if not last:
            thread.join(PATIENCE_S if thread.is_alive() else 0)
        while last and thread.is_alive():
            now = time.monotonic()
            if now - began > LAST_S or now - self._called_at > CALL_S:
                break
            thread.join(min(CALL_S / 10, 1.0))
        if thread.is_alive():
            self._given_up = last
            raise TimeoutError("the server takes too long to answer")

    def watched(self, client: MlflowClient) -> MlflowClient:
        """Return a client whose calls are counted, and stop after a last piece of work that was not done in time."""
        return cast("MlflowClient", _Watched(client, self))

    def call(self, method: Callable[..., Any], *arguments: Any, **keywords: Any) -> Any:
        """Make a call of the client. Raises TimeoutError after `do` gave up."""
        if self._given_up:
            raise TimeoutError("the study has ended without this")
        try:
            return method(*arguments, **keywords)
        finally:
            self._called_at = time.monotonic()


class _Watched:
    def __init__(self, client: MlflowClient, worker: Worker) -> None:
        self._client, self._worker = client, worker

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._client, name)
        return lambda *arguments, **keywords: self._worker.call(method, *arguments, **keywords)
