"""The interface of evaluators: requests, outcomes, costs."""

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
    """A candidate to evaluate. `test`: also score the test split. `keep_weights`: return the trained tensors."""

    candidate: Candidate
    seed: int = 0
    fidelity: Fidelity = field(default_factory=Fidelity)
    test: bool = False
    keep_weights: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """A measurement, or the reason for its absence: a failed training, or an infeasible candidate on this machine.

    `error`: the exception behind a failure, except for a diverged loss and a lack of memory, which candidates cause by
    their values.
    """

    measurement: Measurement | None = None
    failure: Literal["failed", "infeasible"] | None = None
    reason: str = ""
    error: Exception | None = None
    weights: Mapping[str, Tensor] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Costs:
    """Costs of a candidate by metric name, and the interquartile range (`spread`) of the measured ones."""

    values: Mapping[str, float]
    spread: Mapping[str, float] = field(default_factory=dict)


class OutOfMemoryError(RuntimeError):
    """A candidate does not fit into the memory of this machine."""


@contextmanager
def memory_errors() -> Iterator[None]:
    """Turn every out-of-memory exception of torch into OutOfMemoryError."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise OutOfMemoryError(f"out of memory: {str(error).split(chr(10))[0]}") from error
    except RuntimeError as error:
        # Neither torch's CPU allocator nor CUDA's libraries have exception classes of their own.
        if not any(words in str(error) for words in ("allocate memory", "out of memory", "ALLOC_FAILED")):
            raise
        raise OutOfMemoryError(f"out of memory: {str(error).split(chr(10))[0]}") from error


#: Called with the number of completed steps and of all steps, summed over the requests.
Progress = Callable[[int, int], None]
#: Called with the index of a request and its outcome.
OnOutcome = Callable[[int, Outcome], None]
#: Called at a rung with its share of the steps and, for each candidate that reached it, the index of its request and
#: its held-out metrics by name; returns the indices of the requests that continue.
Select = Callable[[float, Sequence[tuple[int, Mapping[str, float]]]], Collection[int]]


class Evaluator(ABC):
    """Measures candidates. An evaluator depends on architectures and data, and not on the search strategy."""

    name: str
    #: Sentences for the user about this model and these data, shown once when a study opens.
    notes: tuple[str, ...] = ()

    def notes_on(self, largest: Candidate) -> tuple[str, ...]:
        """Return `notes`, and sentences about the training of the largest candidate on this machine."""
        return self.notes

    @abstractmethod
    def costs(self, candidate: Candidate, measured: frozenset[str] = frozenset()) -> Costs:
        """Return the costs of an untrained candidate: the declared metrics and the measured metrics in `measured`.

        Raises OutOfMemoryError if the measurement does not fit into the memory.
        """

    @abstractmethod
    def num_steps(self, request: Request) -> int:
        """Return the number of training steps of a request."""

    @abstractmethod
    def evaluate(
        self,
        requests: Sequence[Request],
        progress: Progress | None = None,
        *,
        ended: OnOutcome | None = None,
        select: Select | None = None,
    ) -> list[Outcome]:
        """Return one outcome per request, in order. A candidate that fails is an outcome, not an exception.

        With `select`, all requests must have the same fidelity. A candidate that `select` drops at a rung stops there,
        and its measurement has the share and values of that rung. `ended` is called as soon as an outcome is final.
        """


class Attaching(ABC):
    """Holds a model on a device and attaches the adapters of candidates to it: what the size of a step follows from."""

    backbone: Backbone
    task: Task
    device: torch.device

    @abstractmethod
    def attach(self, request: Request) -> Attachment:
        """Return a context manager that attaches the candidate to the model as its only slot."""

    @abstractmethod
    def longest_batch(self, candidate: Candidate) -> Batch:
        """Return a training batch of the longest rows, of the candidate's batch size."""


class AttachingEvaluator(Attaching, Evaluator):
    """An evaluator that attaches the adapters of candidates to its model."""
