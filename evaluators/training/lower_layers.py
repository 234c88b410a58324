"""The layers below the lowest adapter: run once for all slots of a pack.

Notation: N examples of T tokens, D features, `depth` layers below the lowest adapter of a pack. Their outputs depend on
no adapter and need no gradient. The layers are in evaluation mode, so an example has the same output in every epoch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from autopeft.evaluators.attachment.hooks import ForwardReplacement
from autopeft.evaluators.attachment.layers import layer_paths
from autopeft.evaluators.attachment.layout import close
from autopeft.evaluators.training.activations import Activations
from autopeft.search_space.backbones.backbone import Backbone

if TYPE_CHECKING:
    from autopeft.evaluators.tasks import Batch
    from autopeft.evaluators.training.base import TrainingEvaluator


class Reached(Exception):  # noqa: N818 - control flow
    """Stops a forward pass after a layer. `output`: the return value of that layer."""

    def __init__(self, output: Any) -> None:
        self.output = output


#: What it means for a study.
SLOWER = "trainings take longer, with the same results"


class LowerLayers:
    """The lower layers of a model. Call `obstacle` first: it learns the form of the layers' outputs."""

    def __init__(self, model: nn.Module, backbone: Backbone) -> None:
        self.model = model
        self.layers = [model.get_submodule(path) for path in layer_paths(backbone)]
        #: For each layer that returns a tuple, the number of its entries besides the hidden states.
        self._beside: list[int | None] = [None] * len(self.layers)

    @classmethod
    def of(
        cls, evaluator: TrainingEvaluator, batch: Batch, lengths: Sequence[int]
    ) -> tuple[LowerLayers | None, tuple[str, ...]]:
        """Return the lower layers of an evaluator's model, or None and a note if they cannot be shared.

        `batch`, `lengths`: see `obstacle`.
        """
        lower = cls(evaluator.model, evaluator.backbone)
        obstacle = lower.obstacle(lambda: evaluator.task.scores(evaluator.model, batch)["loss"], lengths)
        if obstacle is None:
            return lower, ()
        return None, (f"candidates do not share the outputs of the layers below their adapters, because {obstacle}",)

    @torch.no_grad()
    def __call__(self, inputs: Mapping[str, Tensor], depth: int) -> Tensor:
        """Compute the output [N, T, D] of the lowest `depth` layers, at least 1."""

        def stop(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            raise Reached(output)

        handle = self.layers[depth - 1].register_forward_hook(stop)
        try:
            self.model(**inputs)
        except Reached as reached:
            return _hidden_states(reached.output)
        finally:
            handle.remove()
        raise AssertionError("the forward pass did not reach its own layers")

    @contextmanager
    def replaced(self, hidden: Tensor, depth: int) -> Iterator[None]:
        """Make the lowest `depth` layers return `hidden` [B, T, D] and compute nothing."""

        def returning(beside: int | None) -> Callable[..., Any]:
            output = hidden if beside is None else (hidden, *[None] * beside)
            return lambda *args, **kwargs: output

        lower = zip(self.layers[:depth], self._beside[:depth], strict=True)
        replacements = [ForwardReplacement(layer, returning(beside)) for layer, beside in lower]
        try:
            yield
        finally:
            for replacement in replacements:
                replacement.remove()

    @torch.no_grad()
    def obstacle(self, losses: Callable[[], Tensor], lengths: Sequence[int]) -> str | None:
        """Return why the lower layers of this model cannot be shared, or None if they can.

        A layer may run several times in a pass, or read more than the output of the layer before it, such as a position
        bias. So a small batch runs with all layers, and then once for every depth with the stored output of the lowest
        layers in their place. The hidden states after the last layer and the losses must be the same.

        `losses`: runs the model on the batch and returns its losses [N]. `lengths`: tokens of its N rows.
        """
        try:
            with self._recorded() as outputs:
                expected = losses()
        except Exception as error:  # a study stops with this error, because all its candidates have it
            return f"the model cannot run on the rows ({type(error).__name__}: {error})"
        for number, passes in enumerate(outputs):
            if len(passes) != 1:
                return f"layer {number} runs {len(passes)} times in a pass: {SLOWER}"
        ends = [passes[0] for passes in outputs]
        self._beside = [len(end) - 1 if isinstance(end, tuple) else None for end in ends]
        for depth, end in enumerate(ends, 1):
            reader = f"layer {depth} reads" if depth < len(ends) else "the layers after the last one read"
            try:
                stored = Activations.of(_hidden_states(end), lengths)
                with self.replaced(stored.batch(range(len(lengths))), depth), self._recorded() as again:
                    found = losses()
                last, same_last = (Activations.of(_hidden_states(e), lengths).rows for e in (ends[-1], again[-1][0]))
            except Exception as error:
                return f"{reader} more than the output of layer {depth - 1} ({type(error).__name__}): {SLOWER}"
            if not (close(same_last, last).all() and close(found, expected)):
                return f"{reader} more than the output of layer {depth - 1}: {SLOWER}"
        return None

    @contextmanager
    def _recorded(self) -> Iterator[list[list[Any]]]:
        """Yield a list per layer, to which the hook of the layer adds its output in every pass."""
        outputs: list[list[Any]] = [[] for _ in self.layers]
        handles = [
            layer.register_forward_hook(lambda module, args, output, seen=seen: seen.append(output))
            for layer, seen in zip(self.layers, outputs, strict=True)
        ]
        try:
            yield outputs
        finally:
            for handle in handles:
                handle.remove()


def _hidden_states(output: Any) -> Tensor:
    """Return the hidden states in the output of a layer: all of it, or the first entry of a tuple."""
    states = output[0] if isinstance(output, tuple) else output
    if not isinstance(states, Tensor):
        raise TypeError(f"its output is a {type(output).__name__}")
    return states
