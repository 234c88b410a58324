"""Causal language modelling, with the loss on the completion only where a row has a prompt.

Notation: N examples, T tokens (padded), V vocabulary, M predicted tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from autopeft.evaluators.tasks.base import IGNORED, Example, Task
from autopeft.evaluators.tasks.data import DataError


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
        return {"input_ids": [*prompt, *completion][: self.max_length], "labels": labels}

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
        wanted = targets[:, 1:]
        counted = wanted != IGNORED
        # Only what is predicted: the logits of prompts and padding are most of them, and not worth a softmax.
        predicted, wanted = logits[:, :-1][counted].float(), wanted[counted]  # [M, V], [M]
        losses = torch.zeros(counted.shape, device=logits.device).masked_scatter(
            counted, cross_entropy(predicted, wanted, reduction="none")
        )
        correct = torch.zeros_like(losses).masked_scatter(counted, (predicted.argmax(-1) == wanted).float())
        count = counted.sum(-1).clamp(min=1)
        return losses.sum(-1) / count, correct.sum(-1) / count
