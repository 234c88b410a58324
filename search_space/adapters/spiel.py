"""SpIEL: a sparse update of a weight whose places move during training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from typing_extensions import override

from autopeft.search_space.adapters.base import check_at_least
from autopeft.search_space.adapters.shira import Shira

if TYPE_CHECKING:
    from torch import Tensor

    from autopeft.search_space.call import Call, Values


@dataclass(frozen=True, slots=True, kw_only=True)
class Spiel(Shira):
    """(W + scale * S) x + b as `Shira`, where places of S are dropped and others grow during training (SpIEL-AG).

    The gradient G of the loss with respect to scale * S is watched in `window` steps from every `every`-th on, at as
    many candidates as S has places: those of the largest |G| in the first of these steps. After the last of them, the
    places with the smallest |S| are dropped, and the candidates with the largest |sum of G| take over their entries,
    with the value 0 and with moments of the optimiser that start from the means of G and G^2 over the window. A place
    that would be dropped and grow again stays as it is. After the first window, all places may be dropped, later
    `share` of them, which falls linearly to 0 at the end of the training. G is the gradient before clipping.

    Trainings of up to `window` steps move nothing. In a supernet, which trains many candidates at once, places stay
    where they start.
    """

    kind: ClassVar[str] = "spiel"
    per_slot_fields: ClassVar[tuple[str, ...]] = (*Shira.per_slot_fields, "every", "window", "share")
    moves: ClassVar[bool] = True
    source: ClassVar[str] = "Ansell et al. 2024, Scaling Sparse Fine-Tuning to Large Language Models, section 3 (AG)"
    summary: ClassVar[str] = "sparse change of a weight at places that move during training"

    every: int = 20
    window: int = 5
    share: float = 0.2

    def __post_init__(self) -> None:
        Shira.__post_init__(self)
        check_at_least("window", self.window, 1)
        check_at_least("every", self.every, self.window)
        check_at_least("share", self.share, 0.0, 1.0)

    @override
    def dense(self, p: Values, call: Call, size: int) -> Tensor:
        change: Tensor = call.bank.watch.see(Shira.dense(self, p, call, size))
        return change

    @override
    def watches(self, step: int) -> bool:
        return (step - 1) % self.every < self.window

    @override
    def after_step(
        self,
        p: Values,
        moments: tuple[Values, Values],
        gradient: Tensor | None,
        notes: dict[str, Tensor],
        step: int,
        steps: int,
    ) -> None:
        if not self.watches(step) or gradient is None or step >= steps:
            return
        if "candidates" not in notes:
            notes["candidates"] = gradient.abs().topk(len(p["S"])).indices
            notes["sum"] = notes["squares"] = gradient.new_zeros(len(p["S"]))
        now = self.scale * gradient[notes["candidates"]]
        notes["sum"], notes["squares"] = notes["sum"] + now, notes["squares"] + now.square()
        if (step - 1) % self.every == self.window - 1:
            share = 1.0 if step == self.window else self.share * (1 - step / steps)
            self._move(p, moments, notes, int(share * len(p["S"])))
            notes.clear()

    def _move(self, p: Values, moments: tuple[Values, Values], notes: Values, count: int) -> None:
        """Drop up to `count` places and grow as many; see above."""
        import torch

        places = p["places"].long()
        dropped = p["S"].abs().topk(count, largest=False).indices  # the smallest first
        stays = torch.ones_like(places, dtype=torch.bool)
        stays[dropped] = False
        free = torch.isin(notes["candidates"], places[stays], invert=True)
        candidates, total, squares = (notes[name][free] for name in ("candidates", "sum", "squares"))
        best = total.abs().topk(min(count, len(total))).indices
        new = best[torch.isin(candidates[best], places[dropped], invert=True)]
        dropped = dropped[torch.isin(places[dropped], candidates[best], invert=True)][: len(new)]
        p["places"][dropped] = candidates[new].to(p["places"])
        p["S"][dropped] = 0.0
        for moment, values in zip(moments, (total, squares), strict=True):
            moment["S"][dropped] = values[new] / self.window
