"""Causal language modelling, with the loss on the completion only where a row has a prompt."""

from __future__ import annotations

import torch
from torch.nn.functional import cross_entropy

from autopeft.evaluators.tasks.base import IGNORED, Task


class CausalLM(Task):
    """The scores of an example are means over its predicted tokens: cross-entropy, and share of correct ones."""

    name = "causal-lm"

    def encode(self, rows):
        return [self._encode(row) for row in rows]

    def _encode(self, row):
        prompt, completion = self._parts(row)
        prompt_ids = self.tokenizer(prompt)["input_ids"] if prompt else []
        # Special tokens belong to the beginning of the text, not to the seam between its parts.
        completion_ids = self.tokenizer(completion, add_special_tokens=not prompt)["input_ids"]
        if self.tokenizer.eos_token_id is not None:
            completion_ids = [*completion_ids, self.tokenizer.eos_token_id]
        # A long prompt loses its beginning: the completion is what the loss is about.
        room = max(self.max_length - len(completion_ids), 0)
        prompt_ids = prompt_ids[len(prompt_ids) - min(room, len(prompt_ids)) :]
        ids = [*prompt_ids, *completion_ids][: self.max_length]
        return {"input_ids": ids, "labels": ([IGNORED] * len(prompt_ids) + completion_ids)[: self.max_length]}

    def _parts(self, row):
        if "messages" in row:
            render = self.tokenizer.apply_chat_template
            prompt = render(row["messages"][:-1], tokenize=False, add_generation_prompt=True)
            return prompt, render(row["messages"], tokenize=False)[len(prompt) :]
        return row.get("prompt", ""), row.get("completion") or row["text"]

    def targets(self, examples, width):
        targets = torch.full((len(examples), width), IGNORED)
        for row, example in enumerate(examples):
            targets[row, : len(example["labels"])] = torch.as_tensor(example["labels"])
        return targets

    def score(self, logits, targets):
        predicted, wanted = logits[:, :-1].float(), targets[:, 1:]
        losses = cross_entropy(predicted.transpose(1, 2), wanted, reduction="none", ignore_index=IGNORED)
        counted = wanted != IGNORED
        count = counted.sum(-1).clamp(min=1)
        correct = (predicted.detach().argmax(-1) == wanted) & counted
        return losses.sum(-1) / count, correct.sum(-1) / count
