"""Causal language modelling, with the loss on the completion only where a row has a prompt.

Notation: N examples, T tokens (padded), D features, V vocabulary, M predicted tokens.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers.modeling_outputs import BaseModelOutputWithPast

from autopeft.evaluators.data.splits import DataError
from autopeft.evaluators.tasks.base import IGNORED, Batch, Example, Scored, Task, model_inputs
from autopeft.kernels.linear_cross_entropy import linear_cross_entropy


class CausalLM(Task):
    """The scores of an example are means over its predicted tokens: cross-entropy, and share of correct ones."""

    name = "causal-lm"

    def encode(self, rows):
        return [self._encode(row) for row in rows]

    def _encode(self, row: Mapping[str, Any]) -> Example:
        prompt, completion = self._chat(row["messages"]) if "messages" in row else self._plain(row)
        # A long prompt loses its beginning: the completion is what the loss is about.
        kept = min(len(prompt), max(self.max_length - len(completion), 0))
        prompt = prompt[len(prompt) - kept :]
        labels = [*[IGNORED] * kept, *completion][: self.max_length]
        if all(label == IGNORED for label in labels[1:]):  # the first token has nothing to be predicted from
            raise DataError([f"max_length {self.max_length} leaves nothing to predict in the row {row!r:.80}"])
        return {"input_ids": [*prompt, *completion][: self.max_length], "labels": labels, **self.domain(row)}

    def _plain(self, row: Mapping[str, Any]) -> tuple[list[int], list[int]]:
        """Tokens of the prompt and of the completion, or none and those of the text; the end of text is learnt."""
        eos = self.tokenizer.eos_token_id
        end = [] if eos is None else [eos]
        if "text" in row:
            return [], [*self._open(row["text"]), *end]
        prompt, whole = self._open(row["prompt"]), self._open(row["prompt"] + row["completion"])
        if whole[: len(prompt)] == prompt:
            return prompt, [*whole[len(prompt) :], *end]
        # A token would reach over the seam, which nobody who continues the prompt can produce.
        return prompt, [*self.tokenizer(row["completion"], add_special_tokens=False)["input_ids"], *end]

    def _open(self, text: str) -> list[int]:
        """Tokens of a text that may go on: with the special ones of the beginning, without an end."""
        ids = self.tokenizer(text)["input_ids"]
        return ids[:-1] if ids and ids[-1] == self.tokenizer.eos_token_id else ids

    def _chat(self, messages: Sequence[Mapping[str, str]]) -> tuple[list[int], list[int]]:
        """The last message is the completion. The template has every special token, those of the end too."""
        if self.tokenizer.chat_template is None:
            raise DataError(["rows with 'messages' need a chat template, and the model's tokenizer has none"])
        prompt = self.tokenizer.apply_chat_template(messages[:-1], tokenize=False, add_generation_prompt=True)
        whole = self.tokenizer.apply_chat_template(messages, tokenize=False)
        if not whole.startswith(prompt):
            raise DataError(["the model's chat template changes what stands before the last message"])
        prompt_ids, completion_ids = (
            self.tokenizer(text, add_special_tokens=False)["input_ids"] for text in (prompt, whole[len(prompt) :])
        )
        return prompt_ids, completion_ids

    def targets(self, examples, width):
        targets = torch.full((len(examples), width), IGNORED)
        for row, example in enumerate(examples):
            targets[row, : len(example["labels"])] = torch.as_tensor(example["labels"])
        return targets

    def score(self, logits, targets):
        """logits: [N, T, V], targets: [N, T]."""
        # Only what is predicted: the logits of prompts and padding are most of them, and not worth a softmax.
        predicted, wanted, counted = _predicted(logits, targets)
        predicted = predicted.float()
        losses = cross_entropy(predicted, wanted, reduction="none")
        correct = (predicted.argmax(-1) == wanted).float()
        return {"loss": _means(losses, counted), "accuracy": _means(correct, counted)}

    def scores(self, model: Any, batch: Batch) -> Scored:
        """Without logits of all tokens, where nothing happens between the output layer and the loss."""
        layer = model.get_output_embeddings()
        if not (_is_frozen_linear(layer) and _ends_in_output_layer(model)):
            return super().scores(model, batch)
        hidden = model.base_model(**model_inputs(batch)).last_hidden_state  # [N, T, D]
        predicted, wanted, counted = _predicted(hidden, batch["targets"])
        losses, correct = linear_cross_entropy(predicted, layer.weight, wanted, layer.bias)
        return {"loss": _means(losses, counted), "accuracy": _means(correct, counted)}


def _predicted(states: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What predicts (of [N, T, ...]: [M, ...]), the tokens to predict [M], and where they are [N, T - 1]."""
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


class _ProbeOutput(BaseModelOutputWithPast):
    def __getattr__(self, name: str) -> None:
        """None for what only some models return, as the logits of routers."""


#: By model: whether its logits are its output layer's.
_plain: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


@torch.no_grad()
def _ends_in_output_layer(model: Any) -> bool:
    """Whether the logits are the output layer's of the last hidden state: not scaled, not capped, and with nothing
    added to the input of the layers.

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
