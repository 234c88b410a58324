"""The scores of language models: from logits, or from hidden states if the output layer is plain.

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
    """Return means over each example's predicted tokens, each [N]: the cross-entropy and the accuracy.

    logits: [N, T, V], targets: [N, T].
    """
    # Only predicted tokens: most logits belong to prompts and padding, and need no softmax.
    predicted, wanted, counted = _predicted(logits, targets)
    predicted = predicted.float()
    losses = cross_entropy(predicted, wanted, reduction="none")
    correct = (predicted.argmax(-1) == wanted).float()
    return {"loss": _means(losses, counted), "accuracy": _means(correct, counted)}


def from_hidden_states(model: Any, batch: Batch) -> Scored | None:
    """Compute the result of `from_logits` without logits of all tokens; None if the output layer is not plain."""
    layer = model.get_output_embeddings()
    if not (_is_frozen_linear(layer) and _ends_in_output_layer(model)):
        return None
    hidden = model.base_model(**model_inputs(batch)).last_hidden_state  # [N, T, D]
    predicted, wanted, counted = _predicted(hidden, batch["targets"])
    losses, correct = linear_cross_entropy(predicted, layer.weight, wanted, layer.bias)
    return {"loss": _means(losses, counted), "accuracy": _means(correct, counted)}


def _predicted(states: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return predicting states ([M, ...] of [N, T, ...]), the tokens to predict [M] and their mask [N, T - 1]."""
    wanted = targets[:, 1:]
    counted = wanted != IGNORED
    return states[:, :-1][counted], wanted[counted], counted


def _means(values: Tensor, counted: Tensor) -> Tensor:
    """Return the mean [N] of each example's values among `values` [M], 0 for an example without values."""
    spread = torch.zeros(counted.shape, device=values.device).masked_scatter(counted, values)
    return spread.sum(-1) / counted.sum(-1).clamp(min=1)


def _is_frozen_linear(layer: nn.Module | None) -> bool:
    """Return whether a module is a plain `nn.Linear` without hooks and without gradients."""
    return (
        type(layer) is nn.Linear
        and not layer._forward_hooks
        and not layer._forward_pre_hooks
        and not any(parameter.requires_grad for parameter in layer.parameters())
    )


class _Probe(nn.Module):
    """A substitute for a base model that returns the same hidden states for every input."""

    def __init__(self, hidden: Tensor) -> None:
        super().__init__()
        self.hidden = hidden
        self.tensors = 0

    def forward(self, *args: Any, **kwargs: Any) -> BaseModelOutputWithPast:
        self.tensors += sum(isinstance(value, Tensor) for value in (*args, *kwargs.values()))
        return _ProbeOutput(last_hidden_state=self.hidden)


class _ProbeOutput(BaseModelOutputWithPast):  # type: ignore[misc]
    def __getattr__(self, name: str) -> None:
        """Return None for outputs of only some models, such as the logits of routers."""


#: For each model, whether its logits are the plain output of its output layer.
_plain: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


@torch.no_grad()
def _ends_in_output_layer(model: Any) -> bool:
    """Return whether the logits are the output layer applied to the last hidden state, without further operations.

    Some models scale or cap the logits, or change the inputs of the layers. The test runs a shallow copy of the model
    with a probe in place of the layers, so it calls no adapter and draws no dropout.
    """
    if model not in _plain:
        layer = model.get_output_embeddings()
        # A model without values is tried with an output layer that has some.
        tried = nn.Linear(layer.in_features, 8, layer.bias is not None) if layer.weight.is_meta else layer
        # Large values, so that a soft cap has an effect in any precision.
        hidden = 100 * torch.randn(1, 2, layer.in_features, generator=torch.Generator().manual_seed(0))
        hidden = hidden.to(tried.weight)
        probe = _Probe(hidden)
        shell = copy.copy(model)
        own = {name: tried if module is layer else module for name, module in model._modules.items()}
        shell._modules = {**own, model.base_model_prefix: probe}
        ids = torch.zeros(1, 2, dtype=torch.long, device=hidden.device)
        try:
            logits = type(model).forward(shell, input_ids=ids).logits
            _plain[model] = probe.tensors == 1 and torch.equal(logits.float(), tried(hidden).float())
        except Exception:  # the model needs more outputs of its base than hidden states: use its own logits
            _plain[model] = False
    return _plain[model]
