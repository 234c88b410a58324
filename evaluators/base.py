"""What every evaluator promises."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from autopeft.search_space.architecture import Candidate
from autopeft.search_space.problem import Fidelity, Measurement

if TYPE_CHECKING:
    from autopeft.evaluators.attachment.attachment import Attachment
    from autopeft.evaluators.tasks import Batch, Task
    from autopeft.search_space.backbones.backbone import Backbone


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One candidate to evaluate. `test`: score the test split too. `keep_weights`: return the trained tensors."""

    candidate: Candidate
    seed: int = 0
    fidelity: Fidelity = field(default_factory=Fidelity)
    test: bool = False
    keep_weights: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """A measurement, or the reason why there is none: the candidate failed, or this machine cannot train it."""

    measurement: Measurement | None = None
    failure: Literal["failed", "infeasible"] | None = None
    reason: str = ""
    weights: Mapping[str, Tensor] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Costs:
    """Costs of a candidate by metric name, and the spread (interquartile range) of the measured ones."""

    values: Mapping[str, float]
    spread: Mapping[str, float] = field(default_factory=dict)


class OutOfMemoryError(RuntimeError):
    """This machine cannot hold a candidate."""


@contextmanager
def memory_errors() -> Iterator[None]:
    """Turns every way in which torch runs out of memory into OutOfMemoryError."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise OutOfMemoryError(f"out of memory: {str(error).split(chr(10))[0]}") from error
    except RuntimeError as error:
        # Neither torch's CPU allocator nor CUDA's libraries have an exception class of their own.
        if not any(words in str(error) for words in ("allocate memory", "out of memory", "ALLOC_FAILED")):
            raise
        raise OutOfMemoryError(f"out of memory: {str(error).split(chr(10))[0]}") from error


#: Called with the steps done and the steps there are, summed over the batch of requests.
Progress = Callable[[int, int], None]


#: Called with the place of a request and its outcome.
Ended = Callable[[int, Outcome], None]
#: Called at a rung with its share of the steps and, of every candidate that came so far, the place of the request and
#: held-out loss and accuracy; returns the places of those that go on.
Select = Callable[[float, Sequence[tuple[int, Mapping[str, float]]]], Collection[int]]


class Evaluator(ABC):
    """Turns candidates into measurements. It sees architectures and data, never search strategies."""

    name: str

    @abstractmethod
    def costs(self, candidate: Candidate, measured: frozenset[str] = frozenset()) -> Costs:
        """What a candidate costs, before any training: the declared metrics, and those named in `measured`.

        Raises OutOfMemoryError where measuring needs more than there is.
        """

    @abstractmethod
    def num_steps(self, request: Request) -> int:
        """Training steps that the request will take."""

    @abstractmethod
    def evaluate(
        self,
        requests: Sequence[Request],
        progress: Progress | None = None,
        *,
        ended: Ended | None = None,
        select: Select | None = None,
    ) -> list[Outcome]:
        """One outcome per request, in order. Failures of a candidate are outcomes, not exceptions.

        With `select`, all requests have one fidelity, and a candidate that it leaves out at a rung ends there: its
        measurement has that rung's share and values. `ended` is called as soon as an outcome is certain.
        """


class Attaching(Evaluator):
    """An evaluator with a model on a device, to which the adapters of a candidate can be attached."""

    backbone: Backbone
    task: Task
    device: torch.device

    @abstractmethod
    def attach(self, request: Request) -> Attachment:
        """The candidate on the model, as one slot; a context manager."""

    @abstractmethod
    def longest_batch(self, candidate: Candidate) -> Batch:
        """A full training batch of the longest rows."""
