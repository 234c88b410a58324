"""The scores of language models: from logits, or from hidden states where the output layer is plain.

Notation: N examples, T tokens (padded), D features, V vocabulary, M predicted tokens.
"""

from __future__ import annotations

import copy
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers.modeling_outputs import BaseModelOutputWithPast

from autopeft.evaluators.tasks.base import IGNORED, Batch, Scored, model_inputs
from autopeft.kernels.linear_cross_entropy import linear_cross_entropy


def from_logits(logits: Tensor, targets: Tensor) -> Scored:
    """Return means over each example's predicted tokens, [N] each: cross-entropy, and the share of correct ones.

    logits: [N, T, V], targets: [N, T].
    """
    # Only what is predicted: the logits of prompts and padding are most of them, and not worth a softmax.
    predicted, wanted, counted = _predicted(logits, targets)
    predicted = predicted.float()
    losses = cross_entropy(predicted, wanted, reduction="none")
    correct = (predicted.argmax(-1) == wanted).float()
    return {"loss": _means(losses, counted), "accuracy": _means(correct, counted)}


def from_hidden_states(model: Any, batch: Batch) -> Scored | None:
    """Return the same without logits of all tokens; None for a model that changes the output of its output layer."""
    layer = model.get_output_embeddings()
    if not (_is_frozen_linear(layer) and _ends_in_output_layer(model)):
        return None
    hidden = model.base_model(**model_inputs(batch)).last_hidden_state  # [N, T, D]
    predicted, wanted, counted = _predicted(hidden, batch["targets"])
    losses, correct = linear_cross_entropy(predicted, layer.weight, wanted, layer.bias)
    return {"loss": _means(losses, counted), "accuracy": _means(correct, counted)}


def _predicted(states: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return predicting states ([M, ...] of [N, T, ...]), the tokens to predict [M] and their places [N, T - 1]."""
    wanted = targets[:, 1:]
    counted = wanted != IGNORED
    return states[:, :-1][counted], wanted[counted], counted


def _means(values: Tensor, counted: Tensor) -> Tensor:
    """Means of each example's values: [M] to [N]; 0 without any."""
    spread = torch.zeros(counted.shape, device=values.device).masked_scatter(counted, values)
    return spread.sum(-1) / counted.sum(-1).clamp(min=1)


def _is_frozen_linear(layer: nn.Module | None) -> bool:
    """Whether a module's weight and bias are all there is to it: no adapter at it, no gradient for it."""
    return (
        type(layer) is nn.Linear
        and not layer._forward_hooks
        and not layer._forward_pre_hooks
        and not any(parameter.requires_grad for parameter in layer.parameters())
    )


class _Probe(nn.Module):
    """Stands for a base model and returns the same hidden states whatever the input."""

    def __init__(self, hidden: Tensor) -> None:
        super().__init__()
        self.hidden = hidden
        self.tensors = 0

    def forward(self, *args: Any, **kwargs: Any) -> BaseModelOutputWithPast:
        self.tensors += sum(isinstance(value, Tensor) for value in (*args, *kwargs.values()))
        return _ProbeOutput(last_hidden_state=self.hidden)


class _ProbeOutput(BaseModelOutputWithPast):  # type: ignore[misc]
    def __getattr__(self, name: str) -> None:
        """None for what only some models return, as the logits of routers."""


#: By model: whether its logits are its output layer's.
_plain: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


@torch.no_grad()
def _ends_in_output_layer(model: Any) -> bool:
    """Return whether the logits are the output layer's of the last hidden state.

    They are not where they are scaled or capped, or where something is added to the input of the layers.
    Tried out on a shell of the model with a probe in place of the layers, so that no adapter is called and no
    dropout drawn, whatever is attached.
    """
    if model not in _plain:
        layer = model.get_output_embeddings()
        # Large, so that a soft cap shows in any precision.
        hidden = 100 * torch.randn(1, 2, layer.in_features, generator=torch.Generator().manual_seed(0))
        hidden = hidden.to(layer.weight)
        probe = _Probe(hidden)
        shell = copy.copy(model)
        shell._modules = {**model._modules, model.base_model_prefix: probe}
        ids = torch.zeros(1, 2, dtype=torch.long, device=hidden.device)
        try:
            logits = type(model).forward(shell, input_ids=ids).logits
            _plain[model] = probe.tensors == 1 and torch.equal(logits.float(), layer(hidden).float())
        except Exception:  # a model that wants more of its base than hidden states: by its own logits, then
            _plain[model] = False
    return _plain[model]
