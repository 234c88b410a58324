"""Statistics of training rows at the sites of the bare model, from which the values of adapters can start.

Notation: N rows of T tokens; x: [T, D_in] is the input of a site's linear for a row without padding, g: [T, D_out]
the gradient of the row's loss with respect to its output. A statistic is one class here, with a name in `STATISTICS`;
rules of `search_space/runtime/factors.py` ask for it by that name.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from itertools import islice
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.optim import Adam
from typing_extensions import override

from autopeft.evaluators.attachment.attachment import Attachment
from autopeft.evaluators.tasks import Batch, Task
from autopeft.search_space.adapters import AdapterSpec, Dense
from autopeft.search_space.architecture import Architecture
from autopeft.search_space.backbones.backbone import LINEAR_ROLES, Backbone, Site
from autopeft.search_space.runtime.factors import COVARIANCE, GRADIENT, MOMENT, MOVEMENT

#: Training rows that are read, and rows at a time.
ROWS, BATCH_SIZE = 256, 8
#: Training rows of a saliency.
SALIENCY_ROWS = 32
#: Learning rate of the first training whose movements are compared: that of LT-SFT's experiments. Adam's steps hardly
#: depend on it but by their scale, so neither does the order of the movements.
RATE = 5e-5


def batches_of(count: int) -> list[range]:
    """Return the positions of rows of `count`, evenly spread over them: the same for all candidates and seeds."""
    order = range(count)[:: max(1, count // ROWS)]
    return [order[i : i + BATCH_SIZE] for i in range(0, len(order), BATCH_SIZE)]


class Statistic(ABC):
    """A sum over the rows at one site, in float64."""

    #: Whether it reads gradients, which takes a backward pass.
    gradients: ClassVar[bool] = False

    def __init__(self, site: Site, device: torch.device) -> None:
        self.rows = 0
        self.shape = (site.out_features, site.in_features) if self.gradients else (site.in_features, site.in_features)
        self.sum = torch.zeros(self.shape, dtype=torch.float64, device=device)

    @abstractmethod
    def add(self, x: Tensor, g: Tensor) -> None:
        """Add a row. x: [T, D_in]; g: [T, D_out] if the class reads gradients, else empty."""

    def value(self) -> Tensor:
        """Return the statistic; the default is the mean over the rows."""
        return self.sum / max(1, self.rows)


class Covariance(Statistic):
    """The covariance of the inputs over all tokens: [D_in, D_in]."""

    def __init__(self, site: Site, device: torch.device) -> None:
        super().__init__(site, device)
        self.tokens = 0
        self.total = torch.zeros(site.in_features, dtype=torch.float64, device=device)

    @override
    def add(self, x: Tensor, g: Tensor) -> None:
        self.tokens += len(x)
        self.total += x.double().sum(0)
        self.sum += (x.T @ x).double()

    @override
    def value(self) -> Tensor:
        count = max(1, self.tokens)
        return (self.sum - torch.outer(self.total, self.total) / count) / count


class ScaledMoment(Statistic):
    """The mean over rows of x^T x, each row divided by the absolute value of its maximum, as in CorDA's code."""

    @override
    def add(self, x: Tensor, g: Tensor) -> None:
        largest = x.max().abs()
        x = x / torch.where(largest > 0, largest, 1.0)
        self.rows += 1
        self.sum += (x.T @ x).double()


class Gradient(Statistic):
    """The gradient of the mean loss with respect to the weight: [D_out, D_in]."""

    gradients: ClassVar[bool] = True

    @override
    def add(self, x: Tensor, g: Tensor) -> None:
        self.rows += 1
        self.sum += (g.T @ x).double()


STATISTICS: Mapping[str, type[Statistic]] = {
    COVARIANCE: Covariance,
    MOMENT: ScaledMoment,
    GRADIENT: Gradient,
}


class SiteStatistics:
    """Computes statistics of a model without adapters; see `factors.Statistics`.

    A pass over the rows serves the linears of one layer that have the same number of inputs, and only its statistics
    are kept. `batches`: training rows, the same at each call. `attached`: attaches an architecture and a task head with
    a seed.
    """

    def __init__(
        self,
        model: nn.Module,
        backbone: Backbone,
        task: Task,
        batches: Callable[[], Iterable[Batch]],
        attached: Callable[[Architecture, object], AbstractContextManager[Attachment]],
    ) -> None:
        self._model = model
        self._backbone = backbone
        self._task = task
        self._batches = batches
        self._attached = attached
        self._found: dict[str, Tensor] = {}
        self._name = ""

    def __call__(self, site: Site, name: str) -> Tensor:
        """Return a statistic of a site, one of `STATISTICS` or `MOVEMENT`.

        Raises ValueError for inputs of unknown form.
        """
        if name != self._name or site.name not in self._found:
            here = [
                other
                for other in self._backbone.sites
                if (other.layer, other.in_features) == (site.layer, site.in_features) and other.role in LINEAR_ROLES
            ]
            computed = self._moved(here) if name == MOVEMENT else self._computed(STATISTICS[name], here)
            self._name, self._found = name, computed
        return self._found[site.name]

    def _computed(self, kind: type[Statistic], sites: Sequence[Site]) -> dict[str, Tensor]:
        device = next(self._model.parameters()).device
        found = {site.name: kind(site, device) for site in sites}
        with self._attached(Architecture(), 0), torch.set_grad_enabled(kind.gradients):
            for batch in self._batches():
                with _calls(self._model, sites, kind.gradients) as calls:
                    loss = self._task.scores(self._model, batch)["loss"].sum()
                every = [call for own in calls.values() for call in own]
                gradients = torch.autograd.grad(loss, [y for _, y in every]) if kind.gradients else ()
                of = dict(zip((id(y) for _, y in every), gradients, strict=False))
                for name, own in calls.items():
                    for x, y in own:
                        _add(found[name], x, of.get(id(y)), batch, name)
        return {name: statistic.value() for name, statistic in found.items()}

    @torch.enable_grad()
    def saliency(self, site: Site, spec: AdapterSpec, seed: object) -> dict[str, Tensor]:
        """Return |value * gradient| for the trained tensors of an adapter at its start, alone on the model, by name.

        The gradient is that of the loss of the first 32 rows, as SNIP reads one minibatch.
        """
        with self._attached(Architecture.of({site.name: [spec]}), seed) as attachment:
            for batch in islice(self._batches(), SALIENCY_ROWS // BATCH_SIZE):
                self._task.scores(self._model, batch)["loss"].sum().backward()
            (bank,) = (bank for bank in attachment.banks if bank.site == site)
            trained = {name: value for name, value, _ in bank.trained()}
            return {name: (v.detach() * v.grad).abs()[0] for name, v in trained.items() if v.grad is not None}

    @torch.enable_grad()
    def _moved(self, sites: Sequence[Site]) -> dict[str, Tensor]:
        """Return W after one pass of Adam over the rows minus W, by site, if these linears and the head are trained."""
        with self._attached(Architecture.of({site.name: [Dense()] for site in sites}), 0) as attachment:
            optimizer = Adam([value for value, _ in attachment.trainable()], lr=RATE)
            for batch in self._batches():
                self._task.scores(self._model, batch)["loss"].mean().backward()
                optimizer.step()
                optimizer.zero_grad()
            return {bank.site.name: bank.of_slot(0)["D"].detach() for bank in attachment.banks if "D" in bank.shapes}


def _add(statistic: Statistic, x: Tensor, g: Tensor | None, batch: Batch, name: str) -> None:
    """Add the rows of a batch without padding. x: [N, T, D_in] or [N * T, D_in], g accordingly."""
    mask = batch.get("attention_mask")
    if mask is None or x.shape[:-1].numel() != mask.numel():
        raise ValueError(f"{name}: its inputs are no vectors of the tokens of a row, so no init can follow from them")
    empty = [x.new_zeros(0)] * len(mask)
    of_rows = empty if g is None else g.reshape(*mask.shape, -1)
    for x_row, g_row, read in zip(x.reshape(*mask.shape, -1), of_rows, mask.bool(), strict=True):
        statistic.add(x_row[read].float(), g_row[read].float() if g is not None else g_row)


@contextmanager
def _calls(
    model: nn.Module, sites: Sequence[Site], gradients: bool
) -> Iterator[dict[str, list[tuple[Tensor, Tensor]]]]:
    """Record inputs and, for `gradients`, zeros that are added to outputs, for each call of each site's linear."""
    calls: dict[str, list[tuple[Tensor, Tensor]]] = {site.name: [] for site in sites}

    def hook_of(site: Site) -> Callable[..., Tensor | None]:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
            zeros = torch.zeros_like(output, requires_grad=True) if gradients else output.new_empty(0)
            calls[site.name].append((args[0].detach(), zeros))
            return output + zeros if gradients else None

        return hook

    handles = [model.get_submodule(site.module).register_forward_hook(hook_of(site)) for site in sites]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()
